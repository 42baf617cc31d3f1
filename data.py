"""Pictures and labels: layouts, the split, the joint transform, the streams, batches on the device.

    python data.py {voc,cityscapes,camvid,check,split,bench} --help      (prepare.py)
"""
import atexit
import contextlib
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import random
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import parallel
import shapes
from cli import InputError, launch, writing

IGNORE = 255
VOC_ROOT, SHAPES_ROOT = Path("data/VOC2012"), Path("data/shapes")
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
PADDING = (124, 116, 104)  # ImageNet's mean colour: close to 0 where pixels are normalised
PICTURES = (".jpg", ".jpeg", ".png")
PICTURE_DIRS = ("JPEGImages", "img", "images")
LABEL_DIRS = ("SegmentationClassAug", "SegmentationClass", "cls", "labels")
LIST_DIRS, TRAIN_LISTS = ("ImageSets/Segmentation", "lists", "."), ("train_aug", "trainaug", "train")

# What a training takes where no flag says otherwise: the paper's settings, or what trains in minutes on a CPU. There D
# is slower: at the paper's rate it wins by step 60 (CamVid: `loss_d` 0.04), and hardly an unlabelled pixel is trusted.
VOC_DEFAULTS = dict(backbone="resnet101", init="imagenet", crop=321, batch_size=10, iters=20000, lr=2.5e-4,
                    d_lr=1e-4, d_smooth=0.0, lam_semi=0.1, scale=[0.5, 1.5], input_scale=1)
CITYSCAPES_DEFAULTS = VOC_DEFAULTS | dict(crop=513, batch_size=2, iters=40000, scale=[1, 1], input_scale=0.5)
SHAPES_DEFAULTS = VOC_DEFAULTS | dict(backbone="resnet18", init="none", crop=97, batch_size=4, iters=320, lr=2e-3,
                                      d_lr=3e-5, d_smooth=0.1, lam_semi=0.5, eval_every=160)


def laptop_defaults(dataset, given):
    """Defaults for a folder of one's own without CUDA: what trains for about 20 minutes on 2 cores.

    Pictures are halved where their longer side, in the median, is above 320 pixels, and quartered above 640; crops are
    at most 161. The dataset's note tells what was chosen, but for what is in `given`, the flags that have a value.
    """
    # steps a second at crop 161 of train_semi, train_match, train_adv and train_base
    rate = 0.85 if "lam_adv_u" in given else 1.2 if "ema" in given else 2 if "d_input" in given else 3
    sizes = []
    for path in list(dataset.pictures.values())[::max(1, len(dataset.pictures) // 50)]:
        with reading(path), Image.open(path) as picture:
            sizes.append(picture.size)
    short, long = (int(np.median([pick(size) for size in sizes])) for pick in (min, max))
    scale = given.get("input_scale") or next((x for x in (1, 0.5) if long * x <= 320), 0.25)
    crop = given.get("crop") or 16 * max(4, min(10, int(short * scale) // 16)) + 1
    iters = max(100, round(12 * rate * (161 / crop) ** 2) * 100)
    chosen = dict(backbone="efficientnet_lite0", crop=crop, input_scale=scale, batch_size=8, iters=iters)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in chosen.items()
             if name not in given and value != VOC_DEFAULTS[name]]
    if words:
        timed = not {"iters", "backbone", "stride", "batch_size"} & set(given)
        time = ", for about 20 minutes on 2 cores" if timed else ""
        dataset.note += (f"there is no CUDA here, so {' '.join(words)}{time}; the paper's settings are in "
                         "@recipes/paper_voc_semi.txt\n")
    short = {name: SHAPES_DEFAULTS[name] for name in ("lr", "d_lr", "d_smooth", "lam_semi")}  # the paper's D would win
    return VOC_DEFAULTS | chosen | short


class Label(NamedTuple):
    """A label file and what may stand in it: ids below num_classes, or the colours ((65536 R + 256 G + B, id), ...)."""

    path: str
    num_classes: int
    colours: tuple


@dataclass
class Data:
    """An opened data set: names and colours of its classes, and where the picture and the label of an id lie."""

    name: str
    root: Path
    classes: list
    palette: list  # 768 numbers, as PIL's putpalette takes them
    colours: tuple  # of a Label; empty where classes.txt does not give one for every class
    defaults: dict
    own: bool  # whether it is a folder of the user's own, with classes.txt
    pictures: dict  # id -> path
    labels: dict  # id -> path
    picture_dir: Path
    label_dir: Path
    drawn: dict  # list -> ids, where the folder has no lists: see draw_lists
    note: str  # for the start of a run's first line: that `shapes` stands in for VOC, or that lists were drawn

    def ids(self, *names):
        """Ids of the first list of `names` that exists: the folder's, a drawn one, or a file. Errors: InputError."""
        for find in (lambda name: find_list(self.root, name), self.drawn.get, Path):
            for found in map(find, names):
                if isinstance(found, list):
                    return found
                if found and found.is_file():
                    return read_ids(found)
        advice = "" if (self.root / "classes.txt").is_file() else "; a folder of your own needs classes.txt as well"
        if self.picture_dir.name == "leftImg8bit":
            advice = f", or let python data.py cityscapes --root {self.root}"
        raise InputError(f"{self.root / LIST_DIRS[0]}: no list {' or '.join(f'{n}.txt' for n in names)}; write one, "
                         f"an id a line{advice}")

    def train_ids(self):
        return self.ids(*TRAIN_LISTS)

    def samples(self, ids, labels=True):
        """[(picture path, Label)] of `ids`, the Label None where none is wanted. Errors: InputError, not there."""
        kinds = [(self.pictures, self.picture_dir, "jpg"), (self.labels, self.label_dir, "png")][:1 + labels]
        for i, (files, where, suffix) in itertools.product(ids, kinds):
            if i not in files:
                raise InputError(f"{where}/{i}.{suffix}: not there, but id {i} is in a list; add it or drop the id")
        k = len(self.classes)
        return [(self.pictures[i], Label(self.labels[i], k, self.colours) if labels else None) for i in ids]


def open_data(root=None):
    """The Data at `root`, or `shapes`; None: VOC 2012 where it is there, else `shapes`. Errors: InputError."""
    note, drawn = "", {}
    if root is None and not any(find_list(VOC_ROOT, name) for name in TRAIN_LISTS[:2]):
        lack = f"has no {TRAIN_LISTS[0]}.txt" if VOC_ROOT.is_dir() else "is not there"
        root, note = "shapes", f"{VOC_ROOT} {lack} (to get it: python data.py voc), so this run uses shapes; "
    generated = root == "shapes"
    root, defaults = (SHAPES_ROOT, SHAPES_DEFAULTS) if generated else (Path(root or VOC_ROOT), VOC_DEFAULTS)
    if generated:
        with writing(root):
            shapes.make(root)
    picture_dir, label_dir = (next((root / d for d in dirs if (root / d).is_dir()), root)
                              for dirs in (PICTURE_DIRS, LABEL_DIRS))
    if (root / "leftImg8bit").is_dir():
        picture_dir, label_dir, defaults = root / "leftImg8bit", root / "gtFine", CITYSCAPES_DEFAULTS
        pictures = index_cityscapes(picture_dir, "_leftImg8bit.png")
        labels = (index_cityscapes(label_dir, "_gtFine_labelIds.png")
                  | index_cityscapes(label_dir, "_gtFine_labelTrainIds.png"))
    else:
        pictures, labels = index(picture_dir, PICTURES), index(label_dir, [".png"])
    if not pictures or not labels or picture_dir == root or label_dir == root:
        raise InputError(f"--data {root}: no data there; it needs JPEGImages/*.jpg (or images/), SegmentationClassAug/*"
                         ".png (or labels/), classes.txt, ImageSets/Segmentation/{train,val}.txt; or say --data shapes")
    classes, palette, colours = read_classes(root / "classes.txt")
    if (root / "classes.txt").is_file() and not any(find_list(root, name) for name in ("val", *TRAIN_LISTS)):
        pairs = [i for i in pictures if i in labels]
        if len(pairs) < 2:
            raise InputError(f"{label_dir}: {len(pairs)} of {len(pictures)} pictures in {picture_dir} have a label of "
                             "the same name there; it takes 2")
        drawn, bare = draw_lists(pairs), len(pictures) - len(pairs)
        note = (f"{root} has no lists: {len(drawn['train'])} of its labelled pictures train, {len(drawn['val'])} are "
                f"val{f', {bare} have no label and are left out' if bare else ''}; ")
    own = (root / "classes.txt").is_file() and not generated
    return Data("shapes" if generated else str(root), root, classes, palette, colours, defaults, own, pictures, labels,
                picture_dir, label_dir, drawn, note)


def find_list(root, name):
    """Path of a data set's list, None where it has none of that name."""
    return next((f for d in LIST_DIRS if (f := root / d / f"{name}.txt").is_file()), None)


def draw_lists(ids):
    """{"train": ids, "val": ids} for a folder without lists: a fifth, those with the lowest hashes, are val."""
    ranked = sorted(ids, key=lambda i: hashlib.sha256(f"val/{i}".encode()).digest())
    val = set(ranked[:math.ceil(len(ids) / 5)])
    return {"train": [i for i in ids if i not in val], "val": [i for i in ids if i in val]}


def index(folder, suffixes):
    """{id: path} of the files in `folder` that end in one of `suffixes`. Errors: InputError, two files for one id."""
    try:
        files = [Path(e.path) for e in os.scandir(folder) if not e.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as e:
        raise InputError(f"{folder}: cannot be read ({e.strerror}); mend its permissions") from None
    found = {}
    for f in sorted(f for f in files if f.suffix.lower() in suffixes):
        if found.setdefault(f.stem, str(f)) != str(f):
            raise InputError(f"{f}: beside {found[f.stem]}, and both are id {f.stem}; keep one")
    return found


def index_cityscapes(folder, ending):
    """{id: path} of the files below `folder`, by split and city, that end so; the id is the name without the ending."""
    return {f.name.removesuffix(ending): str(f) for f in sorted(folder.glob(f"*/*/*{ending}"))}


def read_lines(file):
    """The lines of a text file, stripped, without empty ones. Errors: InputError."""
    try:
        return [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or 'it is not UTF-8'})") from None


def read_ids(file):
    """The ids in a list file, one a line. Errors: InputError where it cannot be read, is empty, or has an id twice."""
    ids = read_lines(file)
    if not ids:
        raise InputError(f"{file}: holds no ids; write one a line")
    if len(set(ids)) < len(ids):
        raise InputError(f"{file}: id {next(i for i in ids if ids.count(i) > 1)} stands in it twice; keep one")
    return ids


def read_classes(file):
    """(names, palette, colours) from classes.txt: a line for each class in order, its name and, if wanted, `R G B`.

    Lines `void R G B` give colours that do not count. `colours` is that of a Label: where every class has one, label
    pictures may be in colour. Errors: InputError.
    """
    palette, names, colours = voc_palette(), [], []
    if not file.is_file():
        return VOC_CLASSES, palette, ()
    for line in read_lines(file):
        words, colour, n = line.split(), None, len(names)
        if len(words) > 3 and all(w.isdecimal() and int(w) < 256 for w in words[-3:]):
            colour, words = tuple(map(int, words[-3:])), words[:-3]
        name = " ".join(words)
        void = name.lower() == "void"
        if void and not colour or name in names:
            why = "has no R G B: void is no class, it is 255 in index labels" if void else "names a class a second time"
            raise InputError(f"{file}: the line {line!r} {why}; mend it")
        if colour:
            colours.append((colour[0] << 16 | colour[1] << 8 | colour[2], IGNORE if void else n))
        if not void:
            palette[3 * n:3 * n + 3] = colour or palette[3 * n:3 * n + 3]
            names.append(name)
    if not 2 <= len(names) <= 255:
        raise InputError(f"{file}: holds {len(names)} classes; it takes 2 to 255, one a line")
    distinct = len({i for _, i in colours} - {IGNORE}) == len(names) <= 254 and len(dict(colours)) == len(colours)
    return names, palette, tuple(colours) if distinct else ()


def voc_palette():
    """The VOC colour map, 768 numbers: bit j of channel c is bit 3 * (7 - j) + c of the class number."""
    return [sum((n >> (3 * bit + c) & 1) << (7 - bit) for bit in range(8)) for n in range(256) for c in range(3)]


def split_ids(ids, fraction, seed, labelled_ids=None):
    """(labelled, unlabelled) parts of `ids`, both in the order of `ids`: round(fraction * n) are labelled.

    An id's rank is a hash of (seed, id), so the parts are nested (1/8 within 1/4 within 1/2) and hang neither on the
    order of the list nor on a generator. `labelled_ids`, a list file, takes the place of fraction and seed.
    """
    if labelled_ids:
        chosen = set(read_ids(labelled_ids))
        if chosen - set(ids):
            raise InputError(f"--labelled-ids {labelled_ids}: {min(chosen - set(ids))} is not in the training list")
    else:
        if not 0 < fraction <= 1:
            raise InputError(f"--split {fraction}: it is the labelled fraction, above 0 and at most 1")
        ranked = sorted(ids, key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
        chosen = set(ranked[:round(fraction * len(ids))])
        if not chosen:
            raise InputError(f"--split {fraction}: leaves none of {len(ids)} pictures labelled; raise it")
    return [i for i in ids if i in chosen], [i for i in ids if i not in chosen]


def folder_pictures(folder, samples):
    """Samples without a label of all pictures under `folder` less those of `samples`; None: []. Errors: InputError."""
    if folder is None:
        return []
    files = [os.path.join(at, name) for at, _, names in os.walk(Path(folder), followlinks=True) for name in names
             if name[0] != "." and os.path.splitext(name)[1].lower() in PICTURES]

    def identity(path):
        try:
            return (found := os.stat(path)).st_dev, found.st_ino
        except OSError:
            return path  # a link to nothing: the reader names it
    known = {identity(path) for path, _ in samples}
    found = [(f, None) for f in sorted(files, key=lambda f: f.split(os.sep)) if identity(f) not in known]
    if not found:
        raise InputError(f"--unlabelled {folder}: no .jpg or .png that the data set has not; name another folder")
    return found


@contextlib.contextmanager
def reading(path):
    """Errors: InputError naming `path` where the file in there is missing, truncated or no picture, and no other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's about odd metadata
            yield
    except InputError:
        raise
    except Exception as e:  # PIL raises nearly anything on a damaged file
        why = getattr(e, "strerror", None) or str(e).replace(f" {str(path)!r}", "") or type(e).__name__
        raise InputError(f"{path}: cannot be read ({' '.join(why.split())}); replace or remove it") from None


def read_picture(path):
    """The picture at `path`, a PIL image of mode RGB. Errors: InputError."""
    with reading(path):
        image = Image.open(path)
        if image.mode[0] in "IF":  # PIL would cut off what is above 255
            raise ValueError(f"mode {image.mode}: convert it to 8 bits a channel")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def read_label(label, size):
    """A Label as class ids and 255, (H,W) uint8. Errors: InputError; `size` is the picture's (W,H)."""
    with reading(label.path):
        image = Image.open(label.path)
        image.load()
        if image.size != size:
            raise InputError(f"{label.path}: the label is {image.width}x{image.height}, its picture {size[0]}x{size[1]}"
                             "; make them equal")
        if image.mode in ("L", "P"):
            ids = np.array(image)
            if label.colours:
                check_indices(image, label)
            if label.path.endswith("_labelIds.png"):
                ids = cityscapes_ids()[ids]
        elif image.mode in ("RGB", "RGBA") and label.colours:
            codes = np.asarray(image.convert("RGB")).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
            ids = colour_ids(label.colours)[codes]
            if (ids == 254).any():
                code = codes[ids == 254][0]
                raise InputError(f"{label.path}: colour {code >> 16} {code >> 8 & 255} {code & 255} is no class's; "
                                 "mend it or name it in classes.txt (NAME R G B, or void R G B if it does not count)")
        else:
            raise InputError(f"{label.path}: a label is an 8-bit index picture (mode L or P), or one in colour where "
                             f"classes.txt gives each class a colour of its own; this one is {image.mode}; convert it")
    if ((ids - np.uint8(label.num_classes)) < IGNORE - label.num_classes).any():  # wraps: ids num_classes .. 254
        value = ids[(ids >= label.num_classes) & (ids != IGNORE)][0]
        raise InputError(f"{label.path}: label value {value} is outside the {label.num_classes} classes "
                         f"(0..{label.num_classes - 1}, 255 is void); mend it or give the class a line in classes.txt")
    return ids


def check_indices(image, label):
    """Errors: InputError where an index picture looks like one in colours, whose indices are no classes."""
    used = [i for i, n in enumerate(image.histogram()) if n]
    palette, known = (image.getpalette("RGB") if image.mode == "P" else None), dict(label.colours)
    for i in used if palette else set(used) & {255}:
        r, g, b = palette[3 * i:3 * i + 3] or (0, 0, 0) if palette else (i, i, i)
        if known.get(r << 16 | g << 8 | b, i) != i:
            raise InputError(f"{label.path}: value {i} has the colour {r} {g} {b}, which classes.txt gives another "
                             "class; save it as RGB if its colours count, else in mode L or with those of classes.txt")


@functools.lru_cache
def colour_ids(colours):
    """Table (2**24,) uint8 from a colour's code to its class, 254 where it is no class's."""
    table = np.full(2**24, 254, np.uint8)
    table[[code for code, _ in colours]] = [i for _, i in colours]
    return table


@functools.lru_cache
def cityscapes_ids():
    """Table (256,) uint8 from Cityscapes' label ids to its 19 train ids, 255 where a pixel does not count."""
    from torchvision.datasets import Cityscapes
    table = np.arange(256, dtype=np.uint8)  # ids that it does not have stay: they are no train ids either
    for c in Cityscapes.classes:
        table[c.id] = c.train_id % 256  # the licence plate is -1 in both
    return table


def resize(pictures, size):
    """(N,3,H,W) uint8 -> (N,3,h,w) uint8, bilinear; where it shrinks, over the area of a pixel."""
    if pictures.is_cuda:  # which knows no uint8 there
        return F.interpolate(pictures.float(), size, mode="bilinear", antialias=True).round().byte()
    pictures = pictures.contiguous(memory_format=torch.channels_last)  # twice as fast as planes
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def random_geometry(size, crop, factor, draw):
    """A crop and flip by `draw`, a random.Random, of a picture of `size` (W,H) at scale `factor` -> (box, (w,h), flip).

    `box`, in pixels of the picture, becomes w x h pixels (at most crop x crop), mirrored where flip is set.
    """
    box, out = [0, 0, 0, 0], [0, 0]
    for axis in (0, 1):
        out[axis] = min(max(1, round(size[axis] * factor)), crop)
        span = min(size[axis], max(1, round(out[axis] / factor)))
        box[axis] = draw.randint(0, size[axis] - span)
        box[axis + 2] = box[axis] + span
    return tuple(box), tuple(out), draw.random() < 0.5


def place_picture(picture, geometry, canvas):
    """A PIL image through a random_geometry onto a copy of `canvas` (crop,crop,3), left as it is right and below."""
    box, (w, h), flip = geometry
    pixels = torch.from_numpy(np.array(picture.crop(box)))  # (H,W,3)
    box = resize(pixels.permute(2, 0, 1)[None], (h, w))
    box = (box.flip(3) if flip else box)[0].permute(1, 2, 0)
    if box.shape == canvas.shape:
        return box
    canvas = canvas.clone()
    canvas[:h, :w] = box
    return canvas


def place_label(ids, geometry, crop):
    """(H,W) ids through their picture's random_geometry, by nearest pixel: (crop,crop) uint8, 255 where padded."""
    (left, top, right, bottom), (w, h), flip = geometry
    rows = (top + (np.arange(h) + 0.5) * (bottom - top) / h).astype(int)
    columns = (left + (np.arange(w) + 0.5) * (right - left) / w).astype(int)
    canvas = np.full((crop, crop), IGNORE, np.uint8)
    canvas[:h, :w] = ids[rows][:, columns[::-1] if flip else columns]
    return torch.from_numpy(canvas)


class Stream(torch.utils.data.Dataset):
    """Endless random crops of `samples`. Draw n is a pure function of (seed, name, n); an epoch is a shuffle of all.

    With labels: ((crop,crop,3) uint8, (crop,crop) uint8 with 255 on padding). Without (Label None, no label file is
    ever opened): ((crop,crop,3) uint8, (crop,crop) bool, False on padding). Errors: InputError, no picture.
    """

    def __init__(self, samples, args, name):
        self.samples, self.crop = samples, args.crop
        self.canvas = torch.tensor(PADDING, dtype=torch.uint8).repeat(args.crop, args.crop, 1)
        self.scale = [s * args.input_scale for s in args.scale]
        self.key, self.order = f"{args.seed}/{name}", (None, None)
        self.epoch = len(samples) - (len(samples) % args.batch_size if args.drop_last else 0)
        if not samples:
            raise InputError("--split, --labelled-ids: leave no picture unlabelled; label fewer or give --unlabelled")
        if not self.epoch:
            raise InputError(f"--drop-last: {len(samples)} {name} pictures are no batch of {args.batch_size}; omit it")

    def __getitem__(self, n):
        epoch, position = divmod(n, self.epoch)
        if self.order[0] != epoch:
            order = list(range(len(self.samples)))
            random.Random(f"{self.key}/epoch {epoch}").shuffle(order)
            self.order = epoch, order
        path, label = self.samples[self.order[1][position]]
        draw = random.Random(f"{self.key}/draw {n}")
        picture = read_picture(path)
        geometry = random_geometry(picture.size, self.crop, draw.uniform(*self.scale), draw)
        pixels = place_picture(picture, geometry, self.canvas)
        if label is None:
            (w, h), valid = geometry[1], torch.zeros(self.crop, self.crop, dtype=torch.bool)
            valid[:h, :w] = True
            return pixels, valid
        return pixels, place_label(read_label(label, picture.size), geometry, self.crop)


def batches(samples, name, args, done, device):
    """Yield this process's part of each batch of the stream `name` from update `done` to --iters, on `device`.

    (pictures (B,3,crop,crop) uint8, channels last in memory, labels (B,crop,crop) uint8, or bool where samples have
    none): the same for any number of workers, and together for any number of processes. Workers start with the call:
    make it before there are nets, which they would keep copies of. Errors: InputError.
    """
    stream, size = Stream(samples, args, name), args.batch_size // parallel.WORLD
    mine = range(size * parallel.RANK, size * parallel.RANK + size)  # of each batch
    draws = [step * args.batch_size + n for step in range(done, args.iters) for n in mine]
    loaded = iter(loader(stream, args.workers, batch_size=size, sampler=draws, pin_memory=device.type == "cuda"))
    return ((pixels.permute(0, 3, 1, 2).to(device, non_blocking=True), other.to(device, non_blocking=True))
            for pixels, other in loaded)


def strong_view(pictures, args, step):
    """This process's pictures (B,3,H,W) uint8 of update `step` in other colours, grey or blurred, as their draws say.

    Brightness, contrast, saturation by 0.5 to 1.5, hue by up to a quarter of the circle for 4 in 5; grey for 1 in 5; a
    blur of up to 2 pixels for 1 in 2: UniMatch's (Yang et al. 2023). The n-th draw is a pure function of (seed, n).
    """
    views, first = [], (step - 1) * args.batch_size + parallel.RANK * len(pictures)
    with torch.autocast(pictures.device.type, enabled=False):  # a blur is a convolution
        for n, view in enumerate(pictures, first):
            draw = random.Random(f"{args.seed}/strong/draw {n}")
            if draw.random() < 0.8:
                for adjust in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
                    view = adjust(view, draw.uniform(0.5, 1.5))
                view = TF.adjust_hue(view, draw.uniform(-0.25, 0.25))
            if draw.random() < 0.2:
                view = TF.rgb_to_grayscale(view, 3)
            if draw.random() < 0.5:
                view = TF.gaussian_blur(view, [9, 9], [draw.uniform(0.1, 2)])
            views.append(view)
    return torch.stack(views)


def cut_mix(maps, args, step):
    """`maps`, tensors (B,...,H,W) of one batch, with a box of its neighbour in a share --cutmix of the pictures.

    The box is the same in all maps, 2 to 40 % of the area, and its sides at most 1 : 3.3 (UniMatch's). Neighbours are
    the first two of a process's pictures, the next two, ...; the n-th draw is a pure function of (seed, n).
    """
    mixed, many, (height, width) = [x.clone() for x in maps], len(maps[0]), maps[0].shape[-2:]
    for i in range(many):
        draw = random.Random(f"{args.seed}/mix/draw {(step - 1) * args.batch_size + parallel.RANK * many + i}")
        if draw.random() >= args.cutmix:
            continue
        area, ratio = draw.uniform(0.02, 0.4), math.exp(draw.uniform(-1.2, 1.2))
        h, w = (min(round(side * math.sqrt(x)), side) for side, x in ((height, area * ratio), (width, area / ratio)))
        y, x = draw.randint(0, height - h), draw.randint(0, width - w)
        for new, old in zip(mixed, maps):
            new[i, ..., y:y + h, x:x + w] = old[(i ^ 1) % many, ..., y:y + h, x:x + w]
    return mixed


def loader(dataset, workers, **more):
    """A DataLoader that draws nothing from the run's generator, and whose workers leave signals to the script."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, worker_init_fn=leave_signals,
                                       generator=torch.Generator(), **more)


def leave_signals(_):
    """SIGTERM and SIGINT, which a whole group of processes gets, are the script's to answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """multiprocessing would end them by SIGTERM, and wait."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would call it an accident
        worker.kill()


class Whole(torch.utils.data.Dataset):
    """Whole pictures for evaluation: (what the net sees (3,h,w) uint8, label (H,W) uint8 with 255 on padding)."""

    def __init__(self, samples, args):
        self.samples, self.args = samples, args

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        picture = read_picture(self.samples[i][0])
        ids = torch.from_numpy(read_label(self.samples[i][1], picture.size))
        pixels, (height, width) = for_net(picture, self.args)
        return pixels, F.pad(ids, (0, width - picture.width, 0, height - picture.height), value=IGNORE)


def for_net(picture, args):
    """A PIL image padded on the right and below to (H,W) and shrunk for the net -> ((3,h,w) uint8, (H,W)).

    h, w are stride*k+1 and H, W are stride/input_scale*k+1. Shrunk by areas, as in training, edges coincide and the
    corners' centres do not: there align_corners=True is half a pixel off at input_scale 0.5, 1.5 at 0.25.
    """
    multiple = round(args.stride / args.input_scale)
    steps = [math.ceil((n - 1) / multiple) for n in (picture.height, picture.width)]
    padded = Image.new("RGB", [multiple * k + 1 for k in reversed(steps)], PADDING)
    padded.paste(picture)
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1)
    if args.input_scale != 1:
        pixels = resize(pixels[None], [args.stride * k + 1 for k in steps])[0]
    return pixels, (padded.height, padded.width)


if __name__ == "__main__":
    import prepare
    launch(prepare.main, prepare.flags)
