"""What a net says of pictures: its logits, for eval.py and report.py, and the files that `eval.py --images` writes."""
import collections
import contextlib
import glob
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

import cli
import data
import model
import parallel
from csrc import ops

SCALES = 1, 0.75, 1.25  # of --tta, each also flipped
WINDOW = 2049  # the largest side that goes to the net at once, in pixels


def logits(seg, pixels, args, device):
    """Logits (N,K,h,w) of what data.for_net gave, pixels (N,3,H,W) uint8; `args` are the training's.

    With args.tta the logarithm of the mean probabilities over SCALES and flips. Larger sides than args.window are cut
    into windows that overlap by half, where logits are averaged.
    """
    pixels, stride = pixels.to(device), args.stride
    side = (getattr(args, "window", 1 << 30) - 1) // stride * stride + 1

    def net(view):
        with model.autocast(args.amp, device, args.backbone):
            return seg(seg.normalise(view))

    def in_windows(view):
        height, width = view.shape[2:]
        if max(height, width) <= side:
            return net(view)
        total, half = 0, side // 2 // stride * stride
        tops, lefts = ([*range(0, n - side, half), max(0, n - side)] for n in (height, width))
        for y, x in itertools.product(tops, lefts):
            window = view[:, :, y:y + side, x:x + side]
            here = net(window).float()  # (N,K,h,w)
            step = (window.shape[2] - 1) // (here.shape[2] - 1)
            place = (x // step, (width - 1) // step + 1 - x // step - here.shape[3],
                     y // step, (height - 1) // step + 1 - y // step - here.shape[2])
            total = total + F.pad(torch.cat([here, torch.ones_like(here[:, :1])], 1), place)  # the last counts
        return total[:, :-1] / total[:, -1:]

    if not getattr(args, "tta", False):
        return in_windows(pixels)
    found, size = [], None
    for scale in SCALES:
        view = data.resize(pixels, [round((n - 1) / stride * scale) * stride + 1 for n in pixels.shape[2:]])
        for flip in (False, True):
            p = in_windows(view.flip(3) if flip else view).float().softmax(1)
            size = size or p.shape[2:]
            found.append(F.interpolate(p.flip(3) if flip else p, size, mode="bilinear", align_corners=True))
    return torch.stack(found).mean(0).log()


def same_classes(classes, dataset, ckpt):
    """A note for a run's first line where the data set names the net's classes otherwise. Errors: InputError."""
    if len(dataset.classes) != len(classes):
        raise cli.InputError(f"{ckpt}: has {len(classes)} classes, {dataset.root} has {len(dataset.classes)}; name the "
                             "data it was trained on with --data")
    renamed = classes != dataset.classes and classes[0] != "class 0"  # of a file that names none
    return f"{dataset.root} names its classes otherwise than {ckpt}; " if renamed else ""


@torch.inference_mode()
def images(seg, paths, args, device, classes, out, blend):
    """Write the prediction of each picture to `out`/STEM.png; `args` are the training's. blend: also laid over it.

    Errors: InputError, before any is written.
    """
    names, given = [f"{path.stem}.png" for path in paths], {path.resolve() for path in paths}
    counts = collections.Counter(names)
    for path, name in zip(paths, names):
        if name == "legend.png":
            raise cli.InputError(f"--images {path}: {out / name} is the legend's name; rename the picture")
        if counts[name] > 1:
            raise cli.InputError(f"--images: two pictures are named {name[:-4]}, both to be {out / name}; rename one")
        files = [out / name, out / f"{path.stem}_blend.jpg"][:1 + blend]
        if lost := given & {file.resolve() for file in files}:
            raise cli.InputError(f"--out {out}: the prediction would overwrite {lost.pop()}; name another folder")
        upright(path)  # all are sound before one is predicted
    seg, mine = seg.to(device), [*zip(paths, names)][parallel.RANK::parallel.WORLD]
    with drafts_of(out) as drafts:
        for path, name in cli.progress(mine, len(mine), "prediction"):
            picture = upright(path)
            pixels, size = data.for_net(picture, args)
            ids = ops.upsample_argmax(logits(seg, pixels[None], args, device), size)[0].cpu()
            drawn = palette_png(ids, picture.size, args.palette)
            with cli.writing(f"--out {out}"):
                drawn.save(drafts / name)
                if blend:
                    Image.blend(picture, drawn.convert("RGB"), 0.5).save(drafts / f"{path.stem}_blend.jpg", quality=92)
        if parallel.RANK == 0:
            with cli.writing(f"--out {out}"):
                legend(classes, args.palette).save(drafts / "legend.png")
        parallel.total(torch.zeros(1))  # no file moves before all processes have drawn theirs
    print(f"{len(names)} predictions in {out}")


def named(words):
    """The files that --images names: files, globs, and folders with their pictures at any depth. Errors: InputError."""
    found = []
    for word in words:
        if Path(word).is_dir():
            more = sorted(f for f in Path(word).rglob("[!.]*") if f.suffix.lower() in data.PICTURES)
        elif Path(word).exists() or not glob.has_magic(word):
            more = [Path(word)]
        else:
            more = [f for f in map(Path, sorted(glob.glob(word, recursive=True))) if f.is_file()]
        if not more:
            raise cli.InputError(f"--images {word}: nothing there; name files, or folders of {' '.join(data.PICTURES)}")
        found += more
    return found


def upright(path):
    """The picture at `path`, turned as its EXIF orientation says. Errors: InputError."""
    with data.reading(path):
        return ImageOps.exif_transpose(data.read_picture(path))


def palette_png(ids, size, palette):
    """Class ids (H,W) without their padding as a mode P picture; size is (W,H)."""
    image = Image.fromarray(np.asarray(ids)[:size[1], :size[0]]).convert("P")
    image.putpalette(palette)
    return image


def legend(classes, palette):
    """The colours of the classes beside their names."""
    image = Image.new("RGB", (260, 8 + 24 * len(classes)), "white")
    draw = ImageDraw.Draw(image)
    for k, name in enumerate(classes):
        draw.rectangle((8, 8 + 24 * k, 32, 24 + 24 * k), tuple(palette[3 * k:3 * k + 3]), "grey")
        draw.text((42, 9 + 24 * k), name, "black")
    return image


def overview(rows):
    """One picture of rows (picture, label, prediction), each shown 240 pixels wide."""
    def small(picture):
        return np.asarray(picture.convert("RGB").resize((240, round(240 * picture.height / picture.width))))
    return Image.fromarray(np.vstack([np.hstack([*map(small, row)]) for row in rows]))


@contextlib.contextmanager
def drafts_of(out):
    """A folder to write to; at the end, and only then, its files move to `out`. Errors: InputError."""
    with cli.writing(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        drafts = tempfile.TemporaryDirectory(dir=out if out.is_dir() else out.parent, prefix=f".{out.name}-")
    with drafts:
        yield Path(drafts.name)
        with cli.writing(f"--out {out}"):
            out.mkdir(exist_ok=True)
            for file in Path(drafts.name).iterdir():
                file.replace(out / file.name)
