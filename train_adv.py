"""Adversarial training (Hung et al. 2018): train_base.py plus a discriminator of label maps and predictions.

    python train_adv.py --data shapes --split 0.1
"""
from common import distributed
from common.args import number, resolve_args, shared_flags
from common.console import launch
from common.layouts import IGNORE, open_dataset
from common.run import Run

import data
import model
from csrc import ops
from eval import evaluate


def flags():
    p = model.disc_flags(shared_flags(__doc__, out="out/adv"))
    p.add_argument("--lam-adv", type=number(), help="weight of the adversarial loss (default 0.01, paper; shapes: 0.1)")
    return p


def main(args):
    dataset = open_dataset(args.data)
    labelled, _, val = dataset.split(args.split, args.split_seed, args.labelled_ids)
    resolve_args(args, dataset, model.network_defaults, model.DISC_PAPER | {"lam_adv": 0.01}, model.DISC_SMALL,
                 {"lam_adv": 0.1})
    run = Run(__file__, args, dataset, labelled, ops.describe, {"loss_d": model.healthy_loss_d(args.d_smooth)})
    pixels = data.inspect_labels(labelled, dataset, args.workers)  # (K,)
    weight = model.class_weights(args.class_weights, pixels, dataset.classes, run.device)  # (K,) or None
    labelled_batches = data.batches(labelled, "labelled", **run.loader_args)  # fork workers before networks exist

    seg_raw = model.create_segmenter(dataset.classes, dataset.palette, args.backbone, args.init, args.stride, args.bn,
                                     args.norm, args.aspp_branches, args.input_scale,
                                     args.freeze_backbone).to(run.device)
    opt_seg = model.seg_optimizer(seg_raw, args.lr, args.head_lr, args.nesterov, args.weight_decay)
    disc_raw = model.Discriminator(len(dataset.classes)).to(run.device)
    opt_disc = model.disc_optimizer(disc_raw, args.d_lr, args.d_optim, args.d_betas, args.d_momentum, args.d_decay)
    run.resume(seg=seg_raw, opt_seg=opt_seg, disc=disc_raw, opt_disc=opt_disc)
    seg, disc = (distributed.prepare_model(x, args.compile) for x in (seg_raw, disc_raw))
    seg_weights, disc_weights = [p for p in seg.parameters() if p.requires_grad], list(disc.parameters())

    for step in run.steps(lambda: evaluate(seg_raw, val, args.workers, args.amp)):
        model.set_poly_lr(step, args.iters, args.decay_every, opt_seg, opt_disc)
        image, target = next(labelled_batches)  # (B,3,H,W) uint8, (B,H,W) uint8
        valid = target != IGNORE  # (B,H,W); the rest is 0 in both inputs of the discriminator

        with model.autocast(seg_raw, args.amp):
            logits = seg(image)  # (B,K,h,w)
        with model.autocast(disc_raw, args.amp):
            d_fake = disc(ops.upsample_softmax(logits, valid=valid))  # (B,1,a,b)
            d_real = disc(model.one_hot(target, len(dataset.classes)))  # (B,1,a,b)
        loss_ce = model.cross_entropy(logits, target, weight)
        loss_adv = model.bce(d_fake, 1, valid)
        loss_d = (model.bce(d_fake, 0, valid) + model.bce(d_real, 1 - args.d_smooth, valid)) / 2
        loss = loss_ce + args.lam_adv * loss_adv

        opt_seg.zero_grad()
        opt_disc.zero_grad()
        # both losses depend on d_fake: each backward pass reaches only the weights of its own network
        loss_d.backward(inputs=disc_weights, retain_graph=True)
        loss.backward(inputs=seg_weights)
        opt_seg.step()
        opt_disc.step()

        run.log(step, loss_ce=loss_ce, loss_adv=loss_adv, loss_d=loss_d, lr=opt_seg.param_groups[0]["lr"])
        run.end_step(step)


if __name__ == "__main__":
    launch(main, flags)
