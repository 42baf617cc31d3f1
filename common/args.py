"""Command lines: the parser with @file flags, the flags that all training scripts share, their defaults and checks."""
import argparse
import math
import os
import sys
from pathlib import Path

from common import distributed
from common.console import InputError
from common.layouts import read_lines

import torch

# The paper's settings, and those for its other data set.
PAPER = dict(backbone="resnet101", init="imagenet", crop=321, batch_size=10, iters=20000, lr=2.5e-4, scale=[0.5, 1.5],
             input_scale=1, head_lr=10, class_weights="none", bn="train")
CITYSCAPES = PAPER | dict(crop=513, batch_size=2, iters=40000, scale=[1, 1], input_scale=0.5)
# Small settings, for the generated data set and for a custom data set on the CPU.
SHAPES = PAPER | dict(backbone="efficientnet_lite0", bn="frozen", crop=97, scale=[0.75, 1.5],
                      batch_size=4, iters=300, lr=2e-3, head_lr=1, eval_every=150)
CUSTOM_ON_CPU = PAPER | dict(backbone="efficientnet_lite0", batch_size=8, iters=1000, lr=2e-3, class_weights="balanced")

EPILOG = """@FILE reads more flags from a file (see recipes/README.md); later flags override earlier ones.
A value marked "paper" is the default, except for small data: `shapes`, and on the CPU a data set with classes.txt.
OUT/run.json lists the values used."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError instead of exiting, and reads more flags from @FILE."""

    def __init__(self, description, formatter_class=argparse.RawDescriptionHelpFormatter, **more):
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter_class, **more)

    def parse_args(self, words=None, namespace=None):
        return super().parse_args([*expand_files(sys.argv[1:] if words is None else words)], namespace)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def expand_files(words, folder=Path()):
    """Yield the words, each @FILE replaced by the words in that file, in which # begins a comment.

    An @FILE in a file is relative to that file, other paths are relative to the working directory.
    """
    for word in words:
        if word.startswith("@"):
            file = folder / word[1:]
            yield from expand_files(" ".join(line.split("#")[0] for line in read_lines(file)).split(), file.parent)
        else:
            yield word


def number(kind=float, low=0, below=math.inf, high=math.inf):
    """Return a type for add_argument: a `kind` that is at least `low`, at most `high`, and below `below`."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < below):
            limits = f"at least {low}", f"at most {high}" * (high < math.inf), f"below {below}" * (below < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(filter(None, limits))}")
        return value
    parse.__name__ = kind.__name__  # argparse prints it if `kind` fails
    return parse


POSITIVE_INT, NON_NEGATIVE_INT, PROBABILITY = number(int, 1), number(int), number(high=1)


def shared_flags(description, out):
    """Return a Parser with the flags of every training script. out: default of --out."""
    parser = Parser(description, epilog=EPILOG)

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="ROOT", help="folder of a data set, or `shapes`, which is generated (default data/VOC2012 if "
        "it is there, else shapes)")
    add("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    add("--split-seed", type=int, default=0, help="random seed of the split (default 0)")
    add("--labelled-ids", metavar="FILE", help="file of the labelled ids, one a line, instead of --split")
    add("--crop", type=int, help="side of the square training crops in pixels: stride*k+1, at least 65 (paper: 321, "
        "Cityscapes 513; shapes: 97; other small data: 65 to 161); lower it if memory runs out")
    add("--scale", type=number(), nargs=2, metavar=("MIN", "MAX"), help="range of the random scaling of crops, on top "
        "of --input-scale (paper: 0.5 1.5; Cityscapes 1 1; shapes 0.75 1.5)")
    add("--input-scale", type=float, choices=[1, 0.5, 0.25], help="factor by which images are shrunk for the network, "
        "in training and evaluation (default 1; Cityscapes 0.5)")
    add("--workers", type=NON_NEGATIVE_INT, help="worker processes of each loader (default 2; with a GPU up to 8, as "
        "many as there are CPUs for)")

    add = parser.add_argument_group("network").add_argument
    add("--backbone", metavar="NAME", help="resnet18, 50 or 101, efficientnet_lite0, 1 or 2, or a name of "
        "timm.list_models() (paper: resnet101; small data: efficientnet_lite0)")
    add("--freeze-backbone", action="store_true", help="train the classifier only; the backbone keeps its initial "
        "weights and running statistics")
    add("--init", metavar="{imagenet,coco,none,PATH}", help="initial weights: imagenet (what timm calls pretrained: "
        "downloaded, or from pip for efficientnet_lite0, 1, 2), coco (a file in data/, see recipes/README.md), none "
        "(random), or a file: a checkpoint, or weights of the backbone (default imagenet, paper)")
    add("--norm", choices=["imagenet", "caffe", "none"], help="normalisation of images: imagenet (mean and deviation "
        "of RGB that timm names for the backbone), caffe (mean of BGR), none (0..255) (default: what the initial "
        "weights expect)")
    add("--stride", type=POSITIVE_INT, help="output stride of the network in pixels: 8, 16 or 32 if the backbone can "
        "have it (default: ResNets 8; transformers the size of a patch; others 16 if they can)")
    add("--aspp-branches", type=int, choices=[2, 4], default=4, help="dilated convolutions of the classifier (default "
        "4, paper; 2 for the authors' checkpoints)")
    add("--bn", choices=["train", "no-grad", "frozen"], help="batch norm: no-grad keeps weight and "
        "bias fixed; frozen the running statistics too, for batches of a few images (default train; shapes: frozen"
        " if pretrained)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--iters", type=POSITIVE_INT, help="training steps (paper: 20000, Cityscapes 40000; shapes: 300; other small "
        "data: 1000)")
    add("--batch-size", type=POSITIVE_INT, help="images per step, over all ranks (paper: 10, Cityscapes 2; small data: "
        "8, shapes 4)")
    add("--lr", type=number(), help="initial learning rate of the backbone (paper: 2.5e-4; small data: 2e-3)")
    add("--head-lr", type=number(), metavar="FACTOR", help="learning rate of the classifier as a multiple "
        "of --lr (default 10, as in the authors' code; the paper has one rate; shapes: 1)")
    add("--decay-every", type=NON_NEGATIVE_INT, default=1, metavar="N", help="steps between updates of the poly "
        "learning rate; 0 keeps it constant (default 1)")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=True, help="Nesterov momentum (default on, paper)")
    add("--class-weights", metavar="{none,balanced,FILE}", help="weights of the classes in loss_ce: balanced (1 / sqrt "
        "of the class's fraction of the labelled pixels, for rare classes), or a file with a line `name weight` for "
        "each class (default none; on the CPU, for a data set with classes.txt: balanced)")
    add("--weight-decay", type=number(), default=1e-4, help="weight decay (default 1e-4, paper)")
    add("--compile", action="store_true", help="torch.compile the networks: slow start, faster steps")
    add("--amp", action=argparse.BooleanOptionalAction, help="train in bfloat16 (default: yes on CUDA devices that "
        "support it and for ResNets on CPUs with AMX, else no)")

    add = parser.add_argument_group("run").add_argument
    add("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU; under torchrun each rank uses its "
        "own device")
    add("--seed", type=number(int, 0, 2**63), default=0, help="random seed (default 0)")
    add("--out", default=out, metavar="DIR", help=f"output folder (default {out})")
    add("--resume", action="store_true", help="continue from DIR/last.pt if it exists")
    add("--tensorboard", action="store_true", help="also write scalars and images to DIR/tensorboard")
    add("--log-every", type=POSITIVE_INT, default=10, help="steps between log lines (default 10)")
    add("--eval-every", type=POSITIVE_INT, help="steps between evaluations (default --iters / 10; shapes: 150)")
    add("--save-every", type=POSITIVE_INT, help="steps between checkpoints (default --iters / 10)")
    return parser


def resolve_args(args, dataset, network_defaults, paper=None, small=None, shapes=None, loaders=1):
    """Apply the data set's defaults to the flags that were not given, then validate all flags. Raises InputError.

    network_defaults: function (init, backbone, stride or None) -> {flag: default} of what these expect, `stride` among
    them. paper: {flag: default} of the script's own flags; small: those that differ for `shapes` and for a custom data
    set on the CPU; shapes: those that differ for `shapes` alone. loaders: how many loaders the script has at once.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    on_cpu = args.gpu < 0 or not torch.cuda.is_available()
    custom_on_cpu, is_shapes = dataset.kind == "custom" and on_cpu, dataset.kind == "shapes"
    defaults = CUSTOM_ON_CPU if custom_on_cpu else {"shapes": SHAPES, "cityscapes": CITYSCAPES}.get(dataset.kind, PAPER)
    init, backbone = (given.get(name, defaults[name]) for name in ("init", "backbone"))
    network = network_defaults(init, backbone, given.get("stride"))
    defaults = custom_defaults(dataset, given, network["stride"]) if custom_on_cpu else defaults | {
        "crop": nearest_crop(defaults["crop"], network["stride"])}
    for applies, of_script in ((True, paper), (custom_on_cpu or is_shapes, small), (is_shapes, shapes)):
        defaults = defaults | of_script if applies and of_script else defaults
    values = defaults | ({"bn": "train"} if given.get("init") == "none" else {}) | given  # no statistics to keep
    tenth = max(1, values["iters"] // 10)
    workers = 2 if on_cpu else max(1, min(8, num_cpus() // loaders // distributed.RANKS_HERE))
    values = {"eval_every": tenth, "save_every": tenth, "workers": workers} | network | values
    vars(args).update({name: values.get(name) for name in vars(args) | network})
    check_args(args)
    if dataset.kind == "custom" and (side := dataset.median_size()[0]) * args.input_scale < args.stride:
        raise InputError(f"{dataset.root}: half of the images have a side of {side} pixels or less, at --input-scale "
                         f"{args.input_scale:g} less than --stride {args.stride} of the network; enlarge them")


def num_cpus():
    """Return the number of CPUs that this process may use: a scheduler or container may give it few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def custom_defaults(dataset, given, stride):
    """Return defaults for a custom data set on the CPU, and name them in the data set's note."""
    # images are shrunk to at most 320 pixels; crops are as large as the shorter side allows, at most 161
    short, long = dataset.median_size()
    scale = given.get("input_scale") or next((x for x in (1, 0.5) if long * x <= 320), 0.25)
    cells = max(math.ceil(64 / stride), min(160, int(short * scale)) // stride)
    defaults = CUSTOM_ON_CPU | dict(crop=stride * cells + 1, input_scale=scale)
    chosen = [f"--{name.replace('_', '-')} {value}" for name, value in defaults.items()
              if name not in given and value != PAPER[name]]
    if chosen:
        dataset.note += (f"on the CPU, small settings: {' '.join(chosen)} (the paper's: recipes/paper_voc_base.txt); ")
    return defaults


def check_args(args):
    """Raise an InputError for shared flags whose values do not fit together."""
    if args.scale[0] > args.scale[1] or not args.scale[0]:
        raise InputError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: it is MIN MAX with 0 < MIN <= MAX")
    if args.crop != (best := nearest_crop(args.crop, args.stride)):
        raise InputError(f"--crop {args.crop}: it must be {args.stride}*k+1 and at least 65; the nearest is {best}")
    if args.bn == "frozen" and args.init == "none":
        raise InputError("--bn frozen: random weights (--init none) have no statistics to keep; use --bn train")
    check_multiple(args.batch_size, distributed.WORLD_SIZE)


def nearest_crop(crop, stride):
    """Return the side nearest to `crop` that a network of this output stride can have: stride*k+1, at least 65."""
    return max(math.ceil(64 / stride), round((crop - 1) / stride)) * stride + 1


def check_multiple(batch_size, count, why="ranks"):
    """Raise InputError, which gives `why`, if the batch size is not a multiple of `count`."""
    if batch_size % count:
        raise InputError(f"--batch-size {batch_size}: must be a multiple of {count}, the number of {why}")
