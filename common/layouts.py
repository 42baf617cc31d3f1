"""Which files make up a data set: known folder layouts, lists of ids, classes, the labelled and unlabelled parts."""
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import shapes
from common.console import InputError, catch_read_errors, catch_write_errors

IGNORE = 255
VOC_ROOT, SHAPES_ROOT = Path("data/VOC2012"), Path("data/shapes")
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGE_DIRS = ("JPEGImages", "img", "images")
LABEL_DIRS = ("SegmentationClassAug", "SegmentationClass", "cls", "labels")
LIST_DIRS, TRAIN_LISTS = ("ImageSets/Segmentation", "lists", "."), ("train_aug", "trainaug", "train")


class Label(NamedTuple):
    """A label file: its ids are below num_classes, or its colours are ((65536 R + 256 G + B, id), ...)."""
    path: str
    num_classes: int
    colours: tuple


class Sample(NamedTuple):
    """An image and its label; the label is None if it is not used."""
    id: str
    image: str
    label: Label | None


@dataclass
class Dataset:
    """A data set on disk: its classes with their colours, and the image and label file of each id."""
    name: str
    root: Path
    kind: str  # "voc", "cityscapes", "shapes", or "custom": another folder with classes.txt
    classes: list
    palette: list  # 768 numbers, as PIL's putpalette takes them
    colours: tuple  # of a Label; empty if classes.txt does not give each class a colour of its own
    images: dict  # id -> path
    labels: dict  # id -> path
    image_dir: Path
    label_dir: Path
    default_lists: dict  # name -> ids, if the folder has no lists: the fifth with the lowest hashes is val
    note: str = ""  # prefix of the first line of a run

    @property
    def unlabelled_folder(self):
        """ROOT/unlabelled of a custom data set, or None."""
        return folder if self.kind == "custom" and (folder := self.root / "unlabelled").is_dir() else None

    def ids(self, *names):
        """Return the ids of the first list in `names` that exists: a default list, a list of the folder, or a file."""
        for name in names:
            if name in self.default_lists:
                return self.default_lists[name]
            if (file := find_list(self.root, name) or Path(name)).is_file():
                return read_ids(file)
        advice = (f"run python prepare.py cityscapes --root {self.root}" if self.kind == "cityscapes" else
                  "add it; a folder of your own also needs classes.txt")
        raise InputError(f"{self.root / LIST_DIRS[0]}: no {' or '.join(f'{n}.txt' for n in names)}; {advice}")

    def train_ids(self):
        """Return the ids of the training list."""
        return self.ids(*TRAIN_LISTS)

    def samples(self, ids, labels=True):
        """Return the Samples of `ids`, without their labels if labels is False; an InputError if a file is missing."""
        for i in ids:
            if i not in self.images or labels and i not in self.labels:
                file = self.label_dir / f"{i}.png" if i in self.images else self.image_dir / f"{i}.jpg"
                raise InputError(f"{file}: missing, but its id is in a list; add it or remove the id")
        k = len(self.classes)
        return [Sample(i, self.images[i], Label(self.labels[i], k, self.colours) if labels else None) for i in ids]

    def split(self, fraction, seed, labelled_ids=None, unlabelled_folder=None):
        """Return the Samples (labelled, unlabelled, val); see split_ids. Unlabelled ones have no label.

        unlabelled_folder: of more images without labels, at any depth; those that are in the data set are left out.
        """
        labelled, unlabelled = split_ids(self.train_ids(), fraction, seed, labelled_ids)
        labelled, unlabelled = self.samples(labelled), self.samples(unlabelled, labels=False)
        val = self.samples(self.ids("val"))
        if folder := unlabelled_folder:
            known = {os.path.realpath(sample.image) for sample in labelled + unlabelled + val}
            files = [os.path.join(at, f) for at, _, names in os.walk(Path(folder), followlinks=True) for f in names]
            files = [f for f in sorted(files, key=lambda f: f.split(os.sep)) if os.path.realpath(f) not in known and
                     Path(f).suffix.lower() in IMAGE_SUFFIXES and not Path(f).name.startswith(".")]
            if not files and folder != self.unlabelled_folder:
                raise InputError(f"--unlabelled {folder}: contains no images besides those of the data set; name "
                                 "another folder")
            self.note += f"{len(files)} unlabelled images in {folder}; "
            unlabelled += [Sample(f, f, None) for f in files]
        return labelled, unlabelled, val

    def median_size(self):
        """Return the medians (shorter side, longer side) of about 50 images, in pixels."""
        sizes = []
        for path in list(self.images.values())[::max(1, len(self.images) // 50)]:
            with catch_read_errors(path), Image.open(path) as image:
                sizes.append(sorted(image.size))
        return np.median(sizes, 0).astype(int).tolist()


def open_dataset(root=None):
    """Return the Dataset in the folder `root`, or `shapes`; None: VOC 2012 if it is there, else `shapes`."""
    note, default_lists = "", {}
    if root is None and not any(find_list(VOC_ROOT, name) for name in TRAIN_LISTS[:2]):
        note = f"{VOC_ROOT} has no {TRAIN_LISTS[0]}.txt (to get it: python prepare.py voc), so this run uses shapes; "
        root = "shapes"
    name = str(root or VOC_ROOT)
    root = SHAPES_ROOT if name == "shapes" else Path(name)
    if name == "shapes":
        with catch_write_errors(root):
            shapes.make(root)
    has_classes = (root / "classes.txt").is_file()
    if is_cityscapes := (root / "leftImg8bit").is_dir():
        image_dir, label_dir = root / "leftImg8bit", root / "gtFine"
        images = index_cityscapes(image_dir, "_leftImg8bit.png")
        labels = index_cityscapes(label_dir, "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png")
    else:
        image_dir, label_dir = (next((root / d for d in dirs if (root / d).is_dir()), root)
                                for dirs in (IMAGE_DIRS, LABEL_DIRS))
        images, labels = index_files(image_dir, IMAGE_SUFFIXES), index_files(label_dir, [".png"])
    if not images or not labels or root in (image_dir, label_dir):
        raise InputError(f"--data {root}: no data there; it needs JPEGImages/*.jpg (or images/), SegmentationClassAug/*"
                         ".png (or labels/) and classes.txt; or use --data shapes")
    kind = "shapes" if name == "shapes" else "cityscapes" if is_cityscapes else "custom" if has_classes else "voc"
    classes, palette, colours = read_classes(root / "classes.txt")
    if has_classes and not any(find_list(root, name) for name in ("val", *TRAIN_LISTS)):
        pairs = [i for i in images if i in labels]
        if len(pairs) < 2:
            raise InputError(f"{label_dir}: {len(pairs)} of {len(images)} images have a label of their name; add more")
        val = set(sorted(pairs, key=lambda i: hashlib.sha256(f"val/{i}".encode()).digest())[:math.ceil(len(pairs) / 5)])
        default_lists = {"train": [i for i in pairs if i not in val], "val": [i for i in pairs if i in val]}
        note = (f"{root} has no lists: {len(default_lists['train'])} of its labelled images are for training, "
                f"{len(default_lists['val'])} for validation, {len(images) - len(pairs)} have no label; ")
    return Dataset(name, root, kind, classes, palette, colours, images, labels, image_dir, label_dir,
                   default_lists, note)


def find_list(root, name):
    """Return the path of a data set's list, or None."""
    return next((f for d in LIST_DIRS if (f := root / d / f"{name}.txt").is_file()), None)


def index_files(folder, suffixes):
    """Return {id: path} of the files in `folder` that end in one of `suffixes`; the id is the name without it."""
    with catch_read_errors(folder):
        files = [Path(e.path) for e in os.scandir(folder) if not e.name.startswith(".")] if folder.is_dir() else []
    found = {}
    for f in sorted(f for f in files if f.suffix.lower() in suffixes):
        if found.setdefault(f.stem, str(f)) != str(f):
            raise InputError(f"{f}: has the same id {f.stem} as {found[f.stem]}; keep one")
    return found


def index_cityscapes(folder, *endings):
    """Return {id: path} of the files FOLDER/SPLIT/CITY/ID+ending; the last ending wins."""
    return {f.name.removesuffix(end): str(f) for end in endings for f in sorted(folder.glob(f"*/*/*{end}"))}


def read_lines(file):
    """Return the non-empty lines of a text file, stripped; an InputError if it cannot be read."""
    with catch_read_errors(file):
        return [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def read_ids(file):
    """Return the ids in a list file, one a line; an InputError if it is unreadable or empty or repeats an id."""
    ids = read_lines(file)
    if not ids:
        raise InputError(f"{file}: contains no ids; write one a line")
    if len(set(ids)) < len(ids):
        raise InputError(f"{file}: contains id {next(i for i in ids if ids.count(i) > 1)} twice; keep one")
    return ids


def read_classes(file):
    """Return (names, palette, colours) from classes.txt, or VOC's if there is no such file.

    A line is the name of a class and optionally `R G B`, or `void R G B` for ignored pixels. See Dataset for colours.
    """
    palette, names, colours = voc_palette(), [], []
    if not file.is_file():
        return VOC_CLASSES, palette, ()
    for line in read_lines(file):
        words, colour, n = line.split(), None, len(names)
        if len(words) > 3 and all(w.isdecimal() and int(w) < 256 for w in words[-3:]):
            colour, words = tuple(map(int, words[-3:])), words[:-3]
        void = (name := " ".join(words)).lower() == "void"
        if void and not colour or name in names:
            why = "has no R G B: void is not a class, it is 255 in index labels" if void else "names a class twice"
            raise InputError(f"{file}: the line {line!r} {why}; correct it")
        if colour:
            colours.append((colour[0] << 16 | colour[1] << 8 | colour[2], IGNORE if void else n))
        if not void:
            palette[3 * n:3 * n + 3] = colour or palette[3 * n:3 * n + 3]
            names.append(name)
    if not 2 <= len(names) <= 255:
        raise InputError(f"{file}: contains {len(names)} classes; it needs 2 to 255, one a line")
    distinct = len({i for _, i in colours} - {IGNORE}) == len(names) <= 254 and len(dict(colours)) == len(colours)
    return names, palette, tuple(colours) if distinct else ()


def voc_palette():
    """Return the VOC colour map, 768 numbers: bit j of channel c is bit 3 * (7 - j) + c of the class id."""
    return [sum((n >> (3 * bit + c) & 1) << (7 - bit) for bit in range(8)) for n in range(256) for c in range(3)]


def split_ids(ids, fraction, seed, labelled_ids=None):
    """Return the (labelled, unlabelled) parts of `ids`, both in their order; round(fraction * n) are labelled.

    They are those with the lowest hashes of (seed, id), so that 1/8 is within 1/4; or those in the file labelled_ids.
    """
    if labelled_ids:
        chosen = set(read_ids(labelled_ids))
        if chosen - set(ids):
            raise InputError(f"--labelled-ids {labelled_ids}: {min(chosen - set(ids))} is not in the training list")
    else:
        if not 0 < fraction <= 1:
            raise InputError(f"--split {fraction}: the labelled fraction must be above 0 and at most 1")
        ranked = sorted(ids, key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
        chosen = set(ranked[:round(fraction * len(ids))])
        if not chosen:
            raise InputError(f"--split {fraction}: leaves none of {len(ids)} images labelled; raise it")
    return [i for i in ids if i in chosen], [i for i in ids if i not in chosen]
