"""Weak to strong: train_base.py plus the unlabelled pictures, where a teacher tells a strong view what it is.

    python train_match.py --data shapes --split 0.125
"""
import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import cli
import common
import data
import model
import parallel
from csrc import ops
from eval import evaluate
from flags import number, shared_flags


def flags():
    p = shared_flags(__doc__, out="out/match")
    p.add_argument("--unlabelled", metavar="DIR", help="a folder of more pictures without labels, at any depth")
    p.add_argument("--ema", type=number(below=1), default=0.99, help="what a step leaves of the teacher (default 0.99)")
    p.add_argument("--confidence", type=number(), default=0.8, help="a pixel is taught where the teacher's probability "
                   "is above this times (its class's mean / the surest class's mean), as in FreeMatch (default 0.8)")
    p.add_argument("--cutmix", type=number(), default=0.5, help="share with a box of another (default 0.5; 0 if short)")
    p.add_argument("--lam-u", type=number(), default=2, help="weight of the loss on unlabelled pictures (default 2)")
    p.add_argument("--u-start", type=number(int), help="steps before that loss (default --iters / 8)")
    return p


def main(args):
    dataset = data.open_data(args.data)
    labelled, unlabelled = data.split_ids(dataset.train_ids(), args.split, args.split_seed, args.labelled_ids)
    train, val = dataset.samples(labelled), dataset.samples(dataset.ids("val"))
    train_u = dataset.samples(unlabelled, labels=False)
    train_u += data.folder_pictures(args.unlabelled, train + val + train_u)
    common.settle(args, dataset, labelled)
    run = common.Run(args, dataset, labelled)
    device, num_classes, done = run.device, len(dataset.classes), run.done  # done: updates so far
    labelled_batches = data.batches(train, "labelled", args, done, device)  # workers start now, with no nets to copy
    unlabelled_batches = data.batches(train_u, "unlabelled", args, done, device)

    seg = parallel.ready(model.new_segmenter(args, num_classes), device, args)
    teacher = parallel.ready(copy.deepcopy(seg), device, args).train()
    ema_update = get_ema_multi_avg_fn(args.ema)  # moves the teacher's weights towards those of seg, the student
    opt_seg = model.seg_optimizer(seg, args)
    run.resume(seg=teacher, student=seg, opt_seg=opt_seg)
    seg_ddp = parallel.ddp(seg)  # the same net; its gradients are means over all processes

    def scores():
        return evaluate(teacher, val, args, device)[0]

    seg.train()
    if run.to_evaluate(done):  # a score that a signal broke off, or that of a run that had ended
        run.save(done, scores())
    for step in run.steps(done):
        common.poly_lr(opt_seg, step - 1, args)
        picture, target = next(labelled_batches)  # (B,3,H,W), (B,H,W) uint8
        picture_u, valid_u = next(unlabelled_batches)  # (B,3,H,W) uint8, (B,H,W) bool

        with model.autocast(args.amp, device, args.backbone):
            logits = seg_ddp(seg.normalise(picture))  # (B,K,h,w)
            with torch.no_grad(), teacher.same_statistics():
                logits_w = teacher(teacher.normalise(picture_u))  # (B,K,h,w), of the weak view
            limits = args.confidence * model.class_confidence(logits_w, valid_u)  # (K,)
            taught = ops.pseudo_labels(logits_w, valid_u.shape[1:], limits, valid_u)  # (B,H,W) uint8
            picture_s = data.strong_view(picture_u, args, step)
            picture_s, taught, valid_u = data.cut_mix((picture_s, taught, valid_u), args, step)
            with seg.same_statistics():  # batch norm's are of labelled pictures
                logits_s = seg_ddp(seg.normalise(picture_s))  # (B,K,h,w)
        loss_ce = parallel.mean(*ops.masked_cross_entropy(logits, target))
        loss_u, kept = ops.masked_cross_entropy(logits_s, taught)
        n = valid_u.sum()
        loss_u, share = parallel.mean(loss_u * kept / n, n), parallel.mean(kept / n, n)
        loss = loss_ce + (args.lam_u if step > args.u_start else 0) * loss_u

        opt_seg.zero_grad()
        loss.backward()
        opt_seg.step()
        ema_update([*teacher.parameters()], [*seg.parameters()], None)
        for of_teacher, of_student in zip(teacher.buffers(), seg.buffers()):
            of_teacher.copy_(of_student)

        run.log(step, loss_ce=loss_ce, loss_u=loss_u, kept=share, lr=opt_seg.param_groups[0]["lr"])
        if run.to_evaluate(step) or run.to_save(step):
            run.save(step, scores() if run.to_evaluate(step) else None)


if __name__ == "__main__":
    cli.launch(main, flags)
