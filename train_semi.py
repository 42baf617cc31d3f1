"""Semi-supervised training (Hung et al. 2018): train_adv.py plus pseudo-labels that the discriminator selects.

    python train_semi.py --data shapes --split 0.1
"""
from common import distributed
from common.args import PROBABILITY, number, resolve_args, shared_flags
from common.console import launch
from common.layouts import IGNORE, open_dataset
from common.run import HealthyRange, Run

import torch.nn.functional as F

import data
import model
from csrc import ops
from eval import evaluate


def flags():
    p = model.disc_flags(shared_flags(__doc__, out="out/semi"))
    p.add_argument("--lam-adv", type=number(), help="weight of the adversarial loss (default 0.01, paper; shapes: 0.1)")
    p.add_argument("--unlabelled", metavar="DIR", help="folder of more unlabelled images (default ROOT/unlabelled)")
    p.add_argument("--d-unlabelled", action="store_true", help="train D on unlabelled images too (authors' code)")
    p.add_argument("--lam-adv-u", type=number(), help="weight of the adversarial loss on unlabelled images (default "
                   "0.001, from the authors' code; the paper has none; shapes: 0.1)")
    p.add_argument("--lam-semi", type=number(), help="weight of loss_semi (default 0.1, paper; small data: 0.5)")
    p.add_argument("--threshold", type=PROBABILITY, default=0.2, help="D's confidence above which a pixel gets a "
                   "pseudo-label (default 0.2, paper; raise it if `kept` is 1)")
    p.add_argument("--semi-start", type=number(int), help="step after which loss_semi is used (default --iters / 4)")
    return p


def select_pseudo_labels(logits, d_logits, valid, threshold):
    """Return the argmax class of each pixel, or 255 if D's confidence is not above the threshold (eq. 5).

    logits (N,K,h,w) and d_logits (N,1,a,b) are upsampled to valid (N,H,W) bool, False on padding.
    """
    classes = ops.upsample_argmax(logits, valid.shape[1:])
    return ops.select_labels(classes, d_logits, valid=valid, threshold=threshold)


def report_images(parts, image, logits, valid):
    """Return what report.py shows of an image: D's confidence and the selected pseudo-labels."""
    disc = model.Discriminator(logits.shape[1]).to(logits.device)
    disc.load_state_dict(parts["disc"])
    d_logits = disc(ops.upsample_softmax(logits, valid=valid))
    confidence = F.interpolate(d_logits, valid.shape[1:], mode="bilinear", align_corners=True).sigmoid()
    pseudo = select_pseudo_labels(logits, d_logits, valid, parts["args"]["threshold"])
    return {"discriminator's confidence": confidence[0, 0], "pseudo-labels": pseudo[0]}


def main(args):
    dataset = open_dataset(args.data)
    labelled, unlabelled, val = dataset.split(args.split, args.split_seed, args.labelled_ids,
                                              args.unlabelled or dataset.unlabelled_folder)
    resolve_args(args, dataset, model.network_defaults, model.DISC_PAPER |
                 {"lam_adv": 0.01, "lam_adv_u": 0.001, "lam_semi": 0.1}, model.DISC_SMALL | {"lam_semi": 0.5},
                 {"lam_adv": 0.1, "lam_adv_u": 0.1}, loaders=2)
    args.semi_start = args.iters // 4 if args.semi_start is None else args.semi_start
    healthy = {"loss_d": model.healthy_loss_d(args.d_smooth),
               "kept": HealthyRange(0.01, 0.99, "lower --threshold", "raise --threshold", args.semi_start)}
    run = Run(__file__, args, dataset, labelled, ops.describe, healthy)
    pixels = data.inspect_labels(labelled, dataset, args.workers)  # (K,)
    weight = model.class_weights(args.class_weights, pixels, dataset.classes, run.device)  # (K,) or None
    labelled_batches = data.batches(labelled, "labelled", **run.loader_args)  # fork workers before networks exist
    unlabelled_batches = data.batches(unlabelled, "unlabelled", **run.loader_args)

    seg_raw = model.create_segmenter(dataset.classes, dataset.palette, args.backbone, args.init, args.stride, args.bn,
                                     args.norm, args.aspp_branches, args.input_scale,
                                     args.freeze_backbone).to(run.device)
    opt_seg = model.seg_optimizer(seg_raw, args.lr, args.head_lr, args.nesterov, args.weight_decay)
    disc_raw = model.Discriminator(len(dataset.classes)).to(run.device)
    opt_disc = model.disc_optimizer(disc_raw, args.d_lr, args.d_optim, args.d_betas, args.d_momentum, args.d_decay)
    run.resume(seg=seg_raw, opt_seg=opt_seg, disc=disc_raw, opt_disc=opt_disc)
    seg, disc = (distributed.prepare_model(x, args.compile) for x in (seg_raw, disc_raw))
    seg_weights, disc_weights = [p for p in seg.parameters() if p.requires_grad], list(disc.parameters())

    def precision(logits, target):  # of the pseudo-labels, on validation images
        valid = target != IGNORE
        d_logits = disc_raw(ops.upsample_softmax(logits, valid=valid))
        pseudo = select_pseudo_labels(logits, d_logits, valid, args.threshold)
        return ((pseudo == target) & valid).sum(), (pseudo != IGNORE).sum()

    for step in run.steps(lambda: evaluate(seg_raw, val, args.workers, args.amp, {"precision": precision})):
        model.set_poly_lr(step, args.iters, args.decay_every, opt_seg, opt_disc)
        image, target = next(labelled_batches)  # (B,3,H,W) uint8, (B,H,W) uint8
        image_u, valid_u = next(unlabelled_batches)  # (B,3,H,W) uint8, (B,H,W) bool
        valid = target != IGNORE  # (B,H,W); the rest is 0 in both inputs of the discriminator

        with model.autocast(seg_raw, args.amp):
            logits = seg(image)  # (B,K,h,w)
            logits_u = seg(image_u)  # (B,K,h,w)
        with model.autocast(disc_raw, args.amp):
            d_fake = disc(ops.upsample_softmax(logits, valid=valid))  # (B,1,a,b)
            d_fake_u = disc(ops.upsample_softmax(logits_u, valid=valid_u))  # (B,1,a,b)
            d_real = disc(model.one_hot(target, len(dataset.classes)))  # (B,1,a,b)
        loss_ce = model.cross_entropy(logits, target, weight)
        loss_adv = model.bce(d_fake, 1, valid)
        loss_adv_u = model.bce(d_fake_u if args.lam_adv_u else d_fake_u.detach(), 1, valid_u)  # weight 0: only logged
        loss_fake = model.bce(d_fake, 0, valid)
        loss_fake = (loss_fake + model.bce(d_fake_u, 0, valid_u)) / 2 if args.d_unlabelled else loss_fake
        loss_d = (loss_fake + model.bce(d_real, 1 - args.d_smooth, valid)) / 2
        pseudo = select_pseudo_labels(logits_u, d_fake_u, valid_u, args.threshold)  # (B,H,W) uint8
        loss_semi, kept = model.pseudo_label_loss(logits_u, pseudo, valid_u)
        lam_semi = args.lam_semi if step > args.semi_start else 0
        loss = loss_ce + args.lam_adv * loss_adv + args.lam_adv_u * loss_adv_u + lam_semi * loss_semi

        opt_seg.zero_grad()
        opt_disc.zero_grad()
        # both losses depend on d_fake: each backward pass reaches only the weights of its own network
        loss_d.backward(inputs=disc_weights, retain_graph=True)
        loss.backward(inputs=seg_weights)
        opt_seg.step()
        opt_disc.step()

        run.log(step, loss_ce=loss_ce, loss_adv=loss_adv, loss_adv_u=loss_adv_u, loss_semi=loss_semi, kept=kept,
                loss_d=loss_d, lr=opt_seg.param_groups[0]["lr"])
        run.end_step(step)


if __name__ == "__main__":
    launch(main, flags)
