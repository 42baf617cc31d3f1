"""Predict images that need no labels: a palette PNG for each, and legend.png, or a file for an annotation tool.

    python predict.py --ckpt out/semi/last.pt photos --out predictions --blend
    python predict.py --ckpt out/semi/last.pt photos --out predictions.zip --format cvat --min-confidence 0.8
    python predict.py --ckpt out/semi/last.pt photos --out predictions --rank     # which of them to label next
"""
import argparse
import itertools
import math
import shutil
from collections import Counter
from pathlib import Path

from common import distributed, exporters
from common.args import Parser, number
from common.checkpoint import read_checkpoint
from common.console import InputError, launch, output_folder, progress, write_atomically
from common.layouts import IGNORE, IMAGE_SUFFIXES, open_dataset, read_lines
from common.ranking import Measured, entropy, mean_over_classes, write_ranking
from common.run import announce

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
import model
from csrc import ops

SCALES = 1, 0.75, 1.25  # of test-time augmentation, each also mirrored
WINDOW = 2049  # largest side of an image that is predicted at once, in pixels


def flags():
    p = model_flags(__doc__)
    p.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, or folders of images at any depth")
    p.add_argument("--out", required=True, help="folder for the predictions; with --format cvat a new .zip file, with "
                   "--format coco a new .json file")
    p.add_argument("--format", choices=["palette", *exporters.WRITERS], default="palette", help="palette: PNGs of "
                   "class ids with colours (default); cvat: one zip to upload to CVAT as Segmentation mask 1.1; coco: "
                   "COCO JSON with run lengths; prepare.py import reads both, given the images too (docs/data.md)")
    p.add_argument("--min-confidence", type=number(below=1), metavar="P", help="leave a pixel unlabelled (255, in CVAT "
                   "`void`) if the probability of its class is not above P, for a person to label (default: label all)")
    p.add_argument("--blend", action="store_true", help="also write each image with its prediction laid over it "
                   "(--format palette)")
    p.add_argument("--rank", action="store_true", help="also write ranking.csv and ranking.html: in which order to "
                   "label the images, from the uncertainty of the predictions and the variety of the images")
    return p


def model_flags(description):
    """Return a Parser with the flags that eval.py has too."""
    p = Parser(description)
    p.add_argument("--ckpt", required=True, metavar="FILE", help="last.pt or best.pt of a training run, or "
                   "a file of the authors or of the 2017 reproduction (recipes/README.md)")
    p.add_argument("--tta", action="store_true", help="average over 3 scales and mirrored images, at 6 times the cost")
    p.add_argument("--window", type=number(int, 65), default=WINDOW, metavar="SIDE", help="larger images are predicted "
                   "in overlapping windows of this side, in pixels of the network's input (default %(default)s; lower "
                   "it if memory runs out)")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="use bfloat16 (default: as in the training)")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    return p


def predict_logits(seg, images, amp=None, window=WINDOW, tta=False):
    """Return the logits (N,K,h,w) of uint8 images (N,3,H,W) that data.pad_to_stride made.

    Larger images are cut into windows that overlap by half, where logits are averaged. tta: the logarithm of the mean
    probabilities over SCALES and mirrored images.
    """
    images, stride = images.to(next(seg.parameters()).device), seg.stride
    side = (window - 1) // stride * stride + 1

    def predict_windows(view):
        height, width = view.shape[2:]
        if max(height, width) <= side:
            with model.autocast(seg, amp):
                return seg(view)
        total, half = 0, side // 2 // stride * stride
        tops, lefts = ([*range(0, n - side, half), max(0, n - side)] for n in (height, width))
        for y, x in itertools.product(tops, lefts):
            part = view[:, :, y:y + side, x:x + side]
            logits = predict_windows(part).float()  # (N,K,h,w)
            step = (part.shape[2] - 1) // (logits.shape[2] - 1)
            padding = (x // step, (width - 1) // step + 1 - x // step - logits.shape[3],
                       y // step, (height - 1) // step + 1 - y // step - logits.shape[2])
            total = total + F.pad(torch.cat([logits, torch.ones_like(logits[:, :1])], 1), padding)  # last: the count
        return total[:, :-1] / total[:, -1:]

    if not tta:
        return predict_windows(images)
    found = []
    for scale in SCALES:
        view = data.resize(images, [round((n - 1) / stride * scale) * stride + 1 for n in images.shape[2:]])
        both = predict_windows(view), predict_windows(view.flip(3)).flip(3)
        found += [logits.float().softmax(1) for logits in both]
    size = found[0].shape[2:]
    return sum(F.interpolate(p, size, mode="bilinear", align_corners=True) for p in found).div(len(found)).log()


def check_classes(classes, dataset, ckpt):
    """Return a note if the data set names the model's classes differently; an InputError if their number differs."""
    if len(dataset.classes) != len(classes):
        raise InputError(f"{ckpt}: {len(classes)} classes, {dataset.root} has {len(dataset.classes)}; correct --data")
    is_named = classes[0] != "class 0"  # published files without VOC's 21 classes have no names
    return f"{dataset.root} names its classes differently from {ckpt}; " * (is_named and classes != dataset.classes)


def palette_image(ids, size, palette):
    """Return class ids (H,W), without their padding, as a PIL image of mode P. size: (W,H)."""
    image = Image.fromarray(np.asarray(ids)[:size[1], :size[0]]).convert("P")
    image.putpalette(palette)
    return image


def draw_examples(examples, palette):
    """Return a PIL image: for each (sample, ids (H,W)), a row of image, label and prediction, 240 pixels wide each."""
    rows = []
    for sample, ids in examples:
        image = data.read_image(sample.image)
        maps = (palette_image(x, image.size, palette) for x in (data.read_label(sample.label, image.size), ids))
        size = 240, round(240 * image.height / image.width)
        rows.append(np.hstack([np.asarray(x.convert("RGB").resize(size)) for x in (image, *maps)]))
    return Image.fromarray(np.vstack(rows))


def find_images(names):
    """Return the paths of all images that the arguments name: files, and folders at any depth."""
    found = []
    for name in map(Path, names):
        more = [name]
        if name.is_dir():
            more = sorted(f for f in name.rglob("[!.]*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not more:
            raise InputError(f"{name}: no images there; name files, or folders of {' '.join(IMAGE_SUFFIXES)}")
        found += more
    return found


def check_images(paths, files, out):
    """Raise an InputError if one of the files to write would overwrite an image or another of them."""
    counts = Counter(path.resolve() for path in [*files, *paths])
    if taken := [file for file, n in counts.items() if n > 1]:
        raise InputError(f"--out {out}: {taken[0].name} would be written twice or overwrite an image; rename the "
                         "image, or change --out")


def draw_legend(classes, palette):
    """Return an image of the classes' colours beside their names."""
    draw = ImageDraw.Draw(image := Image.new("RGB", (260, 8 + 24 * len(classes)), "white"))
    for k, name in enumerate(classes):
        draw.rectangle((8, 8 + 24 * k, 32, 24 + 24 * k), tuple(palette[3 * k:3 * k + 3]), "grey")
        draw.text((42, 9 + 24 * k), name, "black")
    return image


def measure(path, seg, logits, ids, pooled):
    """Return the Measured of an image. logits: (K,h,w); ids: (H,W) uint8, without padding; pooled: [(C,), ...]."""
    rows, columns = (math.ceil(n * seg.input_scale / seg.stride) for n in ids.shape)
    probabilities = logits[:, :rows, :columns].float().softmax(0).cpu()
    shares = np.bincount(ids.ravel(), minlength=len(logits))[:len(logits)] / ids.size
    uncertain = entropy(probabilities)
    return Measured(path, torch.stack(pooled).mean(0), uncertain, mean_over_classes(uncertain, probabilities),
                    probabilities.amax(0).mean().item(), shares.tolist())


def labelled_images(ckpt, data_root):
    """Return the paths of the images on which a run was trained; none if its labelled.txt or its data are not there."""
    file = Path(ckpt).parent / "labelled.txt"
    try:
        images = open_dataset(data_root).images
        return [images[name] for name in read_lines(file)]
    except (InputError, KeyError):
        print(f"the labelled images are not compared with: {file} or its data set is not there")
        return []


@torch.inference_mode()
def main(args):
    checkpoint = read_checkpoint(args.ckpt, "--ckpt")
    seg = model.load_segmenter(args.ckpt, checkpoint)
    amp = checkpoint["args"].get("amp") if args.amp is None else args.amp
    export = exporters.WRITERS.get(args.format)
    if export and args.blend:
        raise InputError(f"--blend: not with --format {args.format}, which is one file; leave it out")
    if args.rank and (export or distributed.WORLD_SIZE > 1):
        raise InputError("--rank: works with --format palette and without torchrun; run it so")
    out = exporters.check_export(args.out, args.format, seg.classes) if export else output_folder("--out", args.out)
    folder = out.with_name(f".{out.name}.labels") if export else out
    paths = find_images(args.images)
    device = announce(f"data {len(paths)} images", args.gpu, ops.describe)
    labels, legend = [folder / f"{path.stem}.png" for path in paths], folder / "legend.png"
    blends = [folder / f"{path.stem}_blend.jpg" for path in paths] if args.blend else []
    check_images(paths, labels + blends + [legend] * (not export), out)
    seg.to(device)
    mine = [*zip(paths, labels)][distributed.RANK::distributed.WORLD_SIZE]
    counts = torch.zeros(2, dtype=torch.int64)  # pixels: unlabelled, all
    pooled, measured = [], []  # features of an image, one mean for each window; what was measured of all images
    if args.rank:
        seg.head[0].register_forward_pre_hook(lambda _, x: pooled.append(x[0].float().mean((0, 2, 3)).cpu()))

    def predict(path):
        image = data.read_image(path)
        pixels, size = data.pad_to_stride(image, seg.stride, seg.input_scale)
        logits = predict_logits(seg, pixels[None], amp, args.window, args.tta)
        ids = (ops.upsample_argmax(logits, size) if args.min_confidence is None else
               ops.pseudo_labels(logits, size, args.min_confidence))
        prediction = palette_image(ids[0].cpu(), image.size, seg.palette)
        if args.rank:
            measured.append(measure(path, seg, logits[0], np.asarray(prediction), pooled))
            pooled.clear()
        return image, prediction
    try:
        for path, label in progress(mine, len(mine), "prediction"):
            image, prediction = predict(path)
            histogram = prediction.histogram()
            counts += torch.tensor([histogram[IGNORE], sum(histogram)])
            write_atomically(label, lambda f: prediction.save(f, "PNG"))
            if args.blend:
                blend = Image.blend(image, prediction.convert("RGB"), 0.5)
                write_atomically(folder / f"{path.stem}_blend.jpg", lambda f: blend.save(f, "JPEG", quality=92))
        unlabelled, total = distributed.all_reduce_sum(counts).tolist()  # all ranks have written their part
        if distributed.RANK == 0 and export:
            export(out, paths, labels, seg.classes, seg.palette)
        elif distributed.RANK == 0:
            write_atomically(legend, lambda f: draw_legend(seg.classes, seg.palette).save(f, "PNG"))
        if args.rank:
            labelled = labelled_images(args.ckpt, checkpoint["args"].get("data"))
            for path in progress(labelled, len(labelled), "labelled images"):
                predict(path)
            write_ranking(out, measured[:len(paths)], measured[len(paths):], seg.classes, seg.palette,
                          data.read_image)
    finally:
        if export and distributed.RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)
    share = f", {100 * unlabelled / total:.1f} % of the pixels unlabelled" * (args.min_confidence is not None)
    print(f"{len(paths)} predictions in {out}{share}")


if __name__ == "__main__":
    launch(main, flags)
