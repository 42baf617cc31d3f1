"""Supervised baseline: DeepLabv2 trained on the labelled part of a data set.

    python train_base.py --data shapes --split 0.1
"""
from common import distributed
from common.args import resolve_args, shared_flags
from common.console import launch
from common.layouts import open_dataset
from common.run import Run

import data
import model
from csrc import ops
from eval import evaluate


def flags():
    return shared_flags(__doc__, out="out/base")


def main(args):
    dataset = open_dataset(args.data)
    labelled, _, val = dataset.split(args.split, args.split_seed, args.labelled_ids)
    resolve_args(args, dataset, model.network_defaults)
    run = Run(__file__, args, dataset, labelled, ops.describe)
    pixels = data.inspect_labels(labelled, dataset, args.workers)  # (K,)
    weight = model.class_weights(args.class_weights, pixels, dataset.classes, run.device)  # (K,) or None
    labelled_batches = data.batches(labelled, "labelled", **run.loader_args)  # fork workers before networks exist

    seg_raw = model.create_segmenter(dataset.classes, dataset.palette, args.backbone, args.init, args.stride, args.bn,
                                     args.norm, args.aspp_branches, args.input_scale,
                                     args.freeze_backbone).to(run.device)
    opt_seg = model.seg_optimizer(seg_raw, args.lr, args.head_lr, args.nesterov, args.weight_decay)
    run.resume(seg=seg_raw, opt_seg=opt_seg)
    seg = distributed.prepare_model(seg_raw, args.compile)

    for step in run.steps(lambda: evaluate(seg_raw, val, args.workers, args.amp)):
        model.set_poly_lr(step, args.iters, args.decay_every, opt_seg)
        image, target = next(labelled_batches)  # (B,3,H,W) uint8, (B,H,W) uint8

        with model.autocast(seg_raw, args.amp):
            logits = seg(image)  # (B,K,h,w)
        loss_ce = model.cross_entropy(logits, target, weight)

        opt_seg.zero_grad()
        loss_ce.backward()
        opt_seg.step()

        run.log(step, loss_ce=loss_ce, lr=opt_seg.param_groups[0]["lr"])
        run.end_step(step)


if __name__ == "__main__":
    launch(main, flags)
