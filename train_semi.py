"""Semi-supervised training: train_adv.py plus the unlabelled pictures, where the discriminator trusts the prediction.

    python train_semi.py --data shapes --split 0.125
"""
import argparse
import math

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
    p.add_argument("--unlabelled", metavar="DIR", help="a folder of more pictures without labels, at any depth")
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
    p.add_argument("--lam-adv", type=float, default=0.01, help="weight of the adversarial loss (paper: 0.01)")
    p.add_argument("--d-optim", choices=["adam", "sgd"], default="adam", help="optimiser of the discriminator (paper: adam)")
    p.add_argument("--d-lr", type=float, help="first rate of the discriminator, poly decay (paper: 1e-4)")
    p.add_argument("--d-betas", type=float, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="of D's Adam (default: "
                   "the paper's 0.9 0.999; the authors' code: 0.9 0.99)")
    p.add_argument("--d-momentum", type=float, default=0.5, help="of D's SGD (default 0.5)")
    p.add_argument("--d-decay", type=float, help="weight decay of D; default 0 for Adam, 1e-4 for SGD")
    p.add_argument("--d-smooth", type=float, help="D's answer for a label map is 1 minus this, label smoothing (paper: 0)")
    p.add_argument("--d-unlabelled", action="store_true", help="D learns from unlabelled predictions too, as in the authors' "
                   "code (paper: labelled only)")
    p.add_argument("--lam-adv-u", type=float, default=0.001, help="weight of the adversarial loss on unlabelled pictures "
                   "(the authors' code: 0.001; ICLR text: none)")
    p.add_argument("--lam-semi", type=float, help="weight of the self-taught loss (paper: 0.1)")
    p.add_argument("--threshold", type=float, default=0.2, help="a pixel is trusted where D says more, T_semi (paper: 0.2)")
    p.add_argument("--semi-start", type=int, help="updates before the self-taught loss; default --iters / 4 (paper: 5000)")
    p.add_argument("--semi-start-epoch", type=float, metavar="E", help="the same in passes over the labelled "
                   "pictures; it wins")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="go through a batch in N pieces one after the other: "
                   "less memory; each piece's losses are means of their own (default 1)")
    p.add_argument("--compile", action="store_true", help="torch.compile the nets: minutes at the start, faster steps")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 for all nets or none; default: where faster")
    # run
    p.add_argument("--recipes", action=cli.Recipes, help="print the experiments in recipes/ and what was published, and stop")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    p.add_argument("--seed", type=int, default=0, help="of first weights and of every random draw (default 0)")
    p.add_argument("--out", default="out/semi", metavar="DIR", help="where log, checkpoints and flags are written")
    p.add_argument("--resume", action="store_true", help="go on from DIR/last.pt where there is one")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines (default 10)")
    p.add_argument("--eval-every", type=int, help="steps between evaluations; default --iters / 10, shapes 160")
    p.add_argument("--save-every", type=int, help="steps between checkpoints; default a tenth of --iters")
    return p


def main(args):
    dataset, note = data.open_data(args.data)
    data.settle(args, dataset.defaults)
    labelled, unlabelled = data.split_ids(dataset.train_ids(), args.split, args.split_seed, args.labelled_ids)
    labelled_samples, val = dataset.samples(labelled), dataset.samples(dataset.ids("val"))
    unlabelled_samples = dataset.samples(unlabelled, labels=False) + data.folder_pictures(
        args.unlabelled, labelled_samples + val)
    if not unlabelled_samples:
        raise cli.InputError("--split, --labelled-ids: leave no picture unlabelled; label fewer or give more with --unlabelled")
    if args.semi_start_epoch is not None:
        steps = len(labelled) / args.batch_size  # of an epoch
        args.semi_start = math.ceil(args.semi_start_epoch * (int(steps) if args.drop_last else steps))
    run = common.Run(args, dataset, note, labelled)
    device, num_classes = run.device, len(dataset.classes)

    seg = parallel.ready(model.new_segmenter(args, num_classes), device, args)
    opt_seg = model.seg_optimizer(seg, args)
    disc = parallel.ready(model.Discriminator(num_classes), device, args)
    opt_disc = model.disc_optimizer(disc, args)
    parts = {"seg": seg, "opt_seg": opt_seg, "disc": disc, "opt_disc": opt_disc}
    done = parallel.same_start(run.resume(**parts))
    seg_ddp = parallel.ddp(seg)  # the same net, but its gradients are those of all processes
    disc_ddp = parallel.ddp(disc)

    stream = data.Stream(labelled_samples, args, "labelled")
    labelled_batches = data.batches(stream, args, done, device)
    stream = data.Stream(unlabelled_samples, args, "unlabelled")
    unlabelled_batches = data.batches(stream, args, done, device)
    seg_weights = [p for p in seg.parameters() if p.requires_grad]
    disc_weights = list(disc.parameters())
    size, d_dtype = (args.crop, args.crop), model.compute_dtype(args.amp, device, "disc")
    seg.train()
    for step in run.steps(done):
        if run.due(step - 1):
            run.score(step - 1, evaluate, val, parts)
        common.poly_lr(opt_seg, step - 1, args)
        common.poly_lr(opt_disc, step - 1, args)
        opt_seg.zero_grad()
        opt_disc.zero_grad()
        for _ in parallel.pieces(args.accumulate, seg_ddp, disc_ddp):
            picture, target = (t.to(device, non_blocking=True) for t in next(labelled_batches))  # (B,3,H,W), (B,H,W) uint8
            picture_u, valid_u = (t.to(device, non_blocking=True) for t in next(unlabelled_batches))  # and (B,H,W) bool
            valid = target != data.IGNORE  # (B,H,W): void pixels are holes in both of D's inputs
            part = parallel.share(valid.sum(), args)  # what the mean over these pixels weighs
            part_u = parallel.share(valid_u.sum(), args)

            with model.autocast(args.amp, device, args.backbone):
                logits = seg_ddp(seg.normalise(picture))  # (B,K,h,w)
                logits_u = seg_ddp(seg.normalise(picture_u))  # (B,K,h,w)
            loss_ce = part * ops.masked_cross_entropy(logits, target)[0]
            with parallel.alone(disc_ddp), model.autocast(args.amp, device, "disc"):
                d_real = disc_ddp(model.one_hot(target, num_classes, d_dtype))  # (B,1,a,b)
            loss_real = part * model.bce(d_real, 1 - args.d_smooth, valid)
            (loss_real / 2).backward()  # before the pass below, which sums; its graph is gone
            with model.autocast(args.amp, device, "disc"):
                d_fake = disc_ddp(ops.upsample_softmax(logits, size, d_dtype, valid=valid))  # (B,1,a,b)
                d_fake_u = disc_ddp(ops.upsample_softmax(logits_u, size, d_dtype, valid=valid_u))  # (B,1,a,b)
            loss_adv, loss_fake = part * model.bce(d_fake, 1, valid), part * model.bce(d_fake, 0, valid)
            loss_adv_u = part_u * model.bce(d_fake_u, 1, valid_u)
            loss_semi, kept = ops.masked_cross_entropy(logits_u, confidence=d_fake_u, valid=valid_u,
                                                       threshold=args.threshold, size=size)
            loss_semi = parallel.share(kept, args) * loss_semi
            lam_semi = args.lam_semi if step > args.semi_start else 0
            if args.d_unlabelled:
                loss_fake = (loss_fake + part_u * model.bce(d_fake_u, 0, valid_u)) / 2
            loss_d = (loss_fake + loss_real) / 2
            loss = loss_ce + args.lam_adv * loss_adv + args.lam_adv_u * loss_adv_u + lam_semi * loss_semi
            # d_fake serves both players: each backward pass goes to its own net's weights, the last one frees the graph
            (loss_fake / 2).backward(inputs=disc_weights, retain_graph=True)
            loss.backward(inputs=seg_weights)
            run.add(loss_ce=loss_ce, loss_adv=loss_adv, loss_adv_u=loss_adv_u, loss_semi=loss_semi,
                    kept=part_u * kept / valid_u.sum(), loss_d=loss_d)
        opt_seg.step()
        opt_disc.step()

        run.report(step, lr=opt_seg.param_groups[0]["lr"])
        if run.to_save(step):
            run.save(step, parts)
    run.score(args.iters, evaluate, val, parts)


if __name__ == "__main__":
    cli.launch(main, flags)
