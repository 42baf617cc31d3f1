"""Supervised baseline: DeepLabv2 on the labelled part of a data set.

    python train_base.py --data shapes --split 0.125
"""
import argparse

import cli
import common
import data
import model
import parallel
from csrc import ops
from eval import evaluate


def flags():
    p = cli.Parser(__doc__)
    # data
    p.add_argument("--data", metavar="ROOT", help="folder in VOC layout, or shapes (generated); default data/VOC2012. "
                   "Net, sizes and rates follow it where they are not given")
    p.add_argument("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    p.add_argument("--split-seed", type=int, default=0, help="which pictures are labelled (default 0)")
    p.add_argument("--labelled-ids", metavar="FILE", help="a published list of labelled ids instead of --split")
    p.add_argument("--crop", type=int, help="side of a crop in pixels: stride*k+1, at least 65 (paper: 321)")
    p.add_argument("--scale", type=float, nargs=2, metavar=("MIN", "MAX"),
                   help="random scale of pictures (default 0.5 1.5; Cityscapes 1 1)")
    p.add_argument("--input-scale", type=float, help="shrink pictures by this for the net: 1 (default), 0.5 "
                   "(Cityscapes' default) or 0.25; scores stay at the labels' own size")
    p.add_argument("--drop-last", action="store_true", help="leave out what does not fill a batch at the end of an epoch")
    p.add_argument("--workers", type=int, default=2, help="loader processes a stream (default 2); 0 loads in the script itself")
    # net
    p.add_argument("--backbone", choices=["resnet101", "resnet50", "resnet18", "efficientnet_lite0"], help="paper: resnet101")
    p.add_argument("--init", metavar="{imagenet,coco,none,PATH}", help="start weights; PATH: a checkpoint, or "
                   "a file of either public implementation (paper: imagenet)")
    p.add_argument("--norm", choices=["imagenet", "caffe", "none"], help="pixels: by ImageNet's mean and deviation, "
                   "minus its mean in 0..255, or 0..1; default: as the start weights want them")
    p.add_argument("--stride", type=int, help="pixels a logit: 8, or 16 for efficientnet_lite0 (paper: 8)")
    p.add_argument("--aspp-branches", type=int, choices=[2, 4], default=4, help="of the classifier (paper: 4; the "
                   "authors' code runs 2)")
    p.add_argument("--upsample", choices=["bilinear", "learned"], default="bilinear", help="of the logits; learned: a "
                   "transposed convolution that starts as bilinear")
    p.add_argument("--bn", choices=["train", "no-grad", "frozen"], default="train", help="batch norm: no-grad keeps its "
                   "weight and bias, frozen its statistics as well")
    # optimisation
    p.add_argument("--iters", type=int, help="training steps (paper: 20000)")
    p.add_argument("--batch-size", type=int, help="pictures a step, over all processes (paper: 10)")
    p.add_argument("--lr", type=float, help="first rate of the backbone, poly decay (paper: 2.5e-4)")
    p.add_argument("--head-lr", type=float, default=10, metavar="TIMES", help="the classifier's rate in --lr's (default "
                   "10, as in the authors' code; 1: one rate)")
    p.add_argument("--decay-every", type=int, default=1, metavar="STEPS", help="steps between updates of the rates (default "
                   "1); 0: they stay")
    p.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=True, help="momentum (paper: Nesterov's)")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="of the segmentation net (paper: 1e-4)")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="go through a batch in N pieces one after the other: "
                   "less memory; each piece's losses are means of their own (default 1)")
    p.add_argument("--compile", action="store_true", help="torch.compile the nets: minutes at the start, faster steps")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 for all nets or none; default: where faster")
    # run
    p.add_argument("--recipes", action=cli.Recipes, help="print the experiments in recipes/ and what was published, and stop")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    p.add_argument("--seed", type=int, default=0, help="of first weights and of every random draw (default 0)")
    p.add_argument("--out", default="out/base", metavar="DIR", help="where log, checkpoints and flags are written")
    p.add_argument("--resume", action="store_true", help="go on from DIR/last.pt where there is one")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines (default 10)")
    p.add_argument("--eval-every", type=int, help="steps between evaluations; default --iters / 10, shapes 160")
    p.add_argument("--save-every", type=int, help="steps between checkpoints; default a tenth of --iters")
    return p


def main(args):
    dataset, note = data.open_data(args.data)
    data.settle(args, dataset.defaults)
    labelled, _ = data.split_ids(dataset.train_ids(), args.split, args.split_seed, args.labelled_ids)
    labelled_samples, val = dataset.samples(labelled), dataset.samples(dataset.ids("val"))
    run = common.Run(args, dataset, note, labelled)
    device, num_classes = run.device, len(dataset.classes)

    seg = parallel.ready(model.new_segmenter(args, num_classes), device, args)
    opt_seg = model.seg_optimizer(seg, args)
    parts = {"seg": seg, "opt_seg": opt_seg}
    done = parallel.same_start(run.resume(**parts))
    seg_ddp = parallel.ddp(seg)  # the same net, but its gradients are those of all processes

    stream = data.Stream(labelled_samples, args, "labelled")
    labelled_batches = data.batches(stream, args, done, device)
    seg.train()
    for step in run.steps(done):
        if run.due(step - 1):
            run.score(step - 1, evaluate, val, parts)
        common.poly_lr(opt_seg, step - 1, args)
        opt_seg.zero_grad()
        for _ in parallel.pieces(args.accumulate, seg_ddp):
            picture, target = (t.to(device, non_blocking=True) for t in next(labelled_batches))  # (B,3,H,W), (B,H,W) uint8
            valid = target != data.IGNORE  # (B,H,W)
            part = parallel.share(valid.sum(), args)  # what the mean over these pixels weighs

            with model.autocast(args.amp, device, args.backbone):
                logits = seg_ddp(seg.normalise(picture))  # (B,K,h,w)
            loss_ce = part * ops.masked_cross_entropy(logits, target)[0]
            loss_ce.backward()
            run.add(loss_ce=loss_ce)
        opt_seg.step()

        run.report(step, lr=opt_seg.param_groups[0]["lr"])
        if run.to_save(step):
            run.save(step, parts)
    run.score(args.iters, evaluate, val, parts)


if __name__ == "__main__":
    cli.launch(main, flags)
