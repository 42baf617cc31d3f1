"""Command lines: the parser with @file flags, the flags that all training scripts share, their defaults and checks."""
import argparse
import math
import os
import sys
from pathlib import Path

import torch

from common import distributed
from common.console import InputError

# The paper's settings, and those for its other data set.
PAPER = dict(backbone="resnet101", init="imagenet", crop=321, batch_size=10, iters=20000, lr=2.5e-4, scale=[0.5, 1.5],
             input_scale=1)
CITYSCAPES = PAPER | dict(crop=513, batch_size=2, iters=40000, scale=[1, 1], input_scale=0.5)
# Small settings, for the generated data set and for a folder of one's own without CUDA.
SHAPES = PAPER | dict(backbone="resnet18", init="none", crop=97, batch_size=4, iters=320, lr=2e-3, eval_every=160)
OWN_ON_CPU = PAPER | dict(backbone="efficientnet_lite0", batch_size=8, iters=1000, lr=2e-3)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError instead of exiting, and reads more flags from @FILE."""

    def __init__(self, description, formatter_class=argparse.RawDescriptionHelpFormatter, **more):
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter_class, **more)

    def parse_args(self, words=None, namespace=None):
        return super().parse_args([*expand_files(sys.argv[1:] if words is None else words)], namespace)

    def error(self, message):
        raise InputError(message)


def expand_files(words, folder=Path(), inside=()):
    """Yield the words, with each @FILE replaced by the words in it; text after # is a comment.

    A file named inside another one is searched beside it. An InputError if a file is unreadable or includes itself.
    """
    for word in words:
        if not word.startswith("@"):
            yield word
            continue
        file = Path(os.path.normpath(folder / word[1:]))
        if file in inside:
            raise InputError(f"{word}: {inside[-1]} includes it again; remove that line")
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{word}: {file} cannot be read ({getattr(e, 'strerror', None) or 'not text'})") from None
        yield from expand_files((w for line in lines for w in line.split("#")[0].split()), file.parent,
                                (*inside, file))


def number(kind=float, low=0, below=math.inf):
    """Return a type for add_argument: a `kind` that is at least `low` and below `below`."""
    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limits = f"at least {low}" + (f" and below {below}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value
    parse.__name__ = kind.__name__  # argparse prints it if `kind` fails
    return parse


POSITIVE_INT, NON_NEGATIVE_INT = number(int, 1), number(int)


def shared_flags(description, out):
    """Return a Parser with the flags of every training script. out: default of --out."""
    parser = Parser(description)

    p = parser.add_argument_group("data")
    p.add_argument("--data", metavar="ROOT", help="folder of a data set, or `shapes` (generated); default data/VOC2012;"
                   " network, sizes and learning rates that are not given follow from it")
    p.add_argument("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    p.add_argument("--split-seed", type=int, default=0, help="random seed of the split (default 0)")
    p.add_argument("--labelled-ids", metavar="FILE", help="list of the labelled ids, instead of --split")
    p.add_argument("--crop", type=int, help="side of training crops in pixels: stride*k+1, at least 65 (paper: 321)")
    p.add_argument("--scale", type=number(), nargs=2, metavar=("MIN", "MAX"),
                   help="range of the random scaling (default 0.5 1.5; Cityscapes 1 1)")
    p.add_argument("--input-scale", type=float, choices=[1, 0.5, 0.25], help="shrink images for the network (default "
                   "1; Cityscapes 0.5); scores are at the labels' own size")
    p.add_argument("--drop-last", action="store_true", help="drop the last, incomplete batch of each epoch")
    p.add_argument("--workers", type=NON_NEGATIVE_INT, default=2, help="worker processes of each loader (default 2)")

    p = parser.add_argument_group("network")
    p.add_argument("--backbone", choices=["resnet101", "resnet50", "resnet18", "efficientnet_lite0"],
                   help="encoder (paper: resnet101)")
    p.add_argument("--init", metavar="{imagenet,coco,none,PATH}", help="initial weights; PATH: a checkpoint, ours or a "
                   "published one (paper: imagenet)")
    p.add_argument("--norm", choices=["imagenet", "caffe", "none"], help="normalisation: ImageNet's mean and deviation,"
                   " Caffe's mean, or a range of 0..1 (default: what the initial weights expect)")
    p.add_argument("--stride", type=int, choices=[8, 16], help="output stride: 8, or 16 for efficientnet_lite0")
    p.add_argument("--aspp-branches", type=int, choices=[2, 4], default=4, help="dilated branches of the classifier "
                   "(default 4, as in the paper; the authors' code runs 2)")
    p.add_argument("--upsample", choices=["bilinear", "learned"], default="bilinear", help="upsampling of the logits; "
                   "learned: a transposed convolution (default bilinear)")
    p.add_argument("--bn", choices=["train", "no-grad", "frozen"], default="train", help="batch norm: no-grad keeps "
                   "weight and bias fixed, frozen the running statistics too (default train)")

    p = parser.add_argument_group("optimisation")
    p.add_argument("--iters", type=POSITIVE_INT, help="training steps (paper: 20000)")
    p.add_argument("--batch-size", type=POSITIVE_INT, help="images per step, over all ranks (paper: 10)")
    p.add_argument("--lr", type=number(), help="initial learning rate of the backbone (paper: 2.5e-4)")
    p.add_argument("--head-lr", type=number(), default=10, metavar="FACTOR", help="learning rate of the classifier "
                   "as a multiple of --lr (default 10, as in the authors' code)")
    p.add_argument("--decay-every", type=NON_NEGATIVE_INT, default=1, metavar="STEPS", help="steps between updates of "
                   "the learning rates (default 1; 0: constant)")
    p.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=True, help="Nesterov momentum (paper)")
    p.add_argument("--weight-decay", type=number(), default=1e-4, help="weight decay (default 1e-4, as in the paper)")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks: slow start, faster steps")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: if that is faster)")

    p = parser.add_argument_group("run")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    p.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="random seed (default 0)")
    p.add_argument("--out", default=out, metavar="DIR", help=f"output folder (default {out})")
    p.add_argument("--resume", action="store_true", help="continue from DIR/last.pt if it exists")
    p.add_argument("--tensorboard", action="store_true", help="also write scalars and images to DIR/tensorboard")
    p.add_argument("--log-every", type=POSITIVE_INT, default=10, help="steps between log lines (default 10)")
    p.add_argument("--eval-every", type=POSITIVE_INT, help="steps between evaluations (default --iters / 10)")
    p.add_argument("--save-every", type=POSITIVE_INT, help="steps between checkpoints (default --iters / 10)")
    return parser


def resolve_args(args, dataset, start_format, paper=None, small=None):
    """Fill in the flags that were not given, in place, then validate all; an InputError if they do not fit together.

    Args:
        dataset: a layouts.Dataset; its `kind` selects the defaults.
        start_format: function (value of --init) -> {flag: default} of what these weights expect.
        paper, small: {flag: default} of the script's own flags: the paper's, and those for small data (`shapes`, and a
            folder of one's own without CUDA).
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    own_on_cpu = dataset.kind == "own" and (args.gpu < 0 or not torch.cuda.is_available())
    if own_on_cpu:
        defaults = own_defaults(dataset, given)
    else:
        defaults = {"shapes": SHAPES, "cityscapes": CITYSCAPES}.get(dataset.kind, PAPER)
    own = small if own_on_cpu or dataset.kind == "shapes" else paper
    values = defaults | (own or {}) | given
    tenth = max(1, values["iters"] // 10)
    stride = 16 if values["backbone"] == "efficientnet_lite0" else 8
    expected = start_format(values["init"])
    values = {"stride": stride, "eval_every": tenth, "save_every": tenth} | expected | values
    vars(args).update({name: values.get(name) for name in vars(args) | expected})
    check_args(args)


def own_defaults(dataset, given):
    """Return defaults for a folder of one's own without CUDA, and name them in the data set's note.

    The median of the images' sizes decides: images are halved if their longer side is above 320 pixels and quartered
    above 640; crops are as large as the shorter side allows, at most 161.
    """
    short, long = dataset.median_size()
    scale = given.get("input_scale") or next((x for x in (1, 0.5) if long * x <= 320), 0.25)
    crop = 16 * max(4, min(10, int(short * scale) // 16)) + 1
    defaults = OWN_ON_CPU | dict(crop=crop, input_scale=scale)
    chosen = [f"--{name.replace('_', '-')} {value}" for name, value in defaults.items()
              if name not in given and value != PAPER[name]]
    if chosen:
        dataset.note += (f"no CUDA, so small settings: {' '.join(chosen)} (the paper's: recipes/paper_voc_base.txt); ")
    return defaults


def check_args(args):
    """Raise an InputError for shared flags whose values do not fit together."""
    if args.scale[0] > args.scale[1] or not args.scale[0]:
        raise InputError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: it is MIN MAX with 0 < MIN <= MAX")
    if args.stride == 16 and args.backbone != "efficientnet_lite0":
        raise InputError(f"--stride 16: {args.backbone} has 8; leave it out, or use --backbone efficientnet_lite0")
    if args.crop < 65 or (args.crop - 1) % args.stride:
        best = max(math.ceil(64 / args.stride), round((args.crop - 1) / args.stride)) * args.stride + 1
        raise InputError(f"--crop {args.crop}: it must be {args.stride}*k+1 and at least 65; the nearest is {best}")
    check_multiple(args.batch_size, distributed.WORLD_SIZE)


def check_multiple(batch_size, count):
    """Raise an InputError if a batch cannot be divided evenly among the ranks. count: what it must be a multiple of."""
    if batch_size % count:
        raise InputError(f"--batch-size {batch_size}: {distributed.WORLD_SIZE} ranks share it; make it a multiple of "
                         f"{count}")
