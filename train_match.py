"""Semi-supervised mean teacher: train_base.py plus pseudo-labels of weak views for strong views (FixMatch, UniMatch).

    python train_match.py --data shapes --split 0.1
"""
import copy

from common import distributed
from common.args import PROBABILITY, check_multiple, number, resolve_args, shared_flags
from common.console import launch
from common.layouts import open_dataset
from common.run import HealthyRange, Run

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import model
from csrc import ops
from eval import evaluate


def flags():
    p = shared_flags(__doc__, out="out/match")
    p.add_argument("--unlabelled", metavar="DIR", help="folder of more unlabelled images (default ROOT/unlabelled)")
    p.add_argument("--ema", type=number(below=1), help="decay of the teacher's weights per step (default 0.99; "
                   "shapes: 0.95; lower it for short runs)")
    p.add_argument("--confidence", type=PROBABILITY, default=0.8, help="teacher's probability above which a pixel "
                   "gets a pseudo-label, lowered for classes of low mean confidence as in FreeMatch (default 0.8; "
                   "raise it if `kept` is 1)")
    p.add_argument("--cutmix", type=PROBABILITY, default=0.5, help="probability of CutMix per image (default 0.5; "
                   "0 turns it off)")
    p.add_argument("--lam-u", type=number(), default=2, help="weight of the unlabelled loss (default 2)")
    p.add_argument("--u-start", type=number(int), help="step after which loss_u is used (default --iters / 8; "
                   "shapes: 75)")
    return p


def main(args):
    dataset = open_dataset(args.data)
    labelled, unlabelled, val = dataset.split(args.split, args.split_seed, args.labelled_ids,
                                              args.unlabelled or dataset.unlabelled_folder)
    resolve_args(args, dataset, model.network_defaults, {"ema": 0.99}, shapes={"ema": 0.95, "u_start": 75}, loaders=2)
    args.u_start = args.iters // 8 if args.u_start is None else args.u_start
    if args.cutmix and distributed.WORLD_SIZE > 1:  # the images of each rank are mixed in pairs
        check_multiple(args.batch_size, 2 * distributed.WORLD_SIZE, "ranks times 2, for CutMix")
    healthy = {"kept": HealthyRange(0.01, 0.99, "lower --confidence", "raise --confidence", args.u_start)}
    run = Run(__file__, args, dataset, labelled, ops.describe, healthy)
    pixels = data.inspect_labels(labelled, dataset, args.workers)  # (K,)
    weight = model.class_weights(args.class_weights, pixels, dataset.classes, run.device)  # (K,) or None
    labelled_batches = data.batches(labelled, "labelled", **run.loader_args)  # fork workers before networks exist
    unlabelled_batches = data.batches(unlabelled, "unlabelled", **run.loader_args)

    seg_raw = model.create_segmenter(dataset.classes, dataset.palette, args.backbone, args.init, args.stride, args.bn,
                                     args.norm, args.aspp_branches, args.input_scale,
                                     args.freeze_backbone).to(run.device)
    # its weights are a moving average of the student's that are trained; all others, and its buffers such as running
    # statistics, are the student's
    fixed = [p for p in seg_raw.parameters() if not p.requires_grad]
    teacher_raw = copy.deepcopy(seg_raw, {id(x): x for x in [*seg_raw.buffers(), *fixed]}).requires_grad_(False)
    opt_seg = model.seg_optimizer(seg_raw, args.lr, args.head_lr, args.nesterov, args.weight_decay)
    run.resume(seg=teacher_raw, student=seg_raw, opt_seg=opt_seg)  # eval.py loads `seg`: the teacher
    seg, teacher = (distributed.prepare_model(x, args.compile) for x in (seg_raw, teacher_raw))
    update_teacher = get_ema_multi_avg_fn(args.ema)
    pairs = zip(teacher_raw.parameters(), seg_raw.parameters())
    averaged, trained = zip(*((average, p) for average, p in pairs if p.requires_grad))

    for step in run.steps(lambda: evaluate(teacher_raw, val, args.workers, args.amp)):
        model.set_poly_lr(step, args.iters, args.decay_every, opt_seg)
        image, target = next(labelled_batches)  # (B,3,H,W) uint8, (B,H,W) uint8
        image_u, valid_u = next(unlabelled_batches)  # (B,3,H,W) uint8, (B,H,W) bool

        with model.autocast(seg_raw, args.amp):
            logits = seg(image)  # (B,K,h,w)
            with torch.no_grad(), teacher_raw.fixed_statistics():
                logits_w = teacher(image_u)  # (B,K,h,w), of the weak view
            thresholds = args.confidence * model.class_confidence(logits_w, valid_u)  # (K,)
            pseudo = ops.pseudo_labels(logits_w, valid_u.shape[1:], thresholds, valid_u)  # (B,H,W) uint8
            image_s = data.strong_view(image_u, args.seed, step)
            image_s, pseudo, valid_u = data.cut_mix((image_s, pseudo, valid_u), args.cutmix, args.seed, step)
            with seg_raw.fixed_statistics():  # running statistics are those of labelled images
                logits_s = seg(image_s)  # (B,K,h,w), of the strong view
        loss_ce = model.cross_entropy(logits, target, weight)
        loss_u, kept = model.pseudo_label_loss(logits_s, pseudo, valid_u, divide="all")
        loss = loss_ce + (args.lam_u if step > args.u_start else 0) * loss_u

        opt_seg.zero_grad()
        loss.backward()
        opt_seg.step()
        update_teacher(averaged, trained, None)  # None: a count that it ignores

        run.log(step, loss_ce=loss_ce, loss_u=loss_u, kept=kept, lr=opt_seg.param_groups[0]["lr"])
        run.end_step(step)


if __name__ == "__main__":
    launch(main, flags)
