"""Supervised baseline: DeepLabv2 on the labelled part of a data set.

    python train_base.py --data shapes --split 0.125
"""
import cli
import common
import data
import model
import parallel
from csrc import ops
from eval import evaluate
from flags import shared_flags


def flags():
    return shared_flags(__doc__, out="out/base")


def main(args):
    dataset = data.open_data(args.data)
    labelled, _ = data.split_ids(dataset.train_ids(), args.split, args.split_seed, args.labelled_ids)
    train, val = dataset.samples(labelled), dataset.samples(dataset.ids("val"))
    common.settle(args, dataset, labelled)
    run = common.Run(args, dataset, labelled)
    device, num_classes, done = run.device, len(dataset.classes), run.done  # done: updates so far
    labelled_batches = data.batches(train, "labelled", args, done, device)  # workers start now, with no nets to copy

    seg = parallel.ready(model.new_segmenter(args, num_classes), device, args)
    opt_seg = model.seg_optimizer(seg, args)
    run.resume(seg=seg, opt_seg=opt_seg)
    seg_ddp = parallel.ddp(seg)  # the same net; its gradients are means over all processes

    def scores():
        return evaluate(seg, val, args, device)[0]

    seg.train()
    if run.to_evaluate(done):  # a score that a signal broke off, or that of a run that had ended
        run.save(done, scores())
    for step in run.steps(done):
        common.poly_lr(opt_seg, step - 1, args)
        picture, target = next(labelled_batches)  # (B,3,H,W), (B,H,W) uint8

        with model.autocast(args.amp, device, args.backbone):
            logits = seg_ddp(seg.normalise(picture))  # (B,K,h,w)
        loss_ce = parallel.mean(*ops.masked_cross_entropy(logits, target))

        opt_seg.zero_grad()
        loss_ce.backward()
        opt_seg.step()

        run.log(step, loss_ce=loss_ce, lr=opt_seg.param_groups[0]["lr"])
        if run.to_evaluate(step) or run.to_save(step):
            run.save(step, scores() if run.to_evaluate(step) else None)


if __name__ == "__main__":
    cli.launch(main, flags)
