"""Semi-supervised training: train_adv.py plus the unlabelled pictures, where the discriminator trusts the prediction.

    python train_semi.py --data shapes --split 0.125
"""
import cli
import common
import data
import model
import parallel
from csrc import ops
from eval import evaluate
from flags import disc_flags, number, shared_flags


def flags():
    p = disc_flags(shared_flags(__doc__, out="out/semi"))
    p.add_argument("--lam-adv", type=number(), default=0.01, help="weight of the adversarial loss (paper: 0.01)")
    p.add_argument("--unlabelled", metavar="DIR", help="a folder of more pictures without labels, at any depth")
    p.add_argument("--d-unlabelled", action="store_true", help="D learns from unlabelled pictures too (authors' code)")
    p.add_argument("--lam-adv-u", type=number(), default=0.001, help="of unlabelled pictures (authors' code: 0.001)")
    p.add_argument("--lam-semi", type=number(), help="weight of the self-taught loss (paper: 0.1)")
    p.add_argument("--threshold", type=number(), help="a pixel is trusted where D says more (default the paper's 0.2)")
    p.add_argument("--trust", type=number(), metavar="SHARE", help="instead: of each class the surest, up to 1 (all)")
    p.add_argument("--strong", action="store_true", help="teach a strong view: other colours, grey, blurred (FixMatch)")
    p.add_argument("--semi-start", type=number(int), help="steps before semi loss (default --iters / 4; paper: 5000)")
    p.add_argument("--semi-start-epoch", type=number(below=1e6), metavar="E", help="that in labelled epochs; it wins")
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
    opt_seg = model.seg_optimizer(seg, args)
    disc = parallel.ready(model.Discriminator(num_classes), device, args)
    opt_disc = model.disc_optimizer(disc, args)
    run.resume(seg=seg, opt_seg=opt_seg, disc=disc, opt_disc=opt_disc)
    seg_ddp = parallel.ddp(seg)  # the same net; its gradients are means over all processes
    disc_ddp = parallel.ddp(disc)

    def scores():
        return evaluate(seg, val, args, device, disc)[0]

    seg_weights, disc_weights = [p for p in seg.parameters() if p.requires_grad], list(disc.parameters())
    seg.train()
    if run.to_evaluate(done):  # a score that a signal broke off, or that of a run that had ended
        run.save(done, scores())
    for step in run.steps(done):
        common.poly_lr(opt_seg, step - 1, args)
        common.poly_lr(opt_disc, step - 1, args)
        picture, target = next(labelled_batches)  # (B,3,H,W), (B,H,W) uint8
        picture_u, valid_u = next(unlabelled_batches)  # (B,3,H,W) uint8, (B,H,W) bool
        valid = target != data.IGNORE  # (B,H,W): void pixels are holes in both of D's inputs

        with model.autocast(args.amp, device, args.backbone):
            logits = seg_ddp(seg.normalise(picture))  # (B,K,h,w)
            logits_u = seg_ddp(seg.normalise(picture_u))  # (B,K,h,w)
            logits_s = seg_ddp(seg.normalise(data.strong_view(picture_u, args, step))) if args.strong else logits_u
        with model.autocast(args.amp, device, "disc"):
            fake = model.fake_map(logits, valid, args.d_input)  # (B,K,H,W)
            d_fake = disc_ddp(fake)  # (B,1,a,b)
            d_fake_u = disc_ddp(model.fake_map(logits_u, valid_u, args.d_input))  # (B,1,a,b)
            if args.d_target == "real":
                d_real = disc_ddp(model.real_map(target, fake, args.d_input))  # (B,1,a,b)
        loss_ce = parallel.mean(*ops.masked_cross_entropy(logits, target))
        loss_adv = model.bce(d_fake, 1, valid)
        loss_adv_u = model.bce(d_fake_u if args.lam_adv_u else d_fake_u.detach(), 1, valid_u)
        if args.d_target == "right":
            loss_d = model.bce(d_fake, ops.upsample_argmax(logits, valid.shape[1:]) == target, valid)
        else:
            loss_fake, loss_real = model.bce(d_fake, 0, valid), model.bce(d_real, 1 - args.d_smooth, valid)
            loss_fake = (loss_fake + model.bce(d_fake_u, 0, valid_u)) / 2 if args.d_unlabelled else loss_fake
            loss_d = (loss_fake + loss_real) / 2
        taught = model.trusted(logits_u, d_fake_u, valid_u, args.trust)  # (B,H,W) uint8
        semi, kept = ops.masked_cross_entropy(logits_s, taught, d_fake_u, valid=valid_u, threshold=args.threshold)
        loss_semi, share = parallel.mean(semi, kept), parallel.mean(kept / valid_u.sum(), valid_u.sum())
        lam_semi = args.lam_semi if step > args.semi_start else 0
        loss = loss_ce + args.lam_adv * loss_adv + args.lam_adv_u * loss_adv_u + lam_semi * loss_semi

        opt_seg.zero_grad()
        opt_disc.zero_grad()
        # d_fake serves both players: each backward pass goes to its own net's weights
        loss_d.backward(inputs=disc_weights, retain_graph=True)
        loss.backward(inputs=seg_weights)
        opt_seg.step()
        opt_disc.step()

        run.log(step, loss_ce=loss_ce, loss_adv=loss_adv, loss_adv_u=loss_adv_u, loss_semi=loss_semi,
                kept=share, loss_d=loss_d, lr=opt_seg.param_groups[0]["lr"])
        if run.to_evaluate(step) or run.to_save(step):
            run.save(step, scores() if run.to_evaluate(step) else None)


if __name__ == "__main__":
    cli.launch(main, flags)
