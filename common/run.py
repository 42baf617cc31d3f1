"""A training run: its log, warnings, checkpoints, evaluations, resuming and stopping; it knows no method."""
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import distributed
from common.checkpoint import METADATA, part_names, read_checkpoint
from common.console import InputError, catch_write_errors, format_time, git_commit, output_folder, write_atomically

FILES = "run.json", "labelled.txt", "log.jsonl", "last.pt", "best.pt", "tensorboard"
MAY_CHANGE = "resume", "gpu", "workers", "out", "data", "iters", "log_every", "eval_every", "save_every", "tensorboard"
PATIENCE = 10  # logged steps in a row before a warning


class HealthyRange(NamedTuple):
    """Range of a logged scalar in a run that goes well, after step `start`, and what to try if it leaves it."""
    low: float
    high: float
    advice: str
    start: int = 0


def unhealthy(rows, healthy):
    """Yield a warning for each scalar that was outside its {scalar: HealthyRange} at just the last PATIENCE rows."""
    for name, (low, high, advice, start) in healthy.items():
        values = [r[name] for r in rows[-PATIENCE - 1:] if name in r and r["step"] > start]
        outside = [not low <= value <= high for value in values]
        if len(outside) >= PATIENCE and all(outside[-PATIENCE:]) and outside[:-PATIENCE] != [True]:
            yield f"warning: {name} was outside {low:.2g}..{high:g} at {PATIENCE} logged steps in a row; {advice}"


def announce(about, gpu, describe_ops):
    """Join the process group, print a command's first line, return the torch.device; see csrc.ops.describe."""
    device = distributed.init_device(gpu)
    print(f"{about}; device {distributed.describe_device(device, gpu)}; ops {describe_ops(device.type)}", flush=True)
    return device


class Run:
    """What a training script prints and, on rank 0, writes to --out.

    args: all flags, resolved. labelled: Samples. describe_ops: function (device type) -> the operators in use, in
    words. healthy: {logged scalar: HealthyRange}, for warnings and the report.
    """

    def __init__(self, args, dataset, labelled, describe_ops, healthy=None):
        self.args, self.dataset, self.labelled, self.healthy = args, dataset, labelled, healthy or {}
        self.script = Path(sys._getframe(1).f_code.co_filename).name  # the file that creates the run
        self.out = output_folder("--out", args.out)
        self.last = self.out / "last.pt"
        self.device = announce(f"{dataset.note}data {dataset.name}: {len(labelled)} labelled images, "
                               f"{len(dataset.classes)} classes", args.gpu, describe_ops)
        self.ops = describe_ops(self.device.type)
        self.rows, self.has_begun, self.minutes, self.changed = [], False, 0, {}
        self.is_resumed = args.resume and self.last.exists()
        self.start = read_checkpoint(self.last, "--resume", mmap=True)["step"] if self.is_resumed else 0
        if distributed.all_reduce_sum(torch.tensor(self.start)) != self.start * distributed.WORLD_SIZE:
            raise InputError("--resume: the ranks found different checkpoints; all machines must share --out")
        self.board = import_tensorboard() if args.tensorboard and distributed.RANK == 0 else None
        torch.manual_seed(args.seed)

    @property
    def loader_args(self):
        """Keyword arguments of data.batches that all streams of a script share."""
        names = "seed", "batch_size", "iters", "crop", "scale", "input_scale", "drop_last", "workers"
        return {name: getattr(self.args, name) for name in names} | {"start": self.start, "device": self.device}

    def resume(self, **parts):
        """Register the parts of a checkpoint (networks, optimisers, ...); with --resume, load OUT/last.pt into them."""
        distributed.install_signal_handlers()
        if clash := METADATA & set(parts):
            raise ValueError(f"a part cannot be named {clash.pop()}: a checkpoint has an entry of that name")
        self.parts = parts
        if not self.is_resumed:
            return
        checkpoint = read_checkpoint(self.last, "--resume")
        if checkpoint["step"] != self.start:
            raise InputError(f"--out {self.out}: another run is writing there; end it or name another --out")
        if part_names(checkpoint) != set(parts):
            raise InputError(f"--resume: {self.last} has the parts {', '.join(sorted(part_names(checkpoint)))}; this "
                             f"script has {', '.join(sorted(parts))}; name another --out")
        for name, before in checkpoint["args"].items():
            now = getattr(self.args, name, None)  # None for a flag that this script does not have
            if name in ("palette", "resume") or now == before or now is None and not before:
                continue
            if name not in MAY_CHANGE:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before} in {self.last} and is now {now}; "
                                 "give the flags of its run.json or another --out")
            self.changed[name] = [before, now]
        if self.start > self.args.iters:
            raise InputError(f"--iters {self.args.iters}: {self.last} is at step {self.start} already")
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"--resume: {self.last} is of another script or data; name another --out") from None
        self.minutes = checkpoint.get("minutes", 0)
        log = self.out / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut off the last line
        self.rows = [r for r in rows if r["step"] <= self.start] or [{"step": self.start}]

    def steps(self, evaluate):
        """Yield the remaining steps, counted from 1; `end_step` ends each.

        evaluate: function () -> eval.Evaluation, or None if a stop was requested meanwhile.
        """
        self.evaluate, self.began, self.minutes_before = evaluate, time.monotonic(), self.minutes
        if self.start == self.args.iters or self.is_due(self.start) and not self.is_scored(self.start):
            self.exit_if(not self.score(self.start), self.start)  # at its end, or interrupted in its evaluation
        self.last_logged = time.monotonic(), self.start
        yield from range(self.start + 1, self.args.iters + 1)

    def log(self, step, **scalars):
        """Log and print a step's scalars if due: 0-dim tensors, averaged over the ranks, or numbers."""
        args = self.args
        is_logged = step in (1, args.iters) or not step % args.log_every or not step % args.eval_every
        if not is_logged and step % args.save_every:
            return  # reading the values would wait for the device
        row, tensors = {"step": step} | scalars, {k: v for k, v in scalars.items() if isinstance(v, torch.Tensor)}
        if tensors:
            values = torch.stack([value.detach().double() for value in tensors.values()])
            row |= zip(tensors, (distributed.all_reduce_sum(values) / distributed.WORLD_SIZE).tolist())
        for name, value in row.items():
            if not math.isfinite(value):  # checked before each checkpoint too
                raise InputError(f"{name} is {value} at step {step}: the run diverged; lower --lr or a loss's weight")
        if not is_logged:
            return
        self.begin()
        self.rows.append(row)
        if distributed.RANK:
            return
        with catch_write_errors(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        self.add_scalars(step, row)
        (began, before), self.last_logged = self.last_logged, (time.monotonic(), step)
        rate = (step - before) / (self.last_logged[0] - began + 1e-9)
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        print(f"step {step}/{args.iters} {text} | {rate:.2f} steps/s, {format_time((args.iters - step) / rate)} left",
              *unhealthy(self.rows, self.healthy), sep="\n", flush=True)

    def end_step(self, step):
        """Save and evaluate if due; exit if a signal asked to stop."""
        if step == self.start + 1:
            self.first_step_end = time.monotonic()
        elif step == self.start + 10 < self.args.iters:  # the first step is slower and not counted
            seconds = (time.monotonic() - self.first_step_end) / 9 * (self.args.iters - step)
            print(f"about {format_time(seconds)} minutes to the end, without evaluations", flush=True)
        is_due, stopping = self.is_due(step), distributed.stop_requested()
        if is_due or stopping or step % self.args.save_every == 0:
            self.save(step)
        if is_due and not stopping:
            stopping = not self.score(step) or step < self.args.iters and distributed.stop_requested()
        self.exit_if(stopping, step)

    def exit_if(self, stopping, step):
        if stopping:
            print(f"stopped by {distributed.stop_requested()} after step {step}; --resume continues", flush=True)
            sys.exit(0)

    def is_due(self, step):
        """Whether an evaluation is due after this step."""
        return step > 0 and (step == self.args.iters or step % self.args.eval_every == 0)

    def is_scored(self, step):
        return any("miou" in row for row in self.rows[-1:] if row["step"] == step)

    def score(self, step):
        """Evaluate, log and print the scores, keep the best checkpoint; return False if a stop was requested."""
        result = self.evaluate()
        if result is None:
            return False
        miou = result.scores["miou"]
        earlier = [(row["miou"], row["step"]) for row in self.rows if "miou" in row and row["step"] != step]
        best, at = max(earlier, default=(-1, 0))
        if not self.is_scored(step):
            self.save(step, miou)
            if not self.rows or self.rows[-1]["step"] != step:  # --log-every left it out
                self.rows.append({"step": step})
            self.rows[-1] |= result.scores
            if distributed.RANK == 0:
                if miou > best:
                    write_atomically(self.out / "best.pt", lambda f: shutil.copyfile(self.last, f))
                self.add_scalars(step, result.scores)
                if self.board:
                    self.board.add_image("examples", np.asarray(result.draw_examples()), step, dataformats="HWC")
                self.write_log()  # last: a run killed before this evaluates again
        self.last_logged = time.monotonic(), step
        extra = "".join(f", {name} {value:.1f}" for name, value in result.scores.items() if name != "miou")
        print(f"data {self.dataset.name}, list val, step {step}" + f", best before {best:.2f} at step {at}" * (at > 0)
              + f"{extra}\nmIoU {miou:.2f}", flush=True)
        return True

    def save(self, step, miou=None):
        """Write OUT/last.pt atomically."""
        if distributed.RANK:
            return
        self.begin()
        self.minutes = self.minutes_before + (time.monotonic() - self.began) / 60
        checkpoint = {name: part.state_dict() for name, part in self.parts.items()} | {
            "step": step, "args": vars(self.args) | {"palette": self.dataset.palette}, "miou": miou,
            "classes": list(self.dataset.classes), "rng": torch.get_rng_state(), "minutes": self.minutes}
        write_atomically(self.last, lambda f: torch.save(checkpoint, f))

    def begin(self):
        """Once, before the first file is written: lock --out, move the files of an earlier run to earlier-N."""
        if self.has_begun or distributed.RANK:
            return
        self.has_begun = True
        with catch_write_errors(f"--out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock()
            old = [f for f in map(self.out.joinpath, FILES) if f.exists()]
            if old and not self.is_resumed:
                aside = next(p for p in (self.out / f"earlier-{n}" for n in itertools.count(1)) if not p.exists())
                aside.mkdir()
                for f in old:
                    f.rename(aside / f.name)
                print(f"{self.out} contains a run: its files are now in {aside}")
        self.write_facts()
        ids = "".join(f"{sample.id}\n" for sample in self.labelled)
        write_atomically(self.out / "labelled.txt", lambda f: f.write_text(ids))
        self.write_log()
        if self.board:  # entries of steps after the checkpoint are void
            self.board = self.board(self.out / "tensorboard", purge_step=self.start + 1)

    def lock(self):
        """Keep --out to this process until it ends; an InputError if another one has it. Windows has no such lock."""
        try:
            import fcntl
            self.lock_file = open(self.out / ".lock", "w")
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
        except BlockingIOError:
            raise InputError(f"--out {self.out}: another run is writing there; end it or name another --out") from None
        except (ImportError, OSError):  # a file system without locks
            pass

    def write_facts(self):
        """Write run.json; a resumed run appends to its `resumed`."""
        file = self.out / "run.json"
        now = {"commit": git_commit(), "device": distributed.describe_device(self.device)}
        if self.is_resumed and file.exists():
            facts = json.loads(file.read_text())
            facts.setdefault("resumed", []).append(now | {"step": self.start, "changed": self.changed})
        else:
            facts = now | {"script": self.script, "args": vars(self.args), "data": self.dataset.name,
                           "torch": torch.__version__, "python": sys.version.split()[0], "ops": self.ops,
                           "ranks": distributed.WORLD_SIZE, "healthy": self.healthy, "resumed": []}
        write_atomically(file, lambda f: f.write_text(json.dumps(facts, indent=1) + "\n"))

    def write_log(self):
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.out / "log.jsonl", lambda f: f.write_text(text))

    def add_scalars(self, step, scalars):
        if self.board:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def import_tensorboard():
    """Return TensorBoard's writer class; an InputError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard: tensorboard is not installed; pip install tensorboard") from None
    return SummaryWriter
