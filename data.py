"""Reading images and labels, augmentation, the training and evaluation data sets, batches on the device.

Which files make up a data set is in common/layouts.py.
"""
import atexit
import functools
import math
import multiprocessing
import random
import signal

from common import distributed
from common.console import InputError, catch_read_errors
from common.layouts import IGNORE, Label  # noqa: F401  (read_label takes a Label)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

PADDING = (124, 116, 104)  # ImageNet's mean colour: close to 0 after normalisation


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
            raise InputError(f"{label.path}: the label's size {image.size} is not its image's {size}; make them equal")
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
            raise InputError(f"{label.path}: a label is an 8-bit index image (mode L or P), or a colour image if "
                             f"classes.txt gives each class its own colour; this one is {image.mode}; convert it")
    if ((ids - np.uint8(k := label.num_classes)) < IGNORE - k).any():  # true for ids k .. 254: subtraction wraps
        value = ids[(ids >= k) & (ids != IGNORE)][0]
        raise InputError(f"{label.path}: label value {value} is outside the {k} classes (0..{k - 1}; 255 is ignored); "
                         "correct it or add the class to classes.txt")
    return ids


def check_indices(image, label):
    """Raise an InputError if the values of an index image look like colours rather than class ids."""
    used = [i for i, n in enumerate(image.histogram()) if n]
    palette, known = (image.getpalette("RGB") if image.mode == "P" else None), dict(label.colours)
    for i in used if palette else set(used) & {255}:
        r, g, b = palette[3 * i:3 * i + 3] or (0, 0, 0) if palette else (i, i, i)
        if known.get(r << 16 | g << 8 | b, i) != i:
            raise InputError(f"{label.path}: value {i} has the colour {r} {g} {b}, which classes.txt gives to another "
                             "class; if the colours are meant, save it as RGB; if the values are, as mode L")


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
    if images.is_cuda:  # no uint8 there
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
    """Return this rank's images (B,3,H,W) uint8 with random colours, greyscale and blur, as in UniMatch (Yang 2023)."""
    views = []
    with torch.autocast(images.device.type, enabled=False):  # the blur is a convolution
        for view, rng in zip(images, batch_generators(f"{seed}/strong", step, len(images))):
            if rng.random() < 0.8:
                for adjust in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
                    view = adjust(view, rng.uniform(0.5, 1.5))
                view = TF.adjust_hue(view, rng.uniform(-0.25, 0.25))
            if rng.random() < 0.2:
                view = TF.rgb_to_grayscale(view, 3)
            if rng.random() < 0.5:
                view = TF.gaussian_blur(view, [9, 9], [rng.uniform(0.1, 2)])
            views.append(view)
    return torch.stack(views)


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

    h, w are stride*k+1 and H, W are stride/input_scale*k+1. Shrinking aligns the edges of the images, not the centres
    of the corner pixels: at input_scale 0.5 align_corners=True is half a pixel off, at 0.25 1.5 pixels.
    """
    multiple = round(stride / input_scale)
    steps = [math.ceil((n - 1) / multiple) for n in (image.height, image.width)]
    padded = ImageOps.expand(image, (0, 0, *(multiple * k + 1 - n for k, n in zip(steps[::-1], image.size))), PADDING)
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1)
    if input_scale != 1:
        pixels = resize(pixels[None], [stride * k + 1 for k in steps])[0]
    return pixels, (padded.height, padded.width)


def loader(dataset, workers, **more):
    """Return a DataLoader that does not use the global random generator and whose workers ignore stop signals."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals,
                                       generator=torch.Generator(), **more)


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
