"""A run's state: settling its flags, learning rate, log, warnings, checkpoints, stopping and going on."""
import itertools
import json
import math
import shutil
import sys
import time

import torch
from tqdm import tqdm

import data
import flags
import model
import parallel
import watch
from cli import InputError, clock, commit, folder, replace, writing
from csrc import build, ops

FILES = "run.json", "labelled.txt", "log.jsonl", "last.pt", "best.pt", "tensorboard"
NETS = "seg", "disc", "opt_seg", "opt_disc"  # of a checkpoint; None where a script has it not
MAY_CHANGE = "resume", "gpu", "workers", "out", "data", "iters", "log_every", "eval_every", "save_every", "tensorboard"


def settle(args, dataset, labelled):
    """Fill in the flags that were not given and check all; nothing writes to `args` after it. Errors: InputError."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    small = dataset.own and (args.gpu < 0 or not torch.cuda.is_available())
    known = (data.laptop_defaults(dataset, given) if small else dataset.defaults) | given
    tenth = max(1, known["iters"] // 10)
    known = {"stride": 16 if known["backbone"] == "efficientnet_lite0" else 8, "eval_every": tenth, "save_every": tenth,
             "semi_start": known["iters"] // 4, "u_start": known["iters"] // 8,
             "threshold": 0.2 if known.get("trust") is None else 0} | known
    vars(args).update({name: known.get(name) for name in vars(args)})
    if getattr(args, "semi_start_epoch", None) is not None:
        epoch = len(labelled) // args.batch_size if args.drop_last else len(labelled) / args.batch_size  # in steps
        args.semi_start = math.ceil(args.semi_start_epoch * epoch)
    flags.check(args)
    share = parallel.WORLD * (2 if getattr(args, "cutmix", 0) and parallel.WORLD > 1 else 1)  # a process mixes pairs
    if args.batch_size % share:
        raise InputError(f"--batch-size {args.batch_size}: {parallel.WORLD} processes share it out; make it a multiple "
                         f"of {share}")
    args.caffe, norm = model.origin(args.init)
    args.norm = args.norm or norm


def poly_lr(optimizer, done, args, power=0.9):
    """Poly decay: rate = initial * (1 - done/iters)**power, `done` in whole multiples of --decay-every (0: none)."""
    done = done - done % args.decay_every if args.decay_every else 0
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - done / args.iters) ** power


def announce(about, gpu):
    """Join the other processes and print a run's first line: data, device, ops in use -> the torch.device."""
    device = parallel.start(gpu)
    print(f"{about}; device {parallel.describe(device, gpu)}; ops {ops.in_use(device.type)}{build.note}", flush=True)
    return device


class Run:
    """What one training writes to --out and to the screen; under torchrun only the first process writes."""

    def __init__(self, args, dataset, labelled):
        self.args, self.data, self.labelled, self.out = args, dataset, labelled, folder("--out", args.out)
        self.device = announce(f"{dataset.note}data {dataset.name}: {len(labelled)} labelled pictures, "
                               f"{len(dataset.classes)} classes", args.gpu)
        self.rows, self.written, self.first, self.last = [], False, parallel.RANK == 0, self.out / "last.pt"
        self.resumed = args.resume and self.last.exists()
        self.done = model.read_checkpoint(self.last, "--resume", mmap=True)["step"] if self.resumed else 0
        if parallel.total(torch.tensor(self.done)) != self.done * parallel.WORLD:
            raise InputError("--resume: the processes found different checkpoints; all machines must share --out")
        self.board = watch.Board(dataset, args) if args.tensorboard and self.first else None
        torch.manual_seed(args.seed)

    def resume(self, **parts):
        """With --resume, load OUT/last.pt into `parts` (seg, opt_seg, ...). Errors: InputError."""
        parallel.listen()
        self.parts, last, log = parts, self.last, self.out / "log.jsonl"
        if not self.resumed:
            return
        checkpoint = model.read_checkpoint(last, "--resume")
        if checkpoint["step"] != self.done:
            raise InputError(f"--out {self.out}: another run is writing there; end it or name another --out")
        try:
            for key, value in checkpoint["args"].items():
                now = getattr(self.args, key, value)
                if now != value and key not in MAY_CHANGE:
                    raise InputError(f"--resume: --{key.replace('_', '-')} was {value} in {last} and is now {now}; "
                                     "give the flags of its run.json or another --out")
            if checkpoint["step"] > self.args.iters:
                raise InputError(f"--iters {self.args.iters}: {last} is at step {checkpoint['step']} already")
            if {name for name in (*NETS, "student") if checkpoint.get(name)} != set(self.parts):
                raise KeyError
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"--resume: {last} is of another script or data; name another --out") from None
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # not one cut off by a kill
        self.rows = [r for r in rows if r["step"] <= checkpoint["step"]] or [{"step": checkpoint["step"]}]

    def begin(self):
        """Once, before a run's first file: lock --out, move an earlier run's files to earlier-N. Errors: InputError."""
        if self.written:
            return
        self.written = True
        with writing(f"--out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock()
            old = [f for f in map(self.out.joinpath, FILES) if f.exists()]
            if old and not (self.args.resume and self.rows):
                aside = next(p for p in (self.out / f"earlier-{n}" for n in itertools.count(1)) if not p.exists())
                aside.mkdir()
                for f in old:
                    f.rename(aside / f.name)
                tqdm.write(f"{self.out} holds a run: its files are now in {aside}")
        facts = {"args": vars(self.args), "data": self.data.name, "commit": commit(), "torch": torch.__version__,
                 "python": sys.version.split()[0], "device": parallel.describe(self.device),
                 "processes": parallel.WORLD, "ops": ops.in_use(self.device.type)}
        replace(self.out / "run.json", lambda f: f.write_text(json.dumps(facts, indent=1) + "\n"))
        replace(self.out / "labelled.txt", lambda f: f.write_text("\n".join(self.labelled) + "\n"))
        self.write_log()
        if self.board:
            self.board.open(self.out / "tensorboard", self.rows[-1]["step"] if self.rows else 0)

    def lock(self):
        """Keep --out to this process until it ends, however it ends. Errors: InputError where another one has it."""
        try:
            import fcntl  # Windows has none
            self.held = open(self.out / ".lock", "w")
            fcntl.lockf(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's: forked workers do not have it
        except BlockingIOError:
            raise InputError(f"--out {self.out}: another run is writing there; end it or name another --out") from None
        except (ImportError, OSError):  # a disk that has no locks
            pass

    def write_log(self):
        replace(self.out / "log.jsonl", lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in self.rows)))

    def steps(self, done):
        """done + 1 ... --iters, under a progress bar on a terminal."""
        self.start, self.clock, shown = done, (time.monotonic(), done), self.first and sys.stderr.isatty()
        self.bar = tqdm(range(done + 1, self.args.iters + 1), initial=done, total=self.args.iters, disable=not shown)
        return self.bar

    def log(self, step, lr, **values):
        """Log and print a step's figures, 0-dim tensors, each a parallel.mean. Errors: InputError, one not finite."""
        logged = step in (1, self.args.iters) or not step % self.args.log_every or not step % self.args.eval_every
        if not logged and step % self.args.save_every:
            return  # reading figures would wait for the device
        figures = torch.stack([value.detach().double() for value in values.values()])
        row = {"step": step} | dict(zip(values, (parallel.total(figures) / parallel.WORLD).tolist())) | {"lr": lr}
        for name, value in row.items():
            if not math.isfinite(value):
                raise InputError(f"{name} is {value} at step {step}: the run diverged; lower --lr, --d-lr or --lam-*")
        if not logged:
            return  # looked at only for a checkpoint of a run that diverged
        if self.first:
            self.begin()
        self.rows.append(row)
        if not self.first:
            return
        with writing(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        if self.board:
            self.board.figures(step, row)
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        (began, before), self.clock = self.clock, (time.monotonic(), step)
        rate, of = (step - before) / (self.clock[0] - began + 1e-9), self.args.iters
        if self.bar.disable:
            print(f"step {step}/{of} {text} | {rate:.2f} steps/s, {clock((of - step) / rate)} left", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
        if 10 <= step - self.start < 10 + self.args.log_every and (of - step) / rate > 86400:
            tqdm.write(f"warning: this takes {(of - step) / rate / 86400:.1f} days here; lower --crop or --iters")
        for line in watch.warnings(self.rows, self.args):
            tqdm.write(line)

    def to_evaluate(self, step):
        """Whether this step's score is due: every --eval-every, and at the end."""
        return step == self.args.iters or step > 0 and step % self.args.eval_every == 0 and not self.scored(step)

    def scored(self, step):
        return any("miou" in row for row in self.rows[-1:] if row["step"] == step)

    def to_save(self, step):
        """Whether a checkpoint is due: every --save-every, and where a signal asks to stop."""
        return bool(parallel.stopping()) or step % self.args.save_every == 0

    def save(self, step, scores=None):
        """Write OUT/last.pt; log eval's scores, keep the best in OUT/best.pt; end where that was asked for.

        A run that had ended is left as it is. Errors: the InputError that broke an evaluation off.
        """
        checkpoint = dict.fromkeys(NETS) | {name: part.state_dict() for name, part in self.parts.items()} | {
            "step": step, "args": vars(self.args) | {"palette": self.data.palette}, "classes": list(self.data.classes),
            "rng": torch.get_rng_state(), "miou": scores and scores["miou"]}
        if self.first and not self.scored(step):
            self.begin()
            replace(self.last, lambda f: torch.save(checkpoint, f))
        if scores:
            self.score(step, scores)
        if (heard := parallel.stopping()) and (scores is None or step < self.args.iters):
            if isinstance(heard, InputError):
                raise heard
            tqdm.write(f"stopped by {heard} after step {step}, which is in {self.out}/last.pt; --resume goes on")
            sys.exit(0)

    def score(self, step, scores):
        best = max(((r["miou"], r["step"]) for r in self.rows if "miou" in r and r["step"] != step), default=(-1, 0))
        if self.first and not self.scored(step) and scores["miou"] > best[0]:
            replace(self.out / "best.pt", lambda f: shutil.copyfile(self.last, f))
        if self.rows[-1]["step"] != step:  # --log-every left it out
            self.rows.append({"step": step})
        self.rows[-1] = self.rows[-1] | scores | self.rows[-1]  # of a run that had ended: what it has
        if self.board and self.written:
            self.board.figures(step, scores)
            self.board.strip(step, self.parts["seg"], self.device)
        if self.written:
            self.write_log()  # last: a run killed before this evaluates again
        self.clock = time.monotonic(), step
        other = ", best before {:.2f} at step {}".format(*best) if best[1] else ""
        more = "".join(f", {name} {value:.1f}" for name, value in scores.items() if name != "miou")
        tqdm.write(f"data {self.data.name}, list val, step {step}{other}{more}\nmIoU {scores['miou']:.2f}")
