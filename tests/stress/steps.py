"""Time of a training step on the CPU: the scripts, and the same method in plain PyTorch, as a Markdown table.

    python tests/stress/steps.py        # 4 minutes on two idle cores; needs no data

The plain version of train_semi.py is the paper's algorithm as its authors order it: logits are upsampled first, S and
D are run once for each loss, and D learns from predictions on unlabelled images too, which train_semi.py does with
--d-unlabelled only. Its networks are the same, with nn.Conv2d. Steps of both alternate; the ratio is the median over
all rounds. To imitate a CPU with AVX2: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
SEG_OPS_CFLAGS=-march=haswell python tests/stress/steps.py
"""
import argparse
import contextlib
import copy
import importlib
import itertools
import re
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.console import git_commit  # noqa: E402
from common.run import Run  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
from csrc import ops  # noqa: E402


def upsample(x, labels):
    return F.interpolate(x, labels.shape[1:], mode="bilinear", align_corners=True)


def bce(d_logits, label):
    return F.binary_cross_entropy_with_logits(d_logits, torch.full_like(d_logits, label))


def plain_base(args, parts, batch, _):
    """One step of supervised training."""
    image, target = batch
    loss = F.cross_entropy(upsample(parts["seg"](image), target), target.long(), ignore_index=255)
    parts["opt_seg"].zero_grad()
    loss.backward()
    parts["opt_seg"].step()


def plain_semi(args, parts, batch, batch_u):
    """One step of Hung et al. 2018, section 3.3: L_semi and L_adv of unlabelled images, L_ce and L_adv, L_D."""
    (image, target), (image_u, valid_u), target = batch, batch_u, batch[1].long()
    seg, disc = parts["seg"], parts["disc"]
    parts["opt_seg"].zero_grad()
    parts["opt_disc"].zero_grad()

    disc.requires_grad_(False)
    logits_u = upsample(seg(image_u), valid_u)  # (B,K,H,W)
    d_u = upsample(disc(logits_u.softmax(1)), valid_u)  # (B,1,H,W)
    pseudo = logits_u.argmax(1)
    pseudo[d_u.detach().sigmoid()[:, 0] <= args.threshold] = 255
    loss_semi = F.cross_entropy(logits_u, pseudo, ignore_index=255)
    (args.lam_semi * loss_semi + args.lam_adv_u * bce(d_u, 1)).backward()
    logits = upsample(seg(image), target)  # (B,K,H,W)
    loss_adv = bce(upsample(disc(logits.softmax(1)), target), 1)
    (F.cross_entropy(logits, target, ignore_index=255) + args.lam_adv * loss_adv).backward()

    disc.requires_grad_(True)
    fake = torch.cat([logits.detach(), logits_u.detach()]).softmax(1)  # (2B,K,H,W)
    (bce(upsample(disc(fake), target), 0) / 2).backward()
    is_label = target != 255
    real = F.one_hot(target * is_label, logits.shape[1]).permute(0, 3, 1, 2) * is_label[:, None]
    (bce(upsample(disc(real.float()), target), 1) / 2).backward()
    parts["opt_seg"].step()
    parts["opt_disc"].step()


def time_steps(command, plain, classes, args):
    """Run a script on two synthetic batches; return [(seconds of its step, seconds of the plain step), ...]."""
    script, *words = command.split()
    module, times = importlib.import_module(script), []
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, args.batch_size, args.crop, args.crop, 3), dtype=torch.uint8, generator=g)
    image, image_u = pixels.permute(0, 1, 4, 2, 3)
    target = torch.randint(0, classes, (args.batch_size, 1, 8, 8), generator=g).float()
    target = F.interpolate(target, (args.crop, args.crop))[:, 0].to(torch.uint8)
    target[:, ::20] = 255
    batches = {"labelled": (image, target), "unlabelled": (image_u, torch.ones_like(target, dtype=torch.bool))}

    class TimedRun(Run):
        def steps(self, evaluate):
            theirs = copy.deepcopy(self.parts)  # optimisers share the copies of the networks' parameters
            for network in (theirs["seg"], theirs.get("disc", theirs["seg"])):
                for conv in network.modules():
                    conv.__class__ = torch.nn.Conv2d if isinstance(conv, torch.nn.Conv2d) else conv.__class__
            for _ in range(2 + args.rounds):  # two of warm-up
                began = perf_counter()
                yield 1
                between = perf_counter()
                plain(self.args, theirs, *batches.values())
                times.append((between - began, perf_counter() - between))

        def log(self, *_, **__):
            pass

        end_step = log

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        root = Path(folder)
        for name, mode in (("images", "RGB"), ("labels", "L")):
            (root / name).mkdir()
            for i in range(9):
                Image.new(mode, (99, 99)).save(root / name / f"{i}.png")
        (root / "classes.txt").write_text("\n".join(f"class{n}" for n in range(classes)))
        words += f"--data {root} --out {root}/out --gpu -1 --no-amp --workers 0 --init none".split()
        words += f"--backbone {args.backbone} --crop {args.crop} --batch-size {args.batch_size}".split()
        words += "--semi-start 0 --threshold 0.2 --d-smooth 0".split() if script == "train_semi" else []
        module.Run = TimedRun
        data.batches = lambda samples, name, **_: itertools.repeat(batches[name])
        module.main(module.flags().parse_args(words))
    return times[2:]


def main(args):
    cpu = re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    print(f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, ops {ops.describe()}, commit {git_commit()}; {args.backbone}, crop {args.crop}, batch "
          f"size {args.batch_size}\n\n| script | classes | ours, s | plain, s | plain / ours |\n|---|---|---|---|---|")
    for command in ("train_base", "train_semi", "train_semi --d-unlabelled"):
        for classes in args.classes:
            times = time_steps(command, plain_base if command == "train_base" else plain_semi, classes, args)
            ours, theirs = (statistics.median(column) for column in zip(*times))
            ratios = [b / a for a, b in times]
            print(f"| {command} | {classes} | {ours:.3f} | {theirs:.3f} | {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backbone", default="efficientnet_lite0")
    p.add_argument("--classes", type=int, nargs="+", default=[7, 21])
    p.add_argument("--crop", type=int, default=161)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--rounds", type=int, default=9)
    main(p.parse_args())
