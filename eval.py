"""Score a checkpoint as the VOC devkit does, and write its predictions.

    python eval.py --ckpt out/semi/last.pt --out out/semi/predictions
"""
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import distributed
from common.args import NON_NEGATIVE_INT
from common.checkpoint import read_checkpoint
from common.console import catch_read_errors, launch, output_folder, progress, write_atomically
from common.layouts import open_dataset
from common.run import announce

import torch
from PIL import ExifTags, Image

import data
import model
import predict
from csrc import ops

EXAMPLES = 8  # images drawn beside label and prediction


def flags():
    p = predict.model_flags(__doc__)
    p.add_argument("--data", metavar="ROOT", help="data set to score (default: the one it was trained on)")
    p.add_argument("--list", default="val", help="name of a list in ROOT, or a file of ids, one a line (default val)")
    p.add_argument("--out", metavar="DIR", help="folder for predictions as palette PNGs, and overview.jpg")
    p.add_argument("--json", metavar="FILE", help="file for the mIoU and the scores of each class")
    p.add_argument("--workers", type=NON_NEGATIVE_INT, default=2, help="worker processes of the loader (default 2)")
    return p


class Evaluation(NamedTuple):
    """Results of `evaluate`."""
    scores: dict  # {name: percent}, "miou" first
    per_class: torch.Tensor  # (K,) IoU in 0..1, NaN for a class that is nowhere
    matrix: torch.Tensor  # (K,K) int64, pixels of each class (row) that are predicted as each class (column)
    draw_examples: Callable[[], Image.Image]  # rows of image, label and prediction, of this rank's samples

    def pixel_accuracy(self):
        """Return the percentage of labelled pixels that are predicted right."""
        return 100 * (self.matrix.trace() / self.matrix.sum()).item()

    def best_constant(self):
        """Return (class id, mIoU in percent) of the best prediction that is one class everywhere."""
        pixels = self.matrix.sum(1)  # (K,) of each class in the labels
        return pixels.argmax().item(), 100 * (pixels.max() / pixels.sum() / pixels.count_nonzero()).item()


def class_scores(matrix):
    """Return {name: (K,) float64} of a confusion matrix (K,K): "iou", "precision", "recall" and "f1" (Dice), in 0..1.

    A class that is neither in the labels nor predicted is NaN. One that is never predicted has precision 0, and one
    that is only predicted has recall 0.
    """
    matrix = matrix.cpu().double()
    true, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    is_absent = (labelled + predicted) == 0
    counts = {"iou": labelled + predicted - true, "precision": predicted, "recall": labelled,
              "f1": (labelled + predicted) / 2}
    return {name: (true / count.clamp(min=0.5)).masked_fill(is_absent, math.nan) for name, count in counts.items()}


def batches_of_one_size(samples, limit=2**18):
    """Return lists of up to 8 successive indices of samples whose images have one size, `limit` pixels together."""
    def size(i):
        with catch_read_errors(samples[i].image), Image.open(samples[i].image) as image:
            is_small = 2 * math.prod(image.size) <= limit  # getexif decodes a PNG, in this process: not the large ones
            return *image.size, image.getexif().get(ExifTags.Base.Orientation) if is_small else i

    batches = []
    for (width, height, _), group in itertools.groupby(range(len(samples)), size):
        indices, count = [*group], max(1, min(8, limit // (width * height)))
        batches += [indices[i:i + count] for i in range(0, len(indices), count)]
    return batches


@torch.inference_mode()
@torch.compiler.set_stance("force_eager")  # sizes vary
def evaluate(seg, samples, workers=2, amp=None, extra=None, *, window=predict.WINDOW, tta=False, write=None):
    """Score a segmentation model on Samples at their labels' own sizes, by one confusion matrix over all of them.

    extra: {score: function (logits (1,K,h,w), target (1,H,W)) -> 0-dim (numerator, denominator)}; the ratio of their
    sums over all samples is the score, in percent. write: called with (sample, ids, target) for each sample of this
    rank; both (H,W) uint8, still padded. Returns None if a signal asked to stop meanwhile.
    """
    distributed.broadcast_buffers(seg)
    was_training, device = seg.training, next(seg.parameters()).device
    torch.backends.cudnn.benchmark = False  # sizes vary; common/run.py turns it on for training
    seg.eval()
    matrix = torch.zeros(seg.num_classes, seg.num_classes, dtype=torch.int64, device=device)
    sums, examples = {name: torch.zeros(2, dtype=torch.float64) for name in extra or {}}, []
    mine = samples[distributed.RANK::distributed.WORLD_SIZE]
    dataset = data.EvalDataset(mine, seg.stride, seg.input_scale)
    batches = batches_of_one_size(mine)  # small images are faster in batches
    loader = data.loader(dataset, workers, batch_sampler=batches)
    for indices, (image, target) in zip(batches, progress(loader, len(batches), "evaluation")):  # (N,3,h,w), (N,H,W)
        if distributed.stop_reason:
            break
        logits, target = predict.predict_logits(seg, image, amp, window, tta), target.to(device)
        ids = ops.upsample_argmax(logits, target.shape[1:])  # (N,H,W) uint8
        ops.confusion_matrix(ids, target, seg.num_classes, out=matrix)
        for n, i in enumerate(indices):
            for name in sums:
                sums[name] += torch.stack(extra[name](logits[n:n + 1], target[n:n + 1])).cpu()
            if write:
                write(mine[i], ids[n], target[n])
            if i * EXAMPLES // len(mine) > (i - 1) * EXAMPLES // len(mine):  # EXAMPLES images, evenly spaced
                examples.append((mine[i], ids[n].cpu()))
    seg.train(was_training)
    if distributed.stop_requested():
        return None
    matrix = distributed.all_reduce_sum(matrix).cpu()
    miou, per_class = ops.mean_iou(matrix)
    scores = {"miou": 100 * miou}
    for name, total in sums.items():
        numerator, denominator = distributed.all_reduce_sum(total).tolist()
        scores |= {name: 100 * numerator / denominator} if denominator else {}
    return Evaluation(scores, per_class, matrix, lambda: predict.draw_examples(examples, seg.palette))


def main(args):
    checkpoint = read_checkpoint(args.ckpt, "--ckpt")
    seg, trained = model.load_segmenter(args.ckpt, checkpoint), checkpoint["args"]
    out = args.out if args.out is None else output_folder("--out", args.out)
    dataset = open_dataset(args.data or trained.get("data"))
    note = dataset.note + predict.check_classes(seg.classes, dataset, args.ckpt)
    samples = dataset.samples(dataset.ids(args.list))
    device = announce(f"{note}data {dataset.name}: {len(samples)} images of list {args.list}", args.gpu, ops.describe)
    data.inspect_labels(samples, dataset, args.workers)

    def write(sample, ids, _):
        image = predict.palette_image(ids.cpu(), data.read_image(sample.image).size, seg.palette)
        write_atomically(out / f"{sample.id}.png", lambda f: image.save(f, "PNG"))

    result = evaluate(seg.to(device), samples, args.workers, trained.get("amp") if args.amp is None else args.amp,
                      window=args.window, tta=args.tta, write=write if out else None)
    if out and distributed.RANK == 0:
        write_atomically(out / "overview.jpg", lambda f: result.draw_examples().save(f, "JPEG", quality=95))
        print(f"predictions in {out}, some beside image and label in {out / 'overview.jpg'}")
    scores = {name: 100 * values for name, values in class_scores(result.matrix).items()}
    print(f"{'percent':20}     IoU  precision  recall  F1 (Dice)")
    means = torch.stack([values.nanmean() for values in scores.values()])
    for name, row in [*zip(seg.classes, torch.stack([*scores.values()], 1)), ("mean", means)]:
        print(f"{name:20}" + ("  absent" if row.isnan().any() else "{:8.2f}{:11.2f}{:8.2f}{:11.2f}".format(*row)))
    constant, miou = result.best_constant()
    print(f"pixel accuracy {result.pixel_accuracy():.2f}\n"
          f"predicting {seg.classes[constant]} everywhere scores a mean IoU of {miou:.2f}")
    if args.json and distributed.RANK == 0:
        by_name = {name: {c: None if math.isnan(x) else x for c, x in zip(seg.classes, values.tolist())}
                   for name, values in scores.items()}
        facts = {"data": dataset.name, "list": args.list, "ckpt": args.ckpt, "step": checkpoint["step"],
                 "pixel_accuracy": result.pixel_accuracy(), "per_class": by_name.pop("iou"), **by_name}
        write_atomically(Path(args.json), lambda f: f.write_text(json.dumps(result.scores | facts, indent=1) + "\n"))
    print(f"data {dataset.name}, list {args.list}, {len(samples)} images, step {checkpoint['step']}\n"
          f"mIoU {result.scores['miou']:.2f}")


if __name__ == "__main__":
    launch(main, flags)
