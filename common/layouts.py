"""Which files make up a data set: known folder layouts, lists of ids, classes, the labelled and unlabelled parts."""
import contextlib
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import shapes
from common.console import InputError, catch_read_errors, catch_write_errors

import numpy as np
from PIL import Image

IGNORE = 255
VOC_ROOT, SHAPES_ROOT = Path("data/VOC2012"), Path("data/shapes")
VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
IMAGE_DIRS = ("JPEGImages", "img", "images")
LABEL_DIRS = ("SegmentationClassAug", "SegmentationClass", "cls", "labels")
SHOWN = 6  # kinds of files that an error lists
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
                  "add the list; a folder without lists needs classes.txt; for exports of annotation tools run python "
                  f"prepare.py import {self.root} --out NEW")
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
    if not root.is_dir():
        what = f"is a file; run python prepare.py import {root} --out NEW" if root.is_file() else (
            "no such folder; correct its name, or use --data shapes")
        raise InputError(f"--data {root}: {what}")
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
        raise InputError(f"--data {root}: no data there; it holds {describe_folder(root)}, but needs images/ and "
                         "labels/*.png of the same names (or JPEGImages/ and SegmentationClassAug/) and classes.txt; "
                         f"python prepare.py import {root} --out NEW converts other layouts; or use --data shapes")
    kind = "shapes" if name == "shapes" else "cityscapes" if is_cityscapes else "custom" if has_classes else "voc"
    classes, palette, colours = read_classes(root / "classes.txt")
    if has_classes and not any(find_list(root, name) for name in ("val", *TRAIN_LISTS)):
        pairs = [i for i in images if i in labels]
        if len(pairs) < 2:
            raise InputError(f"{label_dir}: {len(pairs)} of {len(images)} images have a label of the same name; it "
                             "takes 2, one for training and one for validation; label another")
        val = set(rank_for_val(pairs)[:math.ceil(len(pairs) / 5)])
        default_lists = {"train": [i for i in pairs if i not in val], "val": [i for i in pairs if i in val]}
        note = (f"{root} has no lists: {len(default_lists['train'])} of its labelled images are for training, "
                f"{len(default_lists['val'])} for validation, {len(images) - len(pairs)} have no label; ")
    return Dataset(name, root, kind, classes, palette, colours, images, labels, image_dir, label_dir,
                   default_lists, note)


def describe_folder(root):
    """Return what a folder holds, such as "5 Images/*.jpg, 5 Labels/*.png, classes.txt"."""
    files = [f.relative_to(root) for f in itertools.islice(root.rglob("[!.]*.*"), 10**5) if f.is_file()]
    found = Counter(f.parent / f"*{f.suffix}" if len(f.parts) > 1 or f.suffix.lower() in IMAGE_SUFFIXES else f
                    for f in files)
    held = [f"{n:,} {name}" if "*" in name.name else name.name for name, n in found.most_common(SHOWN)]
    return ", ".join(held + ["more"] * (len(found) > SHOWN)) or "no files"


def rank_for_val(ids):
    """Return the ids in the order in which a data set without lists takes them for validation: by a hash of the id."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"val/{i}".encode()).digest())


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


def read_text(file):
    """Return the text of a file in UTF-8, UTF-16 or Windows' cp1252; an InputError if it is unreadable or not text."""
    with catch_read_errors(file):
        content = Path(file).read_bytes()
        for encoding in ("utf-16",) if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
            with contextlib.suppress(UnicodeDecodeError):
                text = content.decode(encoding)
                if not re.search(r"[\x00-\x08\x0e-\x19\x1b-\x1f]", text):
                    return text
        raise ValueError("it is not text; save it as UTF-8")


def read_lines(file):
    """Return the non-empty lines of a text file, stripped; see read_text."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def read_ids(file):
    """Return the ids in a list file, one a line; an InputError if it is unreadable or empty or repeats an id."""
    ids = read_lines(file)
    if not ids:
        raise InputError(f"{file}: contains no ids; write one a line")
    if len(set(ids)) < len(ids):
        raise InputError(f"{file}: contains id {next(i for i in ids if ids.count(i) > 1)} twice; keep one")
    return ids


class ClassLine(NamedTuple):
    """A line of a file of class names: its name, colour (R, G, B) or None, and value or None.

    value is the number that the file gives the class: a pixel value, or a polygon's class. VOID are not classes.
    """
    name: str
    colour: tuple | None
    value: int | None


VOID, LABELME_BACKGROUND = ("void", "__ignore__"), "_background_"
HEADING_NAMES = {"class", "classes", "name", "names", "label", "labels", "category", "categories"}
HEADING = HEADING_NAMES | set("pixel value values id ids index r g b red green blue color colour rgb hex".split())
RGB = r"[\s,;:]+([0-9]{1,3})" * 3
COLOUR_LAST = re.compile(rf"(.*[^\s,;:]){RGB}(?::[^:]*:[^:]*)?")  # CVAT adds :parts:actions
COLOUR_FIRST = re.compile(r"([0-9]{1,3})[\s,;]+([0-9]{1,3})[\s,;]+([0-9]{1,3})[\s,;]+([^\s,;].*)")
COLOUR_HEX = re.compile(r"(.*[^\s,;:])[\s,;:]+#([0-9a-fA-F]{6})")
NUMBERED = re.compile(r"([0-9]+)[\s,;:]+([^\s,;:].*)")


def read_class_lines(file):
    """Return the ClassLines of classes.txt or of another tool's file of class names, in their order.

    A line is `name`, `name R G B`, `R G B name` or `name #rrggbb`, with a number before it or without. Commas,
    semicolons, colons and tabs separate like spaces. A heading and lines that begin with "# " are left out. Numbers are
    values only if every line has its own. Of a YAML file it reads what is under `names:`.
    """
    is_yaml = Path(file).suffix.lower() in (".yaml", ".yml")
    lines = yaml_names(read_text(file)) if is_yaml else read_lines(file)
    lines = [line.rstrip(" \t,;") for line in lines if not re.match(r"#(\s|$)", line)]
    words = set(re.findall(r"[^\W_]+", lines[0].lower())) if lines else set()
    if words & HEADING_NAMES and words <= HEADING and not is_yaml:
        lines = lines[1:]
    names, colours = [], []
    for line in lines:
        name, colour = line, None
        if m := COLOUR_LAST.fullmatch(line):
            name, *colour = m.groups()
        elif m := COLOUR_FIRST.fullmatch(line):
            *colour, name = m.groups()
        elif m := COLOUR_HEX.fullmatch(line):
            name, colour = m[1], bytes.fromhex(m[2])
        colours.append(tuple(map(int, colour)) if colour else None)
        names.append(name)
        if colour and max(colours[-1]) > 255 or re.fullmatch(r"[0-9]+([\s,;:]+[0-9]+)+|.*\t.*\t.*", name):
            raise InputError(f"{file}: the line {line!r} is not a name or a name and R G B in 0..255; correct it")
    values = [None] * len(names)
    numbered = [NUMBERED.fullmatch(name) for name in names]
    if all(numbered) and len({int(m[1]) for m in numbered}) == len(names):
        values, names = [int(m[1]) for m in numbered], [m[2] for m in numbered]
    names = [re.sub(r"""^(["'])(.*)\1$""", r"\2", name).strip() for name in names]
    return [ClassLine("void" if name.lower() == "void" else name, colour, value)
            for name, colour, value in zip(names, colours, values)]


def yaml_names(text):
    """Return the lines `name` or `id: name` under `names:` of a YAML file such as YOLO's data.yaml."""
    text = re.sub(r"(^|\s)#.*", "", text)
    if m := re.search(r"^names\s*:\s*[\[{](.*?)[\]}]", text, re.M | re.S):
        names = re.findall(r"""(?:[0-9]+\s*:\s*)?(?:"[^"]*"|'[^']*'|[^,"'\s][^,]*)""", m[1])
    elif m := re.search(r"^names\s*:[ \t]*((?:\n(?:[ \t].*|-.*|))*)", text, re.M):
        names = [re.sub(r"^\s*-\s*", "", line) for line in m[1].splitlines()]
    else:
        names = []
    return [" ".join(name.split()) for name in names if name.strip()]


def read_classes(file):
    """Return (names, palette, colours) from classes.txt, or VOC's if there is no such file.

    See read_class_lines for its lines, `void R G B` for ignored pixels, and Dataset for colours.
    """
    palette, names, colours = voc_palette(), [], []
    if not file.is_file():
        return VOC_CLASSES, palette, ()
    lines = read_class_lines(file)
    values = sorted(line.value for line in lines if line.value is not None and line.name not in VOID)
    if values:
        lines = sorted(lines, key=lambda line: line.value)
    if values != [*range(len(values))]:
        raise InputError(f"{file}: numbers its classes {', '.join(map(str, values))} instead of 0, 1, 2, ...; correct "
                         "it, or run python prepare.py import")
    for name, colour, _ in lines:
        name, n = "background" if name == LABELME_BACKGROUND else name, len(names)
        if name == "void" and not colour or name in names:
            why = "has no R G B: void is not a class, it is 255 in index labels" if name == "void" else "is there twice"
            raise InputError(f"{file}: the class {name!r} {why}; correct it")
        if colour:
            colours.append((colour[0] << 16 | colour[1] << 8 | colour[2], IGNORE if name in VOID else n))
        if name not in VOID:
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
