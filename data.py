"""Reading images and labels, augmentation, the training and evaluation data sets, batches on the device.

Which files make up a data set is in common/layouts.py.
"""
import atexit
import functools
import math
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

from common import distributed, layouts
from common.console import InputError, catch_read_errors, progress
from common.label_formats import shorten, upright_size
from common.layouts import IGNORE, Label  # noqa: F401  (read_label takes a Label)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

PADDING = (124, 116, 104)  # ImageNet's mean colour: close to 0 after normalisation
INSPECTED = 2000  # labels that are inspected before training, at most


def read_image(path):
    """Return the image at `path` as a PIL image in RGB, turned by its EXIF orientation; InputError if unreadable."""
    with catch_read_errors(path):
        image = Image.open(path)
        if image.mode[0] in "IF":  # PIL would clip values above 255
            raise ValueError(f"mode {image.mode}: convert it to 8 bits a channel")
        ImageOps.exif_transpose(image, in_place=True)
        return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies


def read_label(label, size):
    """Return the class ids of a Label, 255 for ignored pixels, (H,W) uint8. size: (W,H) of its image.

    Raises an InputError if the file cannot be read, has another size, or holds values that are not classes.
    """
    with catch_read_errors(label.path):
        image = Image.open(label.path)
        if image.size != size:
            is_turned = image.size == size[::-1]
            raise InputError(f"{label.path}: the label's size {image.size} is not its image's {size}; " + (
                "if the image has an EXIF orientation, the label was drawn on the image as it is stored: remove the "
                "orientation by exiftool -Orientation= IMAGE" if is_turned else "make them equal"))
        if image.mode in ("L", "P"):
            ids = np.array(image)
            if label.colours:
                check_indices(image, label)
            if label.path.endswith("_labelIds.png"):
                ids = cityscapes_ids()[ids]
        elif image.mode in ("RGB", "RGBA") and label.colours:
            colours = np.asarray(image.convert("RGB"))
            ids = colour_ids(label.colours)[colours.astype(np.int32) @ np.array([65536, 256, 1], np.int32)]
            if (ids == 254).any():
                raise InputError(f"{label.path}: colour {' '.join(map(str, colours[ids == 254][0]))} is no class; "
                                 "correct it or name it in classes.txt (NAME R G B, or void R G B to ignore it)")
        else:
            why = ("16 bits are usual for instance masks, one number per object: export semantic masks, one value per "
                   "class" if image.mode[0] == "I" else f"{import_command(label)} reads other kinds")
            raise InputError(f"{label.path}: a label is an 8-bit index image (mode L or P), or a colour image if "
                             f"classes.txt gives each class its own colour; this one is {image.mode}; {why}")
    if ((ids - np.uint8(k := label.num_classes)) < IGNORE - k).any():  # true for ids k .. 254: subtraction wraps
        value, count = ids[(ids >= k) & (ids != IGNORE)][0], len(np.unique(ids))
        convert = import_command(label)
        remedy = ("so many values are those of an instance mask, one number per object (export semantic masks, one "
                  f"value per class), or of grey levels with soft edges ({convert})" if count > max(k + 1, 8) else
                  f"correct it, add the class to classes.txt, or, if the values are grey levels, {convert}")
        raise InputError(f"{label.path}: label value {value} is outside the {k} classes (0..{k - 1}; 255 is ignored); "
                         f"{remedy}")
    return ids


def import_command(label):
    """Return the command that converts the data set of a Label."""
    return f"python prepare.py import {Path(label.path).absolute().parent.parent} --out NEW"


def used_colours(image):
    """Return {value: 65536 R + 256 G + B} of the values in an image of mode L or P."""
    palette = image.getpalette("RGB") if image.mode == "P" else [i for i in range(256) for _ in range(3)]
    return {i: int.from_bytes(palette[3 * i:3 * i + 3], "big") for i, n in enumerate(image.histogram()) if n}


def check_indices(image, label):
    """Raise an InputError if classes.txt gives the colour of a value to another class."""
    known = dict(label.colours)
    for value, code in used_colours(image).items():
        if known.get(code, value) != value:
            colour = " ".join(map(str, code.to_bytes(3, "big")))
            what = "as void" if known[code] == IGNORE else "to another class"
            raise InputError(f"{label.path}: value {value} has the colour {colour}, which classes.txt gives {what}; "
                             f"{import_command(label)} --kind colour if the colours are meant, --kind index if the "
                             "values are")


def foreign_colours(label):
    """Return a Label's used_colours if its palette is neither grey, nor VOC's, nor that of classes.txt, else {}."""
    with Image.open(label.path) as image:
        used = used_colours(image) if image.mode == "P" else {}
    codes, voc, known = list(used.values()), layouts.voc_palette(), dict(label.colours)
    is_grey = codes == sorted(set(codes)) and all(code % 0x010101 == 0 for code in codes)
    fits = all(value == IGNORE or code in known or [*code.to_bytes(3, "big")] == voc[3 * value:3 * value + 3]
               for value, code in used.items())
    return {} if is_grey or fits else used


class Inspection(NamedTuple):
    """What `inspect_label` found."""
    counts: np.ndarray  # (256,) pixels of each value
    foreign: dict  # see foreign_colours
    is_turned: bool  # by EXIF, with the same size: the label's size does not say on which image it was drawn
    error: str  # or ""


def inspect_label(sample):
    """Return the Inspection of a Sample's label."""
    counts, foreign, is_turned = np.zeros(256, int), {}, False
    try:
        size, orientation = upright_size(sample.image)
        counts = np.bincount(read_label(sample.label, size).ravel(), minlength=256)
        foreign = foreign_colours(sample.label)
        is_turned = orientation in (range(2, 9) if size[0] == size[1] else range(2, 5))
        with catch_read_errors(sample.image), Image.open(sample.image) as image, Image.open(sample.label.path) as label:
            if image.mode == label.mode and (counts > 0).sum() > 1 and image.tobytes() == label.tobytes():
                raise InputError(f"{sample.label.path}: has the pixels of its image {sample.image}; one of them is in "
                                 "the wrong folder, replace it")
        return Inspection(counts, foreign, is_turned, "")
    except InputError as e:
        return Inspection(counts, foreign, is_turned, str(e))


def find_problems(samples, inspections, dataset):
    """Return (errors, warnings), one-line texts, about the labels of Samples. inspections: one for each of them."""
    errors, warnings = [x.error for x in inspections if x.error], []
    total = sum((x.counts for x in inspections), np.zeros(256, int))
    convert = f"python prepare.py import {dataset.root} --out NEW"
    is_empty = total[IGNORE] and not total[1:IGNORE].any() and not any_other_class(dataset)
    if is_empty:
        errors.append(f"{dataset.label_dir}: the labels hold only 0 and 255, and 255 is ignored, so that there is no "
                      f"class but {dataset.classes[0]}; if 255 is a class: {convert}")
    if foreign := [n for n, x in enumerate(inspections) if x.foreign]:
        colours = {pair for n in foreign for pair in inspections[n].foreign.items()}
        text = (f"{samples[foreign[0]].label.path}: its palette is neither grey, nor VOC's, nor that of classes.txt, "
                f"so that its values may be a paint program's; if they are class ids, run {convert} --kind index; if "
                "the colours are the classes, give each class its R G B in classes.txt")
        is_error = dataset.label_dir.name == "labels" or len(colours) > len(dict(colours))  # differs between files
        (errors if is_error else warnings).append(text)
    if total[IGNORE] > total.sum() / 2:
        warnings.append(f"{total[IGNORE] / total.sum():.0%} of the labels' pixels are 255 (ignored); that is normal "
                        f"for scribbles; if 255 is a class: {convert}")
    if samples and not is_empty and (absent := [name for k, name in enumerate(dataset.classes) if not total[k]]):
        warnings.append(f"none of these {len(samples):,} labels shows {shorten(absent)}; label an image that does")
    if turned := [n for n, x in enumerate(inspections) if x.is_turned]:
        warnings.append(f"{len(turned):,} images, such as {samples[turned[0]].image}, have an EXIF orientation; their "
                        "labels are taken to lie on the upright image, as annotation tools show it")
    if alone := sorted(dataset.labels.keys() - dataset.images.keys()):
        warnings.append(f"{len(alone):,} labels, such as {dataset.labels[alone[0]]}, have no image of their name in "
                        f"{dataset.image_dir} ({' '.join(layouts.IMAGE_SUFFIXES)})")
    if dataset.kind == "voc" and dataset.label_dir.name == "labels":
        warnings.append(f"{dataset.root} has no classes.txt, so that its classes are VOC's 21; if they are others, "
                        "write one name a line, in the order of their ids, to classes.txt")
    return errors, warnings


def any_other_class(dataset):
    """Return whether a class other than the first is in about 50 labels of a data set that can be read."""
    ids = sorted(dataset.labels.keys() & dataset.images.keys())
    samples = dataset.samples(ids[::max(1, len(ids) // 50)])
    return any(inspect_label(sample).counts[1:IGNORE].any() for sample in samples)


def inspect_labels(samples, dataset, workers=2):
    """Check the labels of Samples, or of 1,000 to 2,000 of them if there are more, and print warnings; on every rank.

    Returns the number of pixels of each class (K,) int64. Raises an InputError if the labels cannot mean what the user
    thinks; see find_problems.
    """
    began, samples = time.monotonic(), samples[::math.ceil(len(samples) / INSPECTED)]
    inspections = map_in_parallel(inspect_label, samples, "inspecting labels", workers)
    errors, warnings = find_problems(samples, inspections, dataset)
    if errors:
        more = f" ({len(errors) - 1:,} more: python prepare.py check --data {dataset.name})" if len(errors) > 1 else ""
        raise InputError(errors[0] + more)
    print(*(f"warning: {text}" for text in warnings), sep="\n", end="\n" * bool(warnings))
    if (seconds := time.monotonic() - began) > 2:
        print(f"inspected {len(samples):,} labels in {seconds:.1f} s", flush=True)
    return torch.from_numpy(sum(x.counts for x in inspections)[:len(dataset.classes)])


@functools.lru_cache
def colour_ids(colours):
    """Return a table (2**24,) uint8 from a colour's code to its class id, 254 if it is no class's."""
    table = np.full(2**24, 254, np.uint8)
    table[[code for code, _ in colours]] = [i for _, i in colours]
    return table


@functools.lru_cache
def cityscapes_ids():
    """Return a table (256,) uint8 from Cityscapes' label ids to its 19 train ids, 255 for ignored ones."""
    from torchvision.datasets import Cityscapes
    table = np.arange(256, dtype=np.uint8)  # other ids are above 18, so read_label rejects them
    # licence plates have the ids -1, which is the index 255, and -1 % 256
    table[[c.id for c in Cityscapes.classes]] = [c.train_id % 256 for c in Cityscapes.classes]
    return table


def resize(images, size):
    """Resize (N,3,H,W) uint8 images bilinearly to `size` (h,w), with antialiasing if they shrink."""
    if images.device.type != "cpu":  # no uint8 there
        return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round().byte()
    images = images.contiguous(memory_format=torch.channels_last)  # twice as fast as planes
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def random_geometry(size, crop, factor, rng):
    """Return a random crop of an image of `size` (W,H) scaled by `factor`, as (box, (w,h), flip). rng: a random.Random.

    The box (left, top, right, bottom) of the image becomes w x h pixels, at most crop x crop, mirrored if flip is True.
    """
    out = [min(max(1, round(side * factor)), crop) for side in size]
    spans = [min(side, max(1, round(n / factor))) for side, n in zip(size, out)]
    start = [rng.randint(0, side - span) for side, span in zip(size, spans)]
    return (*start, *(n + span for n, span in zip(start, spans))), tuple(out), rng.random() < 0.5


def place_image(image, geometry, canvas):
    """Apply a random_geometry to a PIL image; return (crop,crop,3) uint8, padded with the pixels of `canvas`."""
    box, (w, h), flip = geometry
    pixels = torch.from_numpy(np.array(image.crop(box)))  # (H,W,3)
    pixels = resize(pixels.permute(2, 0, 1)[None], (h, w))
    canvas = canvas.clone()
    canvas[:h, :w] = (pixels.flip(3) if flip else pixels)[0].permute(1, 2, 0)
    return canvas


def place_label(ids, geometry, crop):
    """Apply a random_geometry to (H,W) class ids, by nearest pixel; return (crop,crop) uint8, 255 on padding."""
    (left, top, right, bottom), (w, h), flip = geometry
    rows = (top + (np.arange(h) + 0.5) * (bottom - top) / h).astype(int)
    columns = (left + (np.arange(w) + 0.5) * (right - left) / w).astype(int)
    canvas = np.full((crop, crop), IGNORE, np.uint8)
    canvas[:h, :w] = ids[rows][:, columns[::-1] if flip else columns]
    return torch.from_numpy(canvas)


class TrainDataset(torch.utils.data.Dataset):
    """Endless random crops of Samples. Item n is a pure function of (seed, name, n); an epoch is a shuffle of all.

    An item is an image (crop,crop,3) uint8 and its label (crop,crop) uint8, 255 on padding; or, for samples without
    labels, (crop,crop) bool, False on padding. scale: (low, high) of the random scaling, on top of input_scale.
    """

    def __init__(self, samples, name, seed, crop, scale=(0.5, 1.5), input_scale=1):
        self.samples, self.crop, self.scale = samples, crop, [s * input_scale for s in scale]
        self.canvas = torch.tensor(PADDING, dtype=torch.uint8).repeat(crop, crop, 1)
        self.key, self.order = f"{seed}/{name}", (None, None)
        if not samples:
            raise InputError("--split, --labelled-ids: no image is left unlabelled; lower --split or add --unlabelled")

    def __getitem__(self, n):
        epoch, position = divmod(n, len(self.samples))
        if self.order[0] != epoch:
            order = list(range(len(self.samples)))
            random.Random(f"{self.key}/epoch {epoch}").shuffle(order)
            self.order = epoch, order
        sample = self.samples[self.order[1][position]]
        rng = random.Random(f"{self.key}/draw {n}")
        image = read_image(sample.image)
        geometry = random_geometry(image.size, self.crop, rng.uniform(*self.scale), rng)
        ids = read_label(sample.label, image.size) if sample.label else np.zeros(image.size[::-1], np.uint8)
        label = place_label(ids, geometry, self.crop)
        return place_image(image, geometry, self.canvas), label if sample.label else label != IGNORE


def batches(samples, name, *, seed, batch_size, iters, crop, scale, input_scale, workers, start, device):
    """Return an iterator over this rank's part of each batch, from step `start` + 1 to `iters`, on `device`.

    A part is (images (B,3,crop,crop) uint8 in channels_last memory, labels (B,crop,crop)); see TrainDataset. batch_size
    counts all ranks. The whole batch does not depend on the number of workers and ranks. Call it before creating the
    networks: forked workers would copy them.
    """
    dataset, size = TrainDataset(samples, name, seed, crop, scale, input_scale), batch_size // distributed.WORLD_SIZE
    first = size * distributed.RANK  # this rank's part of a batch begins there
    items = [step * batch_size + n for step in range(start, iters) for n in range(first, first + size)]
    loaded = iter(loader(dataset, workers, batch_size=size, sampler=items, pin_memory=device.type == "cuda"))
    return ((pixels.permute(0, 3, 1, 2).to(device, non_blocking=True), other.to(device, non_blocking=True))
            for pixels, other in loaded)


def batch_generators(key, step, count):
    """Return a random.Random for each of the `count` images of this rank in a step's batch."""
    first = ((step - 1) * distributed.WORLD_SIZE + distributed.RANK) * count
    return [random.Random(f"{key}/draw {n}") for n in range(first, first + count)]


def strong_view(images, seed, step):
    """Return this rank's images (B,3,H,W) uint8 with random colours, greyscale and blur, as in UniMatch (Yang 2023).

    They are torchvision's up to rounding, but of all images at once, for few kernel launches.
    """
    draws = []
    for rng in batch_generators(f"{seed}/strong", step, len(images)):
        has_jitter = rng.random() < 0.8
        factors = [rng.uniform(0.5, 1.5) for _ in range(3)] + [rng.uniform(-0.25, 0.25)] if has_jitter else [1, 1, 1, 0]
        is_grey = rng.random() < 0.2
        draws.append([*factors, not is_grey, rng.uniform(0.1, 2) if rng.random() < 0.5 else 1e-3])  # 1e-3: no blur
    draws = torch.tensor(draws).to(images.device, non_blocking=True)  # (B,6)
    brightness, contrast, saturation, hue, colour, sigma = draws[:, :, None, None, None].unbind(1)  # (B,1,1,1) each
    x = (images.contiguous() * brightness).clamp(max=255).floor()  # whole numbers after each change
    x = blend(x, to_grey(x).mean((1, 2, 3), keepdim=True), contrast)
    x = rotate_hue(blend(x, to_grey(x), saturation), hue)
    x = to_grey(x).lerp(x, colour)
    distance = torch.arange(-4, 5, device=x.device) / sigma  # (B,1,1,9)
    kernel = (distance.square() / -2).softmax(3).repeat_interleave(3, 0)  # (3B,1,1,9)
    x = F.pad(x, [4] * 4, mode="reflect").flatten(0, 1)[None]  # (1,3B,H+8,W+8)
    with torch.autocast(x.device.type, enabled=False):
        x = F.conv2d(x, kernel.mT * kernel, groups=len(kernel))
    return x.round().byte().view(images.shape)


def blend(images, others, ratio):
    """Return images * ratio + others * (1 - ratio) as whole numbers in 0..255."""
    return torch.lerp(others, images, ratio).clamp(0, 255).floor()


def to_grey(images):
    """Return the luminance (B,1,H,W) of images (B,3,H,W) with values in 0..255, rounded down."""
    red, green, blue = images.split(1, 1)
    return (0.2989 * red).add(green, alpha=0.587).add(blue, alpha=0.114).floor()


def rotate_hue(images, turns):
    """Return images (B,3,H,W) with values in 0..255 whose hue is rotated by `turns` (B,1,1,1), as whole numbers."""
    offsets = torch.arange(0, 6, 2, device=images.device).view(3, 1, 1)
    low, (high, largest) = images.amin(1, keepdim=True), images.max(1, keepdim=True)  # argmax is slow on the CPU
    chroma = high - low  # (B,1,H,W)
    # hue in sixths of a turn, as it follows from each channel if that is the largest one
    hues = (images.roll(-1, 1) - images.roll(-2, 1)) / chroma.clamp(min=1) + offsets  # (B,3,H,W)
    hue = hues.gather(1, largest) + 6 * turns
    distance = (hue - offsets).abs()  # to pure red, green and blue, up to 6.5 on a circle of 6
    saturated = ((distance - 3).abs() - 1).clamp(0, 1)  # (B,3,H,W): 1 up to a distance of 1, 0 from 2 to 4
    return ((low + chroma * saturated) * (255.999 / 255)).floor()


def cut_mix(tensors, probability, seed, step):
    """Return the tensors (B,...,H,W) of one batch with, for each image with `probability`, a box of its neighbour.

    The box, the same in all tensors, has 2 to 40 % of the area (UniMatch, Yang 2023). Neighbours are images 0 and 1 of
    this rank, 2 and 3, and so on. The result depends on seed, step and position only.
    """
    mixed, count, (height, width) = [x.clone() for x in tensors], len(tensors[0]), tensors[0].shape[-2:]
    for i, rng in enumerate(batch_generators(f"{seed}/mix", step, count)):
        if rng.random() >= probability:
            continue
        area, ratio = rng.uniform(0.02, 0.4), math.exp(rng.uniform(-1.2, 1.2))
        h, w = (min(round(side * math.sqrt(x)), side) for side, x in ((height, area * ratio), (width, area / ratio)))
        y, x = rng.randint(0, height - h), rng.randint(0, width - w)
        for new, old in zip(mixed, tensors):
            new[i, ..., y:y + h, x:x + w] = old[(i ^ 1) % count, ..., y:y + h, x:x + w]
    return mixed


class EvalDataset(torch.utils.data.Dataset):
    """Whole images: (network input (3,h,w) uint8, label (H,W) uint8 with 255 on padding); see pad_to_stride."""

    def __init__(self, samples, stride, input_scale=1):
        self.samples, self.stride, self.input_scale = samples, stride, input_scale

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        image = read_image(self.samples[i].image)
        ids = torch.from_numpy(read_label(self.samples[i].label, image.size))
        pixels, (height, width) = pad_to_stride(image, self.stride, self.input_scale)
        return pixels, F.pad(ids, (0, width - image.width, 0, height - image.height), value=IGNORE)


def pad_to_stride(image, stride, input_scale=1):
    """Pad a PIL image on the right and below to (H,W), shrink it for the network; return ((3,h,w) uint8, (H,W)).

    h, w are stride*k+1 and H, W are stride/input_scale*k+1, with k >= 1. Shrinking aligns the edges of the images, not
    the centres of the corner pixels: at input_scale 0.5 align_corners=True is half a pixel off, at 0.25 1.5 pixels.
    """
    multiple = round(stride / input_scale)
    steps = [max(1, math.ceil((n - 1) / multiple)) for n in (image.height, image.width)]
    padded = ImageOps.expand(image, (0, 0, *(multiple * k + 1 - n for k, n in zip(steps[::-1], image.size))), PADDING)
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1)
    if input_scale != 1:
        pixels = resize(pixels[None], [stride * k + 1 for k in steps])[0]
    return pixels, (padded.height, padded.width)


def loader(dataset, workers, **more):
    """Return a DataLoader that does not use the global random generator and whose workers ignore stop signals."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals,
                                       generator=torch.Generator(), **more)


def map_in_parallel(function, items, description, workers):
    """Return [function(item)] in order, computed by `workers` processes, with a progress bar; a few items need none."""
    if len(items) <= 20:
        return [function(item) for item in items]
    return list(progress(loader(items, workers, batch_size=None, collate_fn=function), len(items), description))


def ignore_signals(_):
    """Leave stop signals, which a whole process group receives, to the script: it finishes its step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """End the workers at exit: multiprocessing would send the SIGTERM that they ignore, and wait."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would report a crash
        worker.kill()
