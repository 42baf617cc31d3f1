"""Labels from annotation tools and folders of masks, brought to the layout of one's own (prepare.py import).

`import_labels` reads top to bottom what happens. Each kind of label is recognised and brought to a Found: the images,
how to make the label map of each (see label_formats), and the classes. One writer brings it to disk.
"""
import json
import math
import os
import re
import shutil
import tempfile
import unicodedata
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common import label_formats, layouts
from common.console import InputError, catch_read_errors, catch_write_errors, write_atomically
from common.label_formats import Mask, rgb_code, shorten
from common.layouts import IGNORE

import numpy as np
from PIL import Image, ImageOps

MASK_KINDS, SHAPE_KINDS = ("index", "levels", "colour"), ("coco", "labelme", "yolo")
READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
CLASS_FILE = re.compile(r"(_?classes|class_names|labels|labelmap|label_colors)\.txt|_?classes\.csv|obj\.names|"
                        r"\w*class_dict\w*\.csv|.*\.ya?ml", re.I)
PARTS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test", testing="test")
IMAGE_WORDS = set("image images img imgs input inputs frame frames photo photos picture pictures rgb img8bit sat "
                  "original originals unlabelled unlabeled".split())
LABEL_WORDS = set("label labels mask masks annotation annotations annot gt groundtruth truth segmentation "
                  "segmentations semantic seg cls target targets labelids labeltrainids".split())
UNUSED_FOLDER = re.compile("segmentationobject|instance|visuali[sz]|overlay|preview", re.I)
SEPARATOR = r"[\s_.\-]"


class File(NamedTuple):
    """A file of the source, and what the names of its folders say.

    The group is the path of folders down to the deepest one that says "images" or "labels", the context all folders
    but this one. Both leave out what names a part.
    """
    path: Path
    role: str  # "image", "label", "unused" or ""
    part: str  # "train", "val", "test" or ""
    group: str
    context: tuple
    stem: str  # in NFC, without suffixes of images


class Found(NamedTuple):
    """What was recognised."""
    what: str
    images: list  # of File, with a label and without
    labels: dict  # {path of an image: Mask or Drawing}
    classes: list  # of (name, (R, G, B) or None), by class id


def import_labels(args, map_in_parallel):
    """Write the labels and images of args.source to the new folder args.out, or add them to the data set args.add.

    map_in_parallel: function (function, items, description) -> [function(item)]. Raises InputError, and then nothing
    is left on the disk.
    """
    if bool(args.out) == bool(args.add):
        raise InputError("--out, --add: give one: a new folder, or a data set to add to")
    out, where = Path(args.out or args.add), " ".join(map(str, args.source))
    if args.out and os.path.lexists(out):
        raise InputError(f"--out {out}: exists; name a new folder, or add to it with --add {out}")
    dataset = layouts.open_dataset(str(out)) if args.add else None
    with catch_write_errors(out):
        beside = next(folder for folder in out.absolute().parents if folder.is_dir())
        work = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=beside, ignore_cleanup_errors=True)
    with work as folder:
        files = find_files(args, Path(folder) / "unpacked")
        found = recognise(files, args, where, map_in_parallel)
        classes, table = choose_classes(found, args)
        if dataset:
            classes, table = match_classes(classes, table, dataset)
        ids, new = name_images(found.images), Path(folder) / "new"
        parts = read_parts(files, found, ids)
        jobs = [(f.path, found.labels.get(f.path), ids[f.path]) for f in found.images]
        write = partial(write_pair, new, table, make_palette(classes), args.link)
        results = run_all(map_in_parallel, write, jobs, "writing")
        counts = {name: pixels for (_, source, name), (pixels, _) in zip(jobs, results) if source}
        turned = [name for (_, source, name), (_, is_turned) in zip(jobs, results) if source and is_turned]
        lists = make_lists(parts, counts, where, dataset)
        if dataset:
            add_to_dataset(dataset, new, lists)
        else:
            write_dataset(out, new, lists, classes)
        print_report(out, found, files, classes, counts, lists, turned)


# Files and names

def find_files(args, unpacked):
    """Return the Files of all sources: folders, .zip files (unpacked to the folder `unpacked`) and .json files."""
    files, sources, label_folder = [], list(map(Path, args.source)), args.labels
    if label_folder and Path(label_folder).is_dir() and not any(
            Path(label_folder).resolve().is_relative_to(source.resolve()) for source in sources):
        sources.append(Path(label_folder))
    for n, source in enumerate(sources):
        if not source.exists():
            raise InputError(f"{source}: no such file or folder; correct its name")
        root, suffix = source, source.suffix.lower() if source.is_file() else ""
        if suffix == ".json":
            files.append(File(source, *describe_role([], label_folder), image_stem(source.name)))
            continue
        if suffix == ".zip":
            if args.link:
                raise InputError(f"--link {source}: its files cannot be linked to; unpack it, or leave --link out")
            root = unpack_zip(source, unpacked / str(n))
        elif not source.is_dir():
            raise InputError(f"{source}: neither a folder nor a .zip or .json file; name one")
        outer = [(source.stem if suffix else source.resolve().name, source)] if len(sources) > 1 else []
        with catch_read_errors(source):
            for at, folders, names in os.walk(root, followlinks=True, onerror=raise_error):
                folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
                inner = Path(at).relative_to(root)
                parents = outer + [(p.name, root / p) for p in [*reversed(inner.parents), inner] if p.name]
                described = describe_role(parents, label_folder)
                files += [File(Path(at, name), *described, image_stem(name)) for name in sorted(names)
                          if name[0] != "."]
    if label_folder and not any(f.role == "label" for f in files):
        raise InputError(f"--labels {label_folder}: no such folder in {', '.join(map(str, sources))}; correct its name")
    return files


def raise_error(error):
    raise error


def unpack_zip(source, folder):
    """Unpack a .zip file to `folder` and return it; an InputError if it holds a path that leads outside, or a link."""
    with catch_read_errors(source), zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            path = PurePosixPath(entry.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or entry.external_attr >> 28 == 0o12:
                raise InputError(f"{source}: {entry.filename!r} leads outside the folder or is a link; do not trust "
                                 "this file, or unpack it yourself")
        with catch_write_errors(folder):
            archive.extractall(folder)
    return folder


def split_words(name):
    """Return the lower-case words of a name: "SegmentationClass", "train_masks2" -> segmentation class, train masks."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?=annot$)", " ", name)
    return [word.rstrip("0123456789") or word for word in re.split(r"[\W_]+", name.lower()) if word]


def describe_role(parents, label_folder):
    """Return (role, part, group, context) of the files in a folder, see File.

    parents: [(name, path)] of the folders down to it, outermost first; label_folder: of --labels.
    """
    role, part, names, end, is_chosen = "", "", [], 0, False
    for n, (name, path) in enumerate(parents):
        words = split_words(name)  # "train_masks" names a part and says "labels"
        says = ("unused" if UNUSED_FOLDER.search(name) else "label" if LABEL_WORDS & {*words} else
                "image" if IMAGE_WORDS & {*words} else "")
        part = next((PARTS[word] for word in words if word in PARTS), part)
        rest = "_".join(word for word in words if word not in PARTS) if PARTS.keys() & {*words} else name
        names += [rest] if rest else []
        if label_folder and not is_chosen:
            paths = "/".join(name for name, _ in parents[:n + 1]), "/".join(names)
            is_chosen = path.resolve() == Path(label_folder).resolve() or any(
                f"/{p}".lower().endswith(f"/{label_folder.strip('/')}".lower()) for p in paths)
            says = "label" if is_chosen else "unused" if says == "label" else says
        elif is_chosen:
            says = ""
        if says:
            role, end = says, len(names)
    return role, part, "/".join(names[:end] if role else names) or ".", (*names[:max(0, end - 1)], *names[end:])


def image_stem(name):
    """Return a file's name in NFC without suffixes of images."""
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    path = path if path.suffix.lower() in READABLE else path.with_suffix("")
    while path.suffix.lower() in READABLE:
        path = path.with_suffix("")
    return path.name


def is_image_file(file):
    return file.path.suffix.lower() in READABLE


def core_name(stem):
    """Return (name without the words that say image, label or part, whether it says label): 001_mask -> 001, True."""
    words = re.split(SEPARATOR, stem)
    says_label = [word.lower() in LABEL_WORDS or word == "L" and n for n, word in enumerate(words)]
    core = [word.lower() for word, says in zip(words, says_label) if not says]
    return "_".join(word for word in core if word not in IMAGE_WORDS and word not in PARTS), any(says_label)


def split_roles(files):
    """Return (images, label candidates) among the image files.

    A file whose name is that of another file of its folder and a word such as "mask" is a label. If there are such,
    the rest are images; or else, if a folder says "images", files in folders that say nothing may be labels as well.
    """
    folders, image_files, others = {}, [], ""
    for f in files:
        if is_image_file(f) and f.role != "unused":
            folders.setdefault(f.path.parent, []).append(f)
    for here in folders.values():
        named = [(f, *core_name(f.stem)) for f in here]
        plain = {core for _, core, says_label in named if not says_label}
        labels = {core for _, core, says_label in named
                  if says_label and plain & {"", *(core[:m.start()] for m in re.finditer("_|$", core))}}
        others = "image" if labels else others
        for f, core, says_label in named:
            role = "label" if says_label and core in labels else "image" if core in labels else f.role
            image_files.append(f._replace(role=role))
    image_files = [f._replace(role=f.role or ("" if core_name(f.stem)[1] else others)) for f in image_files]
    image_role = "image" if any(f.role == "image" for f in image_files) else ""
    return [f for f in image_files if f.role == image_role], [f for f in image_files if f.role != image_role]


def match_names(images, labels):
    """Return ({index of an image: [labels]}, labels that are left) by folders and names, without regard to case.

    Tried are equal names, then without words such as "mask", then without what all names of a side begin or end with;
    in the same context and part, in the same part, and anywhere. The attempt that finds the most images wins, and of
    equals the strictest.
    """
    def trim(files):
        names = [core_name(f.stem)[0] for f in files]
        start = re.match("(.*_)?", os.path.commonprefix(names))[0]
        end = re.match("(.*_)?", os.path.commonprefix([name[::-1] for name in names]))[0]
        return [name[len(start):len(name) - len(end)] if len(names) > 1 else name for name in names]

    best, left = {}, labels
    for names in (lambda files: [f.stem.lower() for f in files], lambda files: [core_name(f.stem)[0] for f in files],
                  trim):
        for place in (lambda f: (f.part, f.context), lambda f: f.part, lambda f: ""):
            keys, of_labels = ([(place(f), name) for f, name in zip(side, names(side))] for side in (images, labels))
            index = {key: n for n, key in enumerate(keys)}
            found, rest = {}, []
            for label, key in zip(labels, of_labels):
                found.setdefault(index[key], []).append(label) if key in index else rest.append(label)
            if len(index) == len(images) and len(found) > len(best):
                best, left = found, rest
    return best, left


def pair_masks(images, candidates, where):
    """Return {path of an image: path of its label map}, {} if there is none.

    Raises InputError if an image has several label maps.
    """
    name_images(images)
    labels = [f for f in candidates if f.role == "label"]
    alone, maps = (Counter(f.context for f in side) for side in (images, labels))
    if len(alone) > 1 and max(alone.values()) == 1 and any(maps[context] > 1 for context in alone):
        image = max(images, key=lambda f: maps[f.context])
        raise InputError(f"{where}: a folder per image: {image.path} is alone, with {maps[image.context]} label maps; "
                         "join them to one map of class ids per image, in images/ and labels/")
    groups, owners = {}, {}
    stems = {f.stem: n for n, f in enumerate(images)}
    for f in candidates:
        groups.setdefault(f.group, []).append(f)
    for group, members in groups.items():
        found, rest = match_names(images, members)
        if members[0].role != "label" and len(found) < len(members) / 2:
            continue
        several = {n: list(owned) for n, owned in found.items()}
        for f in rest:  # 1000_circle_1 and 1000_circle_2 are of the image 1000
            starts = [f.stem[:m.start()] for m in re.finditer(SEPARATOR, f.stem)]
            if owner := next((start for start in reversed(starts) if start in stems), None):
                several.setdefault(stems[owner], []).append(f)
        for n, owned in several.items():
            if len(owned) > 1:
                raise InputError(f"{where}: {images[n].path.name} has several label maps, such as {owned[0].path.name} "
                                 f"and {owned[1].path.name}; join them to one map of class ids per image")
        for n, (label,) in found.items():
            owners.setdefault(images[n].path, {})[group] = label.path
    for image, maps in owners.items():
        if len(maps) > 1:
            raise InputError(f"{where}: {' and '.join(maps)} both hold a label map of {image.name}; choose with "
                             + " or ".join(f"--labels {group}" for group in maps))
    return {image: path for image, maps in owners.items() for path in maps.values()}


def find_named(named, index, beside):
    """Return the Files that a label file or list `beside` can mean by a file name: one if that is clear.

    index: {stem in lower case: [File]}. Of several, those win that are no label, whose folders are named too, that have
    the same suffix, that lie beside it, and that are of its part.
    """
    *folders, name = [p for p in re.split(r"[\\/]", unicodedata.normalize("NFC", named)) if p not in ("", ".", "..")
                      ] or [""]
    def count_folders(f):
        return len(os.path.commonprefix([list(f.path.parent.parts[::-1]), folders[::-1]]))

    found = index.get(image_stem(name).lower(), [])
    most = max(map(count_folders, found), default=0)
    for is_near in (lambda f: f.role != "label", lambda f: count_folders(f) == most, lambda f: f.path.name == name,
                    lambda f: f.path.parent == beside.path.parent, lambda f: f.part == beside.part):
        found = [f for f in found if len(found) > 1 and is_near(f)] or found
    return found


# Recognisers

def recognise(files, args, where, map_in_parallel):
    """Return the Found of the one kind of labels in the source; an InputError if there is none, or several."""
    images, candidates = split_roles(files)
    candidates = [f for f in candidates if f.role == "label" or not args.labels]
    jsons = read_jsons(files) if args.kind not in MASK_KINDS + ("yolo",) else {}
    texts = [f for f in files if f.path.suffix.lower() == ".txt" and not CLASS_FILE.fullmatch(f.path.name)]
    texts = {images[n].path: [f.path for f in found] for n, found in match_names(images, texts)[0].items()}
    kinds = {kind: shorten(f.path.name for f, _ in found) for kind, found in jsons.items() if found}
    if args.kind == "yolo" or any(is_numeric(path) for paths in texts.values() for path in paths):
        kinds["yolo"] = shorten(paths[0].name for paths in texts.values())
    if args.kind in SHAPE_KINDS:
        kinds = {args.kind: kinds[args.kind]} if kinds.get(args.kind) else {}
    elif args.kind:
        kinds = {"masks": ""}
    elif not kinds or match_names(images, candidates)[0]:
        kinds["masks"] = shorten(sorted({f.group for f in candidates}))
    if len(kinds) > 1:
        held = ", ".join(f"{kind} ({names})" for kind, names in kinds.items())
        raise InputError(f"{where}: holds labels of several kinds: {held}; choose with --kind (of masks: index, "
                         "levels or colour)")
    kind, found = next(iter(kinds), None), None
    if kind == "masks":
        found = recognise_masks(files, images, candidates, args, where, map_in_parallel)
    elif kind:
        found = recognise_shapes(kind, files, images, jsons.get(kind), texts, args, where)
    if not found or not found.labels:
        alike = {}
        for f in files:
            alike.setdefault((f.group, f.path.suffix.lower()), []).append(f"{f.group}/{f.path.name}")
        held = shorten(f"{len(names)} like {names[0]}" for names in sorted(alike.values(), key=len, reverse=True))
        raise InputError(f"{where}: no labels of its images are recognised; it holds {held or 'no files'}; export "
                         "masks, COCO, LabelMe or YOLO; a mask needs its image's name; --labels DIR names the masks")
    if len(found.labels) < 2 and not args.add:
        raise InputError(f"{where}: {len(found.labels)} of {len(found.images)} images has a label; it takes 2 at "
                         "least, one for training and one for validation; label another")
    return found


def recognise_masks(files, images, candidates, args, where, map_in_parallel):
    """Return the Found of label maps in image files, or None if there are none."""
    pairs = pair_masks(images, candidates, where)
    if not pairs:
        return None
    paths = list(pairs.values())
    scans = dict(zip(paths, run_all(map_in_parallel, label_formats.scan_mask, paths, "reading label maps")))
    lines, source = find_class_lines(files, args, where)
    if not lines:
        values = sorted({value for scan in scans.values() if not scan.is_colour for value in scan.counts})
        held = "colours" if any(scan.is_colour for scan in scans.values()) else f"the values {shorten(values)}"
        raise InputError(f"{where}: no class names, and the label maps hold {held}; write one name a line, in the "
                         "order of their values, to classes.txt there, or name the file with --classes FILE")
    is_numbered, background = lines[0].value is not None, args.background or "background"
    lines = sorted(lines, key=lambda line: line.value) if is_numbered else lines
    if is_numbered and lines[0].value > 0 and any(0 in scan.counts and not scan.is_colour for scan in scans.values()):
        lines.insert(0, layouts.ClassLine(background, None, 0))
    classes = [line for line in lines if line.name not in layouts.VOID]
    ids = {line.value if is_numbered else n: n for n, line in enumerate(classes)}
    ids |= {line.value: IGNORE for line in lines if line.name in layouts.VOID and is_numbered}
    number = {line.name: n for n, line in enumerate(classes)}
    colours = {rgb_code(line.colour): number.get(line.name, IGNORE) for line in lines if line.colour}
    if len(colours) < sum(line.colour is not None for line in lines) or not all(line.colour for line in classes):
        colours = {}
    kind, values = label_formats.choose_encoding(scans, ids, colours, list(number), source, args.kind)
    table = [(background if line.name == layouts.LABELME_BACKGROUND else line.name, line.colour) for line in classes]
    held = {"index": "class ids", "levels": f"grey levels {shorten(v for v, _ in values)}", "colour": "colours"}[kind]
    labels = {image: Mask(path, kind, values) for image, path in pairs.items()}
    return Found(f"label maps with {held}, class names from {source}", images, labels, table)


def read_jsons(files):
    """Return {"coco": [(File, content)], "labelme": [(File, content)]} of the .json files."""
    found = {"coco": [], "labelme": []}
    for f in files:
        if f.path.suffix.lower() == ".json":
            with catch_read_errors(f.path):
                content = json.loads(layouts.read_text(f.path))
            keys = content.keys() if isinstance(content, dict) else set()
            if keys >= {"images", "annotations", "categories"}:
                found["coco"].append((f, content))
            elif keys >= {"shapes", "imagePath"}:
                content.pop("imageData", None)  # the image once more, in base64
                found["labelme"].append((f, content))
    return found


def is_numeric(path):
    """Whether the first line of a .txt file is numbers, as in YOLO's label files."""
    lines = layouts.read_lines(path)
    return bool(lines) and re.fullmatch(r"[0-9]+(\s+-?[0-9.eE+-]+){4,}", lines[0]) is not None


def recognise_shapes(kind, files, images, jsons, texts, args, where):
    """Return the Found of COCO, LabelMe or YOLO files.

    jsons: [(File, content)]; texts: {path of an image: [.txt files]}. Class 0 is what is not annotated. Images that a
    COCO file lists without an annotation stay unlabelled, unless --background says what they show: tools also list
    images that nobody has annotated yet.
    """
    lines, source = find_class_lines(files, args, where) if kind != "coco" or args.classes else ([], "")
    labels, names, images = {}, [], {f.path: f for f in images}
    if kind == "yolo":
        if not lines:
            raise InputError(f"{where}: no class names for YOLO's polygons; add data.yaml or classes.txt, or name the "
                             "file with --classes FILE")
        numbers = {n if line.value is None else line.value: line.name for n, line in enumerate(lines)}
        for image, paths in texts.items():
            if len(paths) > 1:
                raise InputError(f"{paths[0]}: {paths[1]} is of the same image; remove one")
            labels[image] = label_formats.read_yolo(paths[0], numbers, label_formats.upright_size(image)[0])
    index = index_stems(f for f in files if is_image_file(f))
    for f, content in jsons or []:
        def find_image(named):
            found = find_named(str(named), index, f)
            if len(found) != 1:
                why = (f"but {found[0].path} and {found[1].path} have this name; rename one" if found else
                       "which is not there; add it, or remove it from the file")
                raise InputError(f"{f.path}: names the image {named}, {why}")
            if kind == "labelme" and any(other.path.parent == f.path.parent for other in index.get(
                    f.stem.lower(), [])) and f.stem.lower() != found[0].stem.lower():
                raise InputError(f"{f.path}: names the image {named}, not the one of its own name; correct imagePath")
            return found[0]

        read = label_formats.read_coco if kind == "coco" else label_formats.read_labelme
        drawings, here = read(content, f.path, find_image)
        part = f.part or next((PARTS[word] for word in split_words(f.stem) if word in PARTS), "")
        names += here
        for image, drawing in drawings.items():
            if image.path in labels:
                raise InputError(f"{f.path}: {image.path.name} is also labelled by {labels[image.path].path}; remove "
                                 "one of them")
            labels[image.path], images[image.path] = drawing, image._replace(part=image.part or part)
    names = list(dict.fromkeys(names if kind == "coco" else sorted(names)))
    known = [line.name for line in lines] or names
    if missing := [name for name in names if name not in known]:
        raise InputError(f"{where}: {source} has no class {missing[0]}, but labels have; add it there")
    if kind == "coco" and args.background is None:
        labels = {image: drawing for image, drawing in labels.items() if drawing.shapes}
    background, ids, classes = args.background or "background", {}, []
    for name in known:
        is_background = name.lower() in (background.lower(), layouts.LABELME_BACKGROUND)
        classes += [] if is_background or name.lower() in layouts.VOID else [name]
        ids[name] = 0 if is_background else IGNORE if name.lower() in layouts.VOID else len(classes)
    labels = {image: drawing._replace(shapes=[shape._replace(name=ids[shape.name]) for shape in drawing.shapes])
              for image, drawing in labels.items()}
    colours = {line.name: line.colour for line in lines}
    zero = next((colours.get(name) for name in known if not ids[name]), None)
    table = [(background, zero)] + [(name, colours.get(name)) for name in classes]
    return Found(f"{kind}, class names from {source or 'it'}", list(images.values()), labels, table)


def index_stems(files):
    """Return {stem in lower case, also without words such as "image": [File]}."""
    index = {}
    for f in files:
        for name in {f.stem.lower(), core_name(f.stem)[0]}:
            index.setdefault(name, []).append(f)
    return index


def find_class_lines(files, args, where):
    """Return (ClassLines, name of their file) from --classes or the source; an InputError if files disagree."""
    named = [f.path for f in files if CLASS_FILE.fullmatch(f.path.name)]
    if args.classes:
        named = [Path(args.classes)] if Path(args.classes).is_file() else [
            f.path for f in files if f.path.name.lower() == args.classes.lower()]
        if not named:
            raise InputError(f"--classes {args.classes}: no such file; correct its name")
    tables = {}
    for path in named:
        if lines := layouts.read_class_lines(path):
            lines = [x for x in lines if x.colour or x.value is not None or x.name != "__ignore__"]
            tables.setdefault(tuple(lines), path)
    if not tables:
        return [], ""
    best = max(tables, key=lambda lines: sum(x is not None for line in lines for x in line))
    for lines, path in tables.items():
        if len(lines) != len(best) or any(a.name.lower() != b.name.lower() or a.colour not in (None, b.colour)
                                          or a.value not in (None, b.value) for a, b in zip(lines, best)):
            raise InputError(f"{where}: {tables[best]} and {path} name different classes, colours or values; choose "
                             "with --classes FILE")
    names = [line.name for line in best if line.name not in layouts.VOID]
    if len(set(names)) < len(names):
        raise InputError(f"{tables[best]}: names a class twice; correct it")
    return list(best), tables[best].name


# From Found to a data set

def choose_classes(found, args):
    """Apply --merge, --only and --others; return ([(name, colour)], table (256,) uint8 from found to written ids)."""
    names, background = [name for name, _ in found.classes], args.background or "background"
    become = {name: name for name in names}
    for spec in args.merge or []:
        target, _, members = spec.partition("=")
        for name in members.split("+"):
            if name not in names or not target:
                raise InputError(f"--merge {spec}: {name!r} is not a class; it is NEW=OLD+OLD, of {', '.join(names)}")
            become[name] = target
    colours = {become[name]: colour for name, colour in reversed(found.classes)}
    colours |= {name: colour for name, colour in found.classes if become[name] == name}
    kept = list(dict.fromkeys(become.values()))
    if args.others == "void" and not args.only:
        raise InputError("--others void: says what --only makes of the other classes; give --only")
    if args.only:
        only = [name.strip() for name in args.only.split(",")]
        if unknown := [name for name in only if name not in kept]:
            raise InputError(f"--only {args.only}: {unknown[0]!r} is not a class; it is some of {', '.join(kept)}")
        has_background = background in kept or args.others == "background"
        kept = [background] * has_background + [name for name in kept if name in only and name != background]
    table = np.full(256, IGNORE, np.uint8)
    for n, name in enumerate(names):
        if become[name] in kept or args.others == "background":
            table[n] = kept.index(become[name]) if become[name] in kept else 0
    if len(kept) < 2 or len(kept) > 254:
        raise InputError(f"{found.what}: {len(kept)} class is left, {', '.join(kept)}; it takes 2 to 254")
    return [(name, colours.get(name) or (0, 0, 0)) for name in kept], table


def make_palette(classes):
    """Return the palette, 768 numbers, of [(name, colour)]: VOC's, if the colours are not distinct."""
    palette, colours = layouts.voc_palette(), [colour for _, colour in classes]
    if len(set(colours)) == len(colours):
        palette[:3 * len(colours)] = [x for colour in colours for x in colour]
        if tuple(palette[-3:]) in colours:  # that of ignored pixels
            palette[-3:] = next([n, n, n] for n in range(255, -1, -1) if (n, n, n) not in colours)
    return palette


def match_classes(classes, table, dataset):
    """Return choose_classes' result for a data set that is added to; an InputError if it lacks a class."""
    for name, _ in classes:
        if name not in dataset.classes:
            raise InputError(f"--add {dataset.root}: has no class {name}, only {', '.join(dataset.classes)}; leave it "
                             "out with --only, or rename it with --merge")
    ids = np.array([dataset.classes.index(name) for name, _ in classes] + [IGNORE] * (256 - len(classes)), np.uint8)
    return [(name, tuple(dataset.palette[3 * n:3 * n + 3])) for n, name in enumerate(dataset.classes)], ids[table]


def name_images(images):
    """Return {path of an image: id}: its stem, after its part and its folders if two have the same."""
    ids, first = {f.path: f.stem for f in images}, {}
    for folders in (lambda f: [f.part], lambda f: [*f.context, f.part]):
        counts = Counter(name.lower() for name in ids.values())
        ids |= {f.path: "_".join(filter(None, [*folders(f), f.stem])) for f in images
                if counts[ids[f.path].lower()] > 1}
    for path, name in ids.items():
        if first.setdefault(name.lower(), path) != path:
            raise InputError(f"{path}: has the name of {first[name.lower()]}; rename one, or move label maps to a "
                             "folder of their own, masks/")
    return ids


def read_parts(files, found, ids):
    """Return {id: "train", "val", "test" or ""} from the source's lists, or else from folders.

    A line of a list is an image, with its folder and suffix or without, a pair of image and label map, or a name and
    numbers.
    """
    index, listed = index_stems(found.images), {}
    lists = [f for f in files if list_part(f) and f.path not in {label.path for label in found.labels.values()}]
    for f in [f for f in lists if f.path.parent.name == "Segmentation"] or lists:  # VOC's others are of boxes
        part = list_part(f)
        for line in layouts.read_lines(f.path):
            first, _, more = line.partition(" ")
            is_pair = PurePosixPath(first).suffix.lower() in READABLE
            names = [first] if is_pair else [line, first] if re.fullmatch("[-0-9 ]+", more) else [line]
            image = next((i for i in (find_named(name, index, f._replace(part=part)) for name in names) if i), [])
            if len(image) != 1:
                raise InputError(f"{f.path}: lists {line}, which is {'not clear' if image else 'not there'}; correct "
                                 "or remove the line")
            if listed.setdefault(ids[image[0].path], part) != part:
                raise InputError(f"{f.path}: {line} is also in the list of {listed[ids[image[0].path]]}; remove one")
    return listed or {ids[f.path]: f.part for f in found.images}


def list_part(f):
    """Return the part that a File lists, or None: train.txt, Validation.txt, test2017.txt."""
    return PARTS.get(f.stem.lower().rstrip("0123456789")) if f.path.suffix.lower() == ".txt" else None


def write_pair(new, table, palette, link, job):
    """Write an image and its label map to images/ and labels/ of the folder `new`, or an image to unlabelled/.

    table: (256,) uint8, from found to written ids; link: to the image, instead of a copy; job: (image, Mask or Drawing
    or None, id). Returns (pixels of each value (256,), whether EXIF turns the image).
    """
    path, source, name = job
    (size, orientation), counts = label_formats.upright_size(path), np.zeros(256, int)
    is_turned = orientation in range(2, 9)
    if source:
        ids = label_formats.read_mask_ids(source) if isinstance(source, Mask) else None
        found = ids.shape[::-1] if ids is not None else source.size or size
        if found != size:
            remedy = ("the image's is after its EXIF orientation: if the labels lie on it as it is stored, remove it "
                      "with exiftool -Orientation= FILE") if is_turned else "make them equal"
            raise InputError(f"{source.path}: the label's size {found[0]}x{found[1]} is not its image's "
                             f"{size[0]}x{size[1]}; {remedy}")
        ids = table[label_formats.draw_shapes(source, size) if ids is None else ids]
        counts = np.bincount(ids.ravel(), minlength=256)
        label = Image.fromarray(ids).convert("P")
        label.putpalette(palette)
        write_atomically(new / f"labels/{name}.png", lambda f: label.save(f, "PNG"))
    folder, suffix = new / ("images" if source else "unlabelled"), path.suffix.lower()
    if suffix in layouts.IMAGE_SUFFIXES:
        write_atomically(folder / f"{name}{suffix}",
                         lambda f: f.symlink_to(path.resolve()) if link else shutil.copyfile(path, f))
    else:
        with catch_read_errors(path), Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
        write_atomically(folder / f"{name}.png", lambda f: image.save(f, "PNG"))
    return counts, is_turned


def run_all(map_in_parallel, function, items, what):
    """Return the results of function(item); raises the first InputError, with the number of them."""
    results = map_in_parallel(partial(attempt, function), items, what)
    errors = [error for _, error in results if error]
    if errors:
        raise InputError(errors[0] + (f" (and {len(errors) - 1} more files)" if len(errors) > 1 else ""))
    return [result for result, _ in results]


def attempt(function, item):
    """Return (function(item), "") or (None, text of its InputError)."""
    try:
        return function(item), ""
    except InputError as e:
        return None, str(e)


def make_lists(parts, counts, where, dataset):
    """Return {name: ids} of the labelled images: the source's parts, or a fifth for validation.

    If no part is for training, all images without a part are, or else all images. Without a val part the fifth is
    drawn from what is for training, by the hash of the id as layouts does, but so that every class keeps a training
    image. What is added to a data set without parts is for training.
    """
    lists = {part: [i for i in counts if parts.get(i) == part] for part in ("train", "val", "test")}
    lists["train"] = lists["train"] or [i for i in counts if not parts.get(i)]
    if not lists["train"]:
        lists = {"train": list(counts), "val": [], "test": []}
    if not lists["val"] and not dataset:
        if len(lists["train"]) < 2:
            raise InputError(f"{where}: its lists name {len(lists['train'])} labelled image for training and none for "
                             "validation; add more, or remove the lists")
        remaining = Counter(value for i in lists["train"] for value in np.flatnonzero(counts[i]))
        for i in layouts.rank_for_val(lists["train"]):
            if len(lists["val"]) < math.ceil(len(lists["train"]) / 5) and all(
                    remaining[value] > 1 for value in np.flatnonzero(counts[i])):
                lists["val"].append(i)
                remaining.subtract(np.flatnonzero(counts[i]).tolist())
        lists["val"] = lists["val"] or layouts.rank_for_val(lists["train"])[:1]
        lists["train"] = sorted(set(lists["train"]) - set(lists["val"]))
    return {name: sorted(members) for name, members in lists.items() if members}


def write_lines(file, lines):
    write_atomically(file, lambda f: f.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def write_dataset(out, new, lists, classes):
    """Write classes.txt and lists/ to `new` and move it to `out`."""
    palette = make_palette(classes)
    write_lines(new / "classes.txt", (f"{name} {' '.join(map(str, palette[3 * n:3 * n + 3]))}"
                                      for n, (name, _) in enumerate(classes)))
    for name, ids in lists.items():
        write_lines(new / f"lists/{name}.txt", ids)
    if layouts.read_classes(new / "classes.txt")[0] != [name for name, _ in classes]:
        raise InputError(f"class names {', '.join(name for name, _ in classes)}: one is empty, there twice, or no "
                         "name; rename it")
    with catch_write_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        os.rename(new, out)


def add_to_dataset(dataset, new, lists):
    """Move what is in `new` into a data set and extend its lists; an InputError if an id is there.

    The same image may be there without a label: it gets the new one, and its file stays.
    """
    folders = {"images": dataset.image_dir, "labels": dataset.label_dir, "unlabelled": dataset.root / "unlabelled"}
    moves = {f: folders[f.parent.name] / f.name for f in new.rglob("*") if not f.is_dir()}
    in_unlabelled = {f.stem: f for f in folders["unlabelled"].glob("*") if f.is_file()}
    for f, target in [*moves.items()]:
        kind, there = f.parent.name, dataset.images.get(f.stem)
        there = there or (in_unlabelled.get(f.stem) if kind == "unlabelled" else None)
        if not is_same_image(f, there) if there and kind != "labels" else os.path.lexists(target):
            raise InputError(f"--add {dataset.root}: {f.stem} is there already, with a label or with other pixels; "
                             "rename the new one, or leave it out")
        if there and kind != "labels":
            del moves[f]
    listed, lists_there, replaced = set(), {}, {}  # ids in a list; name -> (file, ids); file -> its content before
    for name in ["train", "val", *lists]:
        names = layouts.TRAIN_LISTS if name == "train" else [name]
        files_there = filter(None, (layouts.find_list(dataset.root, n) for n in names))
        file = next(files_there, dataset.root / f"lists/{name}.txt")
        lists_there[name] = file, dataset.ids(*names) if file.is_file() or name != "test" else []
        listed.update(lists_there[name][1])
    for name, (file, ids) in lists_there.items():
        write_lines(new / "lists" / file.name, ids + [i for i in lists.get(name, []) if i not in listed])
        replaced[file] = file.read_bytes() if file.is_file() else None
        moves[new / "lists" / file.name] = file
    moved = {}
    try:
        for f, target in moves.items():
            with catch_write_errors(target):
                target.parent.mkdir(exist_ok=True)
                os.replace(f, target)
            moved[f] = target
    except BaseException:
        for f, target in moved.items():
            os.replace(target, f)
            if replaced.get(target) is not None:
                target.write_bytes(replaced[target])
        raise


def is_same_image(a, b):
    """Return whether two image files show the same pixels."""
    with label_formats.catch_label_errors(b), Image.open(a) as a, Image.open(b) as b:
        a, b = (ImageOps.exif_transpose(x).convert("RGB") for x in (a, b))
        return a.size == b.size and a.tobytes() == b.tobytes()


def print_report(out, found, files, classes, counts, lists, turned):
    """Print what was recognised, the pairs, the share of each class, what was left out, and how to train."""
    unlabelled = len(found.images) - len(counts)
    image, source = next(iter(found.labels.items()))
    print(f"recognised: {found.what}; such as {image.name} with {source.path.name}")
    listed = ", ".join(f"{name} {len(ids):,}" for name, ids in lists.items())
    unlisted = len(counts) - sum(map(len, lists.values()))
    print(f"{out}: {len(counts):,} images with labels ({listed}{f', in no list {unlisted:,}' if unlisted else ''}), "
          f"{unlabelled:,} without{', in unlabelled/' if unlabelled else ''}")
    total = sum(counts.values())
    in_train = sum((counts[i] for i in lists.get("train", [])), np.zeros(256, int))
    for value, name in [*enumerate(name for name, _ in classes), (IGNORE, "void")]:
        share = 100 * total[value] / max(1, total.sum() - (0 if value == IGNORE else total[IGNORE]))
        maps = sum(bool(c[value]) for c in counts.values())
        print(f"{value:4} {name:23} {share:7.2f} % of the pixels, in {maps:,} label maps")
    for value, (name, _) in enumerate(classes):
        if not in_train[value]:
            print(f"warning: no label map for training shows {name}; label one, or leave the class out with --only")
    if turned:
        print(f"{len(turned):,} images, such as {turned[0]}, have an EXIF orientation: their labels are taken to lie "
              "on the upright image, as annotation tools show it")
    used = {f.path for f in found.images} | {source.path for source in found.labels.values()}
    left = Counter()
    for f in files:
        if f.path not in used and not list_part(f) and not CLASS_FILE.fullmatch(f.path.name):
            why = (" (instances, previews, or not in --labels)" if f.role == "unused" else
                   " (no image of this name)" if f.role == "label" and is_image_file(f) else "")
            left[f"{f.group}/*{f.path.suffix}{why}"] += 1
    print(f"not used: {shorten(f'{n:,} {name}' for name, n in left.items()) or 'nothing'}")
    script = "train_semi.py" if unlabelled else "train_base.py"
    print(f"to train: python {script} --data {out} --split 1")
