"""Score a checkpoint as the VOC devkit does, and write what it predicts.

    python eval.py --ckpt out/semi/last.pt --out out/semi/pictures
    python eval.py --ckpt out/semi/last.pt --images holiday --out predictions --blend
"""
import argparse
import contextlib
import json
import math
from pathlib import Path

import torch

import cli
import common
import data
import model
import parallel
import predict
from csrc import ops
from flags import WHOLE, number

BINS = 1000  # of how sure D and the net are, 0..1: a threshold in thousandths lies between two


def flags():
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", required=True, metavar="FILE",
                        help="a training's last.pt or best.pt, or a published file")

    p = parser.add_argument_group("scores")
    p.add_argument("--data", metavar="ROOT", help="data set to score on; default: the one of the training")
    p.add_argument("--list", default="val", help="list of ImageSets/Segmentation, or a file of ids (default val)")
    p.add_argument("--json", metavar="FILE", help="write the mIoU and each class's IoU there")

    p = parser.add_argument_group("pictures without labels")
    p.add_argument("--images", nargs="+", metavar="PATH", help="predict these pictures instead, files, folders or "
                   "globs, turned as their EXIF says; needs --out, which gets legend.png too")
    p.add_argument("--blend", action="store_true", help="with --images: the prediction laid over each picture as well")

    p = parser.add_argument_group("run")
    p.add_argument("--out", metavar="DIR", help="folder for predictions as palette PNGs, and overview.jpg")
    p.add_argument("--tta", action="store_true", help="mean over 3 scales and flipped pictures, at 6 times the time")
    p.add_argument("--window", type=number(int, 65), default=predict.WINDOW, metavar="SIDE", help="larger pictures go "
                   "to the net in overlapping windows of this side, in pixels (default %(default)s); smaller where "
                   "memory does not do")
    p.add_argument("--workers", type=WHOLE, default=2, help="loader processes (default 2); 0 loads in this process")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; default: as the training")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    return parser


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")  # sizes vary
def evaluate(seg, samples, args, device, disc=None, write=None):
    """Scores in percent, a dict, and per-class IoU (K,), fractions: of all `samples`, at their labels' own sizes.

    The scores are `miou`, of one confusion matrix, and with a discriminator those of `trust_scores`. Processes share
    the samples out and sum what they count: every picture counts once. `write(index, ids)` gets every prediction of
    this process, (H,W) uint8 on the CPU, still padded. (None, None) where a signal or, in a training, a bad file
    breaks it off.
    """
    parallel.broadcast_buffers(seg)
    was_training = seg.training
    seg.eval()
    matrix = torch.zeros(seg.num_classes, seg.num_classes, dtype=torch.int64, device=device)
    judged = torch.zeros(4, 2, BINS, dtype=torch.int64, device=device)
    whole = data.Whole(samples[parallel.RANK::parallel.WORLD], args)
    pairs = cli.progress(data.loader(whole, args.workers, batch_size=1), len(whole), "evaluation")
    try:
        for i, (picture, target) in enumerate(pairs):  # (1,3,h,w), (1,H,W) uint8
            if parallel.heard:
                break
            prediction, target = predict.logits(seg, picture, args, device), target.to(device)  # (1,K,h,w)
            if disc:
                judged += judge(disc, prediction, target, args)
            if write:
                prediction = ops.upsample_argmax(prediction, target.shape[1:])  # (1,H,W) uint8
                write(parallel.RANK + i * parallel.WORLD, prediction[0].cpu())
            ops.confusion_matrix(prediction, target, seg.num_classes, out=matrix)
    except cli.InputError as e:
        if not was_training:
            raise
        parallel.heard = e  # a training saves first
    seg.train(was_training)
    if parallel.stopping():
        return None, None
    miou, per_class = ops.mean_iou(parallel.total(matrix))
    return {"miou": 100 * miou} | (trust_scores(parallel.total(judged)) if disc else {}), per_class


def trust(disc, logits, valid, args):
    """(model.sureness (3,N,H,W), whether the training of `args` would keep a pixel (N,H,W)) of logits (N,K,h,w)."""
    with model.autocast(args.amp, valid.device, "disc"):
        answer = disc(model.fake_map(logits, valid, args.d_input))  # (N,1,a,b)
    sure = model.sureness(logits, answer, valid.shape[1:])
    if getattr(args, "trust", None):
        return sure, model.trusted(logits, answer, valid, args.trust) != data.IGNORE
    return sure, (sure[0] > getattr(args, "threshold", 1)) & valid


def judge(disc, logits, target, args):
    """Pixels counted by how sure D, the net and both are of them (model.sureness), then by whether they are kept.

    (4,2,BINS) int64: wrong and right ones; kept are those of the last bin, the others are in the first. Where the
    training keeps none, as that of train_adv.py, all are. logits (N,K,h,w), target (N,H,W).
    """
    valid = target != data.IGNORE
    sure, kept = trust(disc, logits, valid, args)
    bins = (torch.cat([sure, kept[None]]) * BINS).long().clamp(max=BINS - 1)  # (4,N,H,W)
    right = ops.upsample_argmax(logits, valid.shape[1:]) == target
    rows = 2 * torch.arange(4, device=target.device).view(4, 1, 1, 1) + right  # (4,N,H,W)
    return (rows * BINS + bins)[:, valid].flatten().bincount(minlength=8 * BINS).view(4, 2, BINS)


def trust_scores(judged):
    """What is in `judge`'s counts of all pictures, in percent: `auc`, `auc_net`, `auc_both`, and `precision`.

    Areas under the ROC curve: how often a right pixel is surer than a wrong one, 50 where it is chance. Precision: how
    many of the kept pixels are right. What has nothing to count is left out.
    """
    wrong, right = judged.double().cpu().unbind(1)  # (4,BINS)
    auc = (right * (wrong.cumsum(1) - wrong / 2)).sum(1) / (right.sum(1) * wrong.sum(1))
    kept = right[3, -1] / (right[3, -1] + wrong[3, -1])
    scores = dict(zip(("auc", "auc_net", "auc_both", "precision"), (100 * torch.stack([*auc[:3], kept])).tolist()))
    return {name: value for name, value in scores.items() if not math.isnan(value)}


def main(args):
    checkpoint = model.read_checkpoint(args.ckpt, "--ckpt")
    seg, classes = model.build_segmenter(checkpoint, args.ckpt), checkpoint["classes"]
    now = {"workers": args.workers, "tta": args.tta, "window": args.window}
    now |= {} if args.amp is None else {"amp": args.amp}
    trained = argparse.Namespace(**{"data": None, "amp": None, "input_scale": 1} | checkpoint["args"] | now)
    out = cli.folder("--out", args.out) if args.out else None
    if args.json and not Path(args.json).parent.is_dir():
        raise cli.InputError(f"--json {args.json}: there is no folder {Path(args.json).parent}; make it first")
    if args.images:
        if out is None:
            raise cli.InputError("--images: name a folder for the predictions with --out")
        paths = predict.named(args.images)
        device = common.announce(f"data {len(paths)} pictures of --images", args.gpu)
        return predict.images(seg, paths, trained, device, classes, out, args.blend)

    dataset = data.open_data(args.data or trained.data)
    note = dataset.note + predict.same_classes(classes, dataset, args.ckpt)
    ids = dataset.ids(args.list)
    samples = dataset.samples(ids)
    device = common.announce(f"{note}data {dataset.name}: {len(ids)} pictures of list {args.list}", args.gpu)
    rows, shown = [], max(1, len(ids) // (8 * parallel.WORLD))

    def write(i, prediction):
        picture = data.read_picture(samples[i][0])
        drawn = predict.palette_png(prediction, picture.size, dataset.palette)
        with cli.writing(f"--out {out}"):
            drawn.save(drafts / f"{ids[i]}.png")
        if i // parallel.WORLD % shown == 0 and len(rows) < 8:
            label = data.read_label(samples[i][1], picture.size)
            rows.append((picture, predict.palette_png(label, picture.size, dataset.palette), drawn))

    with predict.drafts_of(out) if out else contextlib.nullcontext() as drafts:
        scores, per_class = evaluate(seg.to(device), samples, trained, device, write=write if out else None)
        if out and parallel.RANK == 0:
            with cli.writing(f"--out {out}"):
                predict.overview(rows).save(drafts / "overview.jpg", quality=95)
    if out:
        print(f"predictions in {out}, some beside picture and label in {out / 'overview.jpg'}")
    percent = {name: 100 * iou for name, iou in zip(classes, per_class.tolist())}
    for name, iou in percent.items():
        print(f"{name:20} {iou:6.2f}" + ("  (absent)" if math.isnan(iou) else ""))
    if args.json and parallel.RANK == 0:
        percent = {name: None if math.isnan(iou) else iou for name, iou in percent.items()}
        scores |= {"per_class": percent, "data": dataset.name, "list": args.list,
                  "ckpt": args.ckpt, "step": checkpoint["step"]}
        cli.replace(Path(args.json), lambda f: f.write_text(json.dumps(scores, indent=1) + "\n"))
    print(f"data {dataset.name}, list {args.list}, {len(ids)} pictures, step {checkpoint['step']}")
    print(f"mIoU {scores['miou']:.2f}")


if __name__ == "__main__":
    cli.launch(main, flags)
