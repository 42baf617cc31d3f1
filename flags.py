"""The flags that all trainings share, and the checks of a flag's value."""
import argparse
import math

from cli import InputError, Parser, Recipes


def number(kind=float, low=0, below=math.inf):
    """A type for add_argument: a `kind` of at least `low` and below `below`."""
    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limits = f"at least {low}" + (f" and below {below}" if below < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value
    parse.__name__ = kind.__name__  # which argparse names where `kind` fails
    return parse


COUNT, WHOLE = number(int, 1), number(int)


def shared_flags(description, out):
    """A cli.Parser with the flags of every training; the script adds those of its own idea. `out`: --out's default."""
    parser = Parser(description)

    p = parser.add_argument_group("data")
    p.add_argument("--data", metavar="ROOT", help="folder in VOC or another known layout, or shapes (generated); "
                   "default data/VOC2012. Net, sizes and rates follow it where they are not given")
    p.add_argument("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    p.add_argument("--split-seed", type=int, default=0, help="which pictures are labelled (default 0)")
    p.add_argument("--labelled-ids", metavar="FILE", help="a published list of labelled ids instead of --split")
    p.add_argument("--crop", type=int, help="side of a crop in pixels: stride*k+1, at least 65 (paper: 321)")
    p.add_argument("--scale", type=number(), nargs=2, metavar=("MIN", "MAX"),
                   help="random scale of pictures (default 0.5 1.5; Cityscapes 1 1)")
    p.add_argument("--input-scale", type=float, choices=[1, 0.5, 0.25], help="shrink pictures by this for the net "
                   "(default 1; Cityscapes 0.5); scores stay at the labels' own size")
    p.add_argument("--drop-last", action="store_true", help="leave out what does not fill a batch at an epoch's end")
    p.add_argument("--workers", type=WHOLE, default=2, help="loader processes a stream (default 2); 0: no others")

    p = parser.add_argument_group("net")
    p.add_argument("--backbone", choices=["resnet101", "resnet50", "resnet18", "efficientnet_lite0"],
                   help="paper: resnet101")
    p.add_argument("--init", metavar="{imagenet,coco,none,PATH}", help="start weights; PATH: a checkpoint, or a "
                   "file of either public implementation (paper: imagenet)")
    p.add_argument("--norm", choices=["imagenet", "caffe", "none"], help="pixels: by ImageNet's mean and deviation, "
                   "minus its mean in 0..255, or 0..1; default: as the start weights want them")
    p.add_argument("--stride", type=int, choices=[8, 16], help="pixels a logit: 8, or 16 with efficientnet_lite0, its "
                   "default (paper: 8)")
    p.add_argument("--aspp-branches", type=int, choices=[2, 4], default=4, help="of the classifier (paper: 4; the "
                   "authors' code runs 2)")
    p.add_argument("--upsample", choices=["bilinear", "learned"], default="bilinear", help="of the logits; learned: a "
                   "transposed convolution that starts as bilinear")
    p.add_argument("--bn", choices=["train", "no-grad", "frozen"], default="train", help="batch norm: no-grad keeps "
                   "its weight and bias, frozen its statistics as well")

    p = parser.add_argument_group("optimisation")
    p.add_argument("--iters", type=COUNT, help="training steps (paper: 20000)")
    p.add_argument("--batch-size", type=COUNT, help="pictures a step, over all processes (paper: 10)")
    p.add_argument("--lr", type=number(), help="first rate of the backbone, poly decay (paper: 2.5e-4)")
    p.add_argument("--head-lr", type=number(), default=10, metavar="TIMES", help="the classifier's rate in --lr's "
                   "(default 10, as in the authors' code; 1: one rate)")
    p.add_argument("--decay-every", type=WHOLE, default=1, metavar="STEPS", help="steps between updates of the rates "
                   "(default 1); 0: they stay")
    p.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=True, help="SGD's momentum (paper: on)")
    p.add_argument("--weight-decay", type=number(), default=1e-4, help="of the segmentation net (paper: 1e-4)")
    p.add_argument("--compile", action="store_true", help="torch.compile the nets: minutes at the start, faster steps")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 for all nets or none; default: where "
                   "it is faster")

    p = parser.add_argument_group("run")
    p.add_argument("--recipes", action=Recipes, help="list the experiments in recipes/ with published numbers and stop")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    p.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="of first weights and every draw (default 0)")
    p.add_argument("--out", default=out, metavar="DIR", help="where log, checkpoints and flags are written")
    p.add_argument("--resume", action="store_true", help="go on from DIR/last.pt where there is one")
    p.add_argument("--tensorboard", action="store_true", help="write figures and pictures to DIR/tensorboard too")
    p.add_argument("--log-every", type=COUNT, default=10, help="steps between log lines (default 10)")
    p.add_argument("--eval-every", type=COUNT, help="steps between evaluations; default --iters / 10, shapes 160")
    p.add_argument("--save-every", type=COUNT, help="steps between checkpoints; default --iters / 10")
    return parser


def disc_flags(parser):
    """Add the flags of the discriminator D, which train_adv.py and train_semi.py have -> the parser."""
    p = parser.add_argument_group("discriminator")
    p.add_argument("--d-input", choices=["soft", "hard", "luc"], default="soft", help="what D sees: probabilities and "
                   "one-hot labels (paper); hard: predictions one-hot as well; luc: labels as soft as predictions")
    p.add_argument("--d-target", choices=["real", "right"], default="real", help="what D answers: whether a map is a "
                   "label map (paper), or whether a pixel's prediction is right")
    p.add_argument("--d-optim", choices=["adam", "sgd"], default="adam", help="optimiser of D (paper: adam)")
    p.add_argument("--d-lr", type=number(), help="first rate of D, poly decay (paper: 1e-4)")
    p.add_argument("--d-betas", type=number(below=1), nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"),
                   help="of D's Adam (default: the paper's 0.9 0.999; the authors' code: 0.9 0.99)")
    p.add_argument("--d-momentum", type=number(below=1), default=0.5, help="of D's SGD (default 0.5)")
    p.add_argument("--d-decay", type=number(), help="weight decay of D; default 0 for Adam, 1e-4 for SGD")
    p.add_argument("--d-smooth", type=number(below=1), help="label maps are taught as 1 minus this (paper: 0)")
    return parser


def check(args):
    """Errors: InputError for values that do not go together, once all are filled in."""
    if getattr(args, "d_unlabelled", False) and args.d_target == "right":
        raise InputError("--d-unlabelled: what is right is known of labelled pictures only; drop --d-target right")
    if getattr(args, "trust", None) is not None and (args.threshold or not 0 < args.trust <= 1):
        raise InputError(f"--trust {args.trust:g}: it is a share above 0 and at most 1, and replaces --threshold")
    if args.scale[0] > args.scale[1] or not args.scale[0]:
        raise InputError(f"--scale {args.scale[0]:g} {args.scale[1]:g}: it is MIN MAX with 0 < MIN <= MAX")
    if args.stride == 16 and args.backbone != "efficientnet_lite0":
        raise InputError(f"--stride 16: {args.backbone} has 8; leave it out, or take --backbone efficientnet_lite0")
    if args.crop < 65 or (args.crop - 1) % args.stride:
        best = max(math.ceil(64 / args.stride), round((args.crop - 1) / args.stride)) * args.stride + 1
        raise InputError(f"--crop {args.crop}: it must be {args.stride}*k+1 and at least 65; the nearest is {best}")
