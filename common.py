"""A run's state and nothing else: learning rate, log, warnings, checkpoints, stopping and going on."""
import itertools
import json
import math
import platform
import shutil
import sys
import time

import torch
from tqdm import tqdm

import parallel
from cli import InputError, clock, commit, folder, replace, writing
from csrc import ops
from model import read_checkpoint

# what a healthy run logs, and what to try where it leaves that for long
HEALTHY = {
    "loss_d": (0.05, 0.7, "near 0 D always wins and starves the other losses: try a smaller --d-lr or --d-smooth 0.1"),
    "kept": (0.01, 0.99, "the share of unlabelled pixels that are trusted: see loss_d, or move --threshold"),
}
PATIENCE = 10  # logged steps in a row before a warning
FILES = "run.json", "labelled.txt", "log.jsonl", "last.pt", "best.pt"
MAY_CHANGE = "resume", "gpu", "workers", "out", "data", "iters", "log_every", "eval_every", "save_every"  # on --resume


def poly_lr(optimizer, done, args, power=0.9):
    """Set every group's rate to initial * (1 - done/iters)**power, done: updates so far in whole --decay-every's; 0: none."""
    done = done - done % args.decay_every if args.decay_every else 0
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - done / args.iters) ** power


class Run:
    """What one training writes to --out and to the screen; under torchrun the first process's does, the others' only count."""

    def __init__(self, args, data, note, labelled):
        self.args, self.data, self.labelled, self.out = args, data, labelled, folder("--out", args.out)
        about = f"{note}data {data.name}: {len(labelled)} labelled pictures, {len(data.classes)} classes"
        self.device = parallel.announce(about, args.gpu)
        self.rows, self.written, self.unhealthy = [], False, dict.fromkeys(HEALTHY, 0)
        self.first, self.figures, self.ending = parallel.RANK == 0, {}, None
        torch.manual_seed(args.seed)

    def resume(self, **parts):
        """Load OUT/last.pt into `parts` (seg, opt_seg, ...) where --resume says so -> updates done so far, 0 for a new run.

        Errors: InputError where the checkpoint was made with other flags than those that may change on the way.
        """
        last, log = self.out / "last.pt", self.out / "log.jsonl"
        if not (self.args.resume and last.exists()):
            return 0
        checkpoint = read_checkpoint(last, "--resume")
        for key, value in checkpoint["args"].items():
            now = getattr(self.args, key, value)
            if now != value and key not in MAY_CHANGE:
                raise InputError(f"--resume: --{key.replace('_', '-')} was {value} in {last} and is now {now}; give the flags "
                                 "of its run.json or another --out")
        if checkpoint["step"] > self.args.iters:
            raise InputError(f"--iters {self.args.iters}: {last} is at step {checkpoint['step']} already")
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"--resume: {last} is of another script or data; name another --out") from None
        torch.set_rng_state(checkpoint["rng"])
        lines = log.read_text().splitlines() if log.exists() else []
        # a line without its end was being written when the run was killed: it is past the checkpoint
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self.rows = [r for r in rows if r["step"] <= checkpoint["step"]] or [{"step": checkpoint["step"]}]
        return checkpoint["step"]

    def begin(self):
        """Write OUT/run.json, labelled.txt, the log so far; a new run first moves an earlier one's files to OUT/earlier-N."""
        self.written = True
        if not self.first:
            return
        old = [f for f in map(self.out.joinpath, FILES) if f.exists()]
        with writing(f"--out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            if old and not (self.args.resume and self.rows):
                aside = next(p for p in (self.out / f"earlier-{n}" for n in itertools.count(1)) if not p.exists())
                aside.mkdir()
                for f in old:
                    f.rename(aside / f.name)
                tqdm.write(f"{self.out} holds a run: its files are now in {aside}")
        facts = {"args": vars(self.args), "data": self.data.name, "commit": commit(), "python": platform.python_version(),
                 "torch": torch.__version__, "device": parallel.describe(self.device), "processes": parallel.WORLD,
                 "ops": ops.in_use(self.device.type)}
        replace(self.out / "run.json", lambda f: f.write_text(json.dumps(facts, indent=1) + "\n"))
        replace(self.out / "labelled.txt", lambda f: f.write_text("\n".join(self.labelled) + "\n"))
        self.write_log()

    def write_log(self):
        if self.first:
            replace(self.out / "log.jsonl", lambda f: f.write_text("".join(json.dumps(r) + "\n" for r in self.rows)))

    def steps(self, done):
        """Yield done + 1 ... --iters, under a progress bar on a terminal; end the script where a signal made `to_save` save."""
        self.signals, self.clock = parallel.Signals(), (time.monotonic(), done)
        with tqdm(total=self.args.iters, initial=done, disable=not sys.stderr.isatty() or not self.first) as self.bar:
            for step in range(done + 1, self.args.iters + 1):
                yield step
                self.bar.update()
                if self.ending and step < self.args.iters:
                    self.leave(step)

    def leave(self, step):
        tqdm.write(f"stopped by {self.signals.name} after step {step}, which is in {self.out}/last.pt; add --resume to go on")
        sys.exit(0)

    def to_save(self, step):
        """Whether a checkpoint is due after `step`: every --save-every, at the end, and when a signal asks to stop."""
        self.ending = self.signals.heard()
        return bool(self.ending) or step % self.args.save_every == 0 or step == self.args.iters

    def add(self, **values):
        """Sum up 0-dim tensors, a step's figures, over its pieces."""
        for name, value in values.items():
            self.figures[name] = self.figures.get(name, 0) + value.detach().double()

    def report(self, step, lr):
        """Log and print the first and the last step, every --log-every-th and those before an evaluation.

        Only there are the step's figures summed over the processes and read, which waits for the device. Errors: InputError.
        """
        args, values, self.figures = self.args, self.figures, {}
        if step not in (1, args.iters) and step % args.log_every and step % args.eval_every:
            return
        numbers = parallel.total(torch.stack([*values.values()])).tolist()
        row = {"step": step} | dict(zip(values, numbers)) | {"lr": lr}
        for name, value in row.items():
            if not math.isfinite(value):
                raise InputError(f"{name} is {value} at step {step}: the run diverged; lower --lr, --d-lr or a loss weight")
        if not self.written:
            self.begin()
        self.rows.append(row)
        if not self.first:
            return
        with writing(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        (began, before), self.clock = self.clock, (time.monotonic(), step)
        rate = (step - before) / (self.clock[0] - began + 1e-9)
        if self.bar.disable:
            print(f"step {step}/{args.iters} {text} | {rate:.2f} steps/s, {clock((args.iters - step) / rate)} left", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
        self.warn(row)

    def warn(self, row):
        """Count logged steps in a row outside HEALTHY; say so after PATIENCE of them."""
        smooth, start = getattr(self.args, "d_smooth", 0), getattr(self.args, "semi_start", 0)
        for name, (low, high, advice) in HEALTHY.items():
            if name == "loss_d" and smooth:  # smoothed labels keep half their entropy in the loss of a D that always wins
                low -= (smooth * math.log(smooth) + (1 - smooth) * math.log(1 - smooth)) / 2
            counts = name in row and (name != "kept" or row["step"] > start)
            self.unhealthy[name] = self.unhealthy[name] + 1 if counts and not low <= row[name] <= high else 0
            if self.unhealthy[name] == PATIENCE:
                tqdm.write(f"warning: {name} was outside {low:.2g}..{high:g} at {PATIENCE} logged steps in a row; {advice}")

    def due(self, done):
        """Whether an evaluation after `done` updates is wanted and still missing, as it is where a run was killed in it."""
        return done > 0 and done % self.args.eval_every == 0 and "miou" not in self.row(done)

    def row(self, step):
        """The log's row of the step just made; a new one where --log-every left it out."""
        self.rows += [{"step": step}] if self.rows[-1]["step"] != step else []
        return self.rows[-1]

    def save(self, step, parts, miou=None):
        """Write OUT/last.pt: `parts` are the nets and optimisers by name, `miou` the score at this step if there is one."""
        parallel.level(parts["seg"])
        checkpoint = dict.fromkeys(("seg", "disc", "opt_seg", "opt_disc")) | {k: v.state_dict() for k, v in parts.items()}
        checkpoint |= {"step": step, "args": vars(self.args) | {"palette": self.data.palette},
                       "classes": list(self.data.classes), "rng": torch.get_rng_state(), "miou": miou}
        if self.first:
            replace(self.out / "last.pt", lambda f: torch.save(checkpoint, f))

    def score(self, step, evaluate, val, parts):
        """Evaluate at this step; put the mIoU into the log and OUT/last.pt, keep the best in OUT/best.pt, print it."""
        row = self.row(step)
        if "miou" not in row:
            self.save(step, parts)  # it may be broken off, or killed: --resume makes up for it
        try:
            with self.signals.breaking_off():
                miou = 100 * evaluate(parts["seg"], val, self.args, self.device)[0]
        except parallel.Stopped:
            self.leave(step)
        before = [(r["miou"], r["step"]) for r in self.rows if "miou" in r and r["step"] != step]
        if row.get("miou") != miou:
            row["miou"] = miou
            self.save(step, parts, miou)
            if self.first and miou > max(before, default=(-1, 0))[0]:
                replace(self.out / "best.pt", lambda f: shutil.copyfile(self.out / "last.pt", f))
            self.write_log()  # last: where a run is killed before, it evaluates again
        self.clock = time.monotonic(), step
        other = ", best before {:.2f} at step {}".format(*max(before)) if before else ""
        tqdm.write(f"data {self.data.name}, list val, step {step}{other}\nmIoU {miou:.2f}")
