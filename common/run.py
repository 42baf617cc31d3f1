"""A training run: its log, warnings, checkpoints, evaluations, resuming and stopping; it knows no method."""
import importlib.util
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import distributed
from common.checkpoint import METADATA, part_names, read_checkpoint
from common.console import InputError, catch_write_errors, format_time, git_commit, output_folder, write_atomically

import numpy as np
import torch

FILES = "run.json", "labelled.txt", "log.jsonl", "last.pt", "best.pt", "tensorboard"
# Flags that --resume may change.
MAY_CHANGE = "resume", "gpu", "workers", "out", "data", "iters", "log_every", "eval_every", "save_every", "tensorboard"
WORST = 8  # classes whose IoU an evaluation prints
PATIENCE = 10  # logged steps in a row before a warning


class HealthyRange(NamedTuple):
    """Expected range of a logged scalar after step `start`, and what to do if it stays below or above that range."""
    low: float
    high: float
    if_below: str
    if_above: str
    start: int = 0


def range_warnings(rows, healthy):
    """Yield a warning for each scalar that was outside its {scalar: HealthyRange} in exactly the last PATIENCE rows."""
    for name, (low, high, if_below, if_above, start) in healthy.items():
        values = [r[name] for r in rows[-PATIENCE - 1:] if name in r and r["step"] > start]
        outside = [not low <= value <= high for value in values]
        if len(outside) >= PATIENCE and all(outside[-PATIENCE:]) and outside[:-PATIENCE] != [True]:
            side, advice = (f"below {low:.2g}", if_below) if values[-1] < low else (f"above {high:g}", if_above)
            yield f"warning: {name} was {side} at {PATIENCE} logged steps in a row; {advice}"


def announce(about, gpu, describe_ops):
    """Join the process group, print a command's first line, return the torch.device; see csrc.ops.describe."""
    device = distributed.init_device(gpu)
    print(f"{about}; device {distributed.describe_device(device, gpu)}; ops {describe_ops(device.type)}", flush=True)
    return device


class Run:
    """What a training script prints and, on rank 0, writes to --out.

    script: its __file__. args: all flags, resolved. labelled: Samples. describe_ops: function (device type) -> the
    operators in use, in words. healthy: {logged scalar: HealthyRange}, for warnings and the report.
    """

    def __init__(self, script, args, dataset, labelled, describe_ops, healthy=None):
        self.script, self.args, self.dataset, self.labelled = Path(script).name, args, dataset, labelled
        self.healthy, self.rows, self.minutes, self.changed = healthy or {}, [], 0, {}
        self.lock_file = self.board = None
        self.has_scored = False
        self.out = output_folder("--out", args.out)
        self.last = self.out / "last.pt"
        self.device = announce(f"{dataset.note}data {dataset.name}: {len(labelled)} labelled images, "
                               f"{len(dataset.classes)} classes", args.gpu, describe_ops)
        self.ops = describe_ops(self.device.type)
        resumes = args.resume and self.last.exists()
        self.checkpoint = read_checkpoint(self.last, "--resume", mmap=True) if resumes else None
        self.start = self.checkpoint["step"] if resumes else 0
        if distributed.all_reduce_sum(torch.tensor(self.start)) != self.start * distributed.WORLD_SIZE:
            raise InputError("--resume: the ranks found different checkpoints; all machines must share --out")
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise InputError("--tensorboard: tensorboard is not installed; pip install tensorboard")
        torch.manual_seed(args.seed)

    @property
    def loader_args(self):
        """Keyword arguments of data.batches that all streams of a script share."""
        names = "seed", "batch_size", "iters", "crop", "scale", "input_scale", "workers"
        return {name: getattr(self.args, name) for name in names} | {"start": self.start, "device": self.device}

    def resume(self, **parts):
        """Register what a checkpoint holds, `seg` and parts of any name; with --resume, load OUT/last.pt into them.

        A part has state_dict() and load_state_dict(). From here on SIGTERM and Ctrl-C stop the run after a step.
        """
        assert not METADATA & parts.keys(), f"names that checkpoints use themselves: {sorted(METADATA)}"
        distributed.install_signal_handlers()
        self.parts, checkpoint, self.checkpoint = parts, self.checkpoint, None
        if not checkpoint:
            return
        if part_names(checkpoint) != set(parts):
            raise InputError(f"--resume: {self.last} has the parts {', '.join(sorted(part_names(checkpoint)))}; "
                             f"{self.script} has {', '.join(sorted(parts))}; name another --out")
        for name, before in checkpoint["args"].items():
            now = getattr(self.args, name, f"unknown to {self.script}" if before else before)
            if name not in ("palette", "resume") and now != before:
                self.changed[name] = [before, now]
        for name, (before, now) in self.changed.items():
            if name not in MAY_CHANGE:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before} in {self.last} and is now {now}; "
                                 "give the flags of its run.json or name another --out")
        if self.start > self.args.iters:
            raise InputError(f"--iters {self.args.iters}: {self.last} is at step {self.start} already")
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError):
            raise InputError(f"--resume: {self.last} has other parts or classes; name another --out") from None
        self.minutes = checkpoint.get("minutes", 0)
        log = self.out / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        rows = (json.loads(line) for line in lines if line.endswith("}"))  # a kill can cut off the last line
        self.rows = [row for row in rows if row["step"] <= self.start]

    def steps(self, evaluate):
        """Yield the remaining steps, counted from 1. evaluate() returns eval.Evaluation, or None if asked to stop."""
        self.evaluate, self.began = evaluate, time.monotonic() - 60 * self.minutes
        if self.start == self.args.iters or self.is_due(self.start) and "miou" not in self.row(self.start):
            self.score(self.start)  # the run had finished, or was interrupted in this evaluation
        self.last_logged = time.monotonic(), self.start
        for step in range(self.start + 1, self.args.iters + 1):
            torch.backends.cudnn.benchmark = True  # crops have one size; an evaluation turns it off
            yield step

    def row(self, step):
        """Return the last row of the log, after appending one if it is not of `step`."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        return self.rows[-1]

    def log(self, step, **scalars):
        """Log and print a step's scalars if due: 0-dim tensors, averaged over the ranks, or numbers.

        Raises an InputError if one is not finite.
        """
        args = self.args
        is_logged = step in (1, args.iters) or not step % args.log_every or not step % args.eval_every
        if not is_logged and step % args.save_every:
            return  # reading the values would wait for the device
        values = [x.item() if isinstance(x, torch.Tensor) else x for x in scalars.values()]  # MPS has no float64
        values = distributed.all_reduce_sum(torch.tensor(values, dtype=torch.float64)) / distributed.WORLD_SIZE
        scalars = dict(zip(scalars, values.tolist()))
        if infinite := [name for name, value in scalars.items() if not math.isfinite(value)]:
            raise InputError(f"{infinite[0]} is {scalars[infinite[0]]} at step {step}: the run diverged; "
                             "lower --lr or the weight of that loss")
        if not is_logged:
            return
        self.begin()
        self.row(step).update(scalars)
        if distributed.RANK:
            return
        with catch_write_errors(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        self.write_board(step, scalars)
        (began, before), self.last_logged = self.last_logged, (time.monotonic(), step)
        rate = (step - before) / (self.last_logged[0] - began + 1e-9)
        text = " ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        print(f"step {step}/{args.iters} {text} | {rate:.2f} steps/s, {format_time((args.iters - step) / rate)} left",
              *range_warnings(self.rows, self.healthy), sep="\n", flush=True)

    def end_step(self, step):
        """Save and evaluate if due; exit if a signal asked to stop."""
        if step == self.start + 1:
            self.first_step_end = time.monotonic()
        elif step == self.start + 10 < self.args.iters:  # the first step is slower and not counted
            seconds = (time.monotonic() - self.first_step_end) / 9 * (self.args.iters - step)
            print(f"about {format_time(seconds)} (min:s) left, without evaluations", flush=True)
        is_due, reason = self.is_due(step), distributed.stop_requested()
        if is_due or reason or step % self.args.save_every == 0:
            self.save(step)
        if is_due and not reason:
            self.score(step)
            reason = distributed.stop_requested() if step < self.args.iters else None
        self.exit_if(reason, step)

    def exit_if(self, reason, step):
        if reason:
            print(f"stopped by {reason} after step {step}; --resume continues", flush=True)
            sys.exit(0)

    def is_due(self, step):
        """Whether an evaluation is due after this step."""
        return step > 0 and (step == self.args.iters or step % self.args.eval_every == 0)

    def score(self, step):
        """Evaluate, log and print the scores, keep the best checkpoint; exit if a signal asked to stop meanwhile."""
        result = self.evaluate()
        if result is None:
            self.exit_if(distributed.stop_requested(), step)
        miou, row = result.scores["miou"], self.row(step)
        per_class = {name: None if math.isnan(iou) else 100 * iou
                     for name, iou in zip(self.dataset.classes, result.per_class.tolist())}
        best = max((r["miou"] for r in self.rows if "miou" in r), default=-1)
        if "miou" not in row:
            self.save(step, miou)
            row |= result.scores | {"per_class": per_class}
            if distributed.RANK == 0:
                if miou > best:
                    write_atomically(self.out / "best.pt", lambda f: shutil.copyfile(self.last, f))
                self.write_board(step, result.scores, result.draw_examples)
                self.write_log()  # last: a run killed before this evaluates again
        self.last_logged = time.monotonic(), step
        ranked = sorted((iou, name) for name, iou in per_class.items() if iou is not None)
        zero, more = [name for iou, name in ranked if iou == 0], len(ranked) - WORST
        if not self.has_scored:
            constant, constant_miou = result.best_constant()
            print(f"predicting {self.dataset.classes[constant]} everywhere scores a mean IoU of {constant_miou:.2f}")
        self.has_scored = True
        if zero and 2 * step >= self.args.iters:
            print(f"warning: IoU is still 0 at step {step} of {self.args.iters}: {', '.join(zero)}; label more images "
                  "that show it, or raise --iters"
                  + ", or try --class-weights balanced" * (self.args.class_weights == "none"))
        lowest = ", ".join(f"{name} {iou:.1f}" for iou, name in ranked[:WORST])
        print(f"lowest IoU: {lowest}" + f" (and {more} better)" * (more > 0))
        extra = "".join(f", {name} {value:.1f}" for name, value in result.scores.items() if name != "miou")
        print(f"data {self.dataset.name}, list val, step {step}{extra}\nmIoU {miou:.2f}", flush=True)

    def save(self, step, miou=None):
        """Write OUT/last.pt atomically."""
        if distributed.RANK:
            return
        self.begin()
        checkpoint = {name: part.state_dict() for name, part in self.parts.items()} | {
            "step": step, "args": vars(self.args) | {"palette": self.dataset.palette}, "miou": miou,
            "classes": list(self.dataset.classes), "rng": torch.get_rng_state(),
            "minutes": (time.monotonic() - self.began) / 60}
        write_atomically(self.last, lambda f: torch.save(checkpoint, f))

    def begin(self):
        """Once, before the first file is written: lock --out, move the files of an earlier run to earlier-N."""
        if self.lock_file or distributed.RANK:
            return
        with catch_write_errors(f"--out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock()
            old = [f for f in map(self.out.joinpath, FILES) if f.exists()]
            if old and not self.start:
                aside = next(p for p in (self.out / f"earlier-{n}" for n in itertools.count(1)) if not p.exists())
                aside.mkdir()
                for f in old:
                    f.rename(aside / f.name)
                print(f"{self.out} contains a run: its files are now in {aside}")
        self.write_facts()
        ids = "".join(f"{sample.id}\n" for sample in self.labelled)
        write_atomically(self.out / "labelled.txt", lambda f: f.write_text(ids))
        self.write_log()
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.start + 1)  # drops later entries

    def lock(self):
        """Keep --out to this process until it ends; an InputError if another one has it."""
        self.lock_file = open(self.out / ".lock", "w")
        try:
            import fcntl  # not on Windows
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
        except BlockingIOError:
            raise InputError(f"--out {self.out}: another run is writing there; end it or name another --out") from None
        except (ImportError, OSError):  # a file system without locks
            pass

    def write_facts(self):
        """Write run.json; a resumed run appends to its `resumed`."""
        file = self.out / "run.json"
        now = {"commit": git_commit(), "device": distributed.describe_device(self.device)}
        if self.start and file.exists():
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

    def write_board(self, step, scalars, draw_examples=None):
        if self.board:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
            if draw_examples:
                self.board.add_image("examples", np.asarray(draw_examples()), step, dataformats="HWC")
            self.board.flush()
