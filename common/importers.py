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
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common import label_formats, layouts
from common.console import InputError, catch_read_errors, catch_write_errors, write_atomically
from common.label_formats import SHOWN, Mask, Refused, catch_label_errors, rgb_code, shorten
from common.layouts import IGNORE

import numpy as np
from PIL import Image, ImageOps

MASK_KINDS, SHAPE_KINDS = ("index", "levels", "colour"), ("coco", "labelme", "yolo")
READABLE = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
CLASS_FILES = ("classes.txt", "class_names.txt", "labels.txt", "_classes.csv", "classes.csv", "class_dict.csv",
               "labelmap.txt", "label_colors.txt", "obj.names", "data.yaml", "dataset.yaml")
PARTS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test", testing="test")
IMAGE_WORDS = set("image images img imgs input inputs frame frames photo photos picture pictures rgb img8bit sat "
                  "original originals unlabelled unlabeled".split())
LABEL_WORDS = set("label labels mask masks annotation annotations annot gt groundtruth truth segmentation "
                  "segmentations seg cls target targets labelids labeltrainids".split())
UNUSED_FOLDER = re.compile("segmentationobject|instance|visuali[sz]|overlay|preview", re.I)
SEPARATOR = r"[\s_.\-]"


class File(NamedTuple):
    """A file of the source and what the names of its folders say.

    group: the folders down to the deepest one that says "images" or "labels", without those that only name a part;
    above: the group without that folder; below: the folders below it; stem: its name in NFC without image suffixes.
    """
    path: Path
    role: str  # "image", "label", "unused" or ""
    part: str  # "train", "val", "test" or ""
    group: tuple
    above: tuple
    below: tuple
    stem: str


class Found(NamedTuple):
    """What was recognised."""
    what: str
    images: list  # of File, with a label and without
    labels: dict  # {path of an image: Mask or Drawing}
    classes: list  # of (name, (R, G, B) or None), by class id
    parts: dict  # {path of an image: part that its label file names}


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
        files = find_files(args.source, args.labels, Path(folder) / "unpacked", args.link)
        found = recognise(files, args, where, map_in_parallel)
        classes, table = choose_classes(found, args)
        if dataset:
            classes, table = match_classes(classes, table, dataset)
        ids = name_images(found)
        parts = read_parts(files, found, ids)
        new = Path(folder) / "new"
        counts, turned = write_pairs(found, ids, table, make_palette(classes), new, args, map_in_parallel)
        lists = make_lists(parts, counts, dataset)
        if dataset:
            add_to_dataset(dataset, new, lists)
        else:
            write_dataset(out, new, lists, classes)
        print_report(args, out, found, files, classes, counts, lists, turned)


# Files and names

def find_files(sources, label_folder, unpacked, link):
    """Return the Files of all sources: folders, .zip files (unpacked to the folder `unpacked`) and .json files."""
    files, sources = [], list(map(Path, sources))
    if label_folder and Path(label_folder).is_dir() and not any(
            Path(label_folder).resolve().is_relative_to(source.resolve()) for source in sources):
        sources.append(Path(label_folder))
    for n, source in enumerate(sources):
        if not source.exists():
            raise InputError(f"{source}: no such file or folder; correct its name")
        name = source.stem if source.is_file() else source.resolve().name
        outer = [(name, source)] if len(sources) > 1 else []
        if source.suffix.lower() == ".zip" and source.is_file():
            if link:
                raise InputError(f"--link {source}: its files cannot be linked to; unpack it, or leave --link out")
            root = unpack_zip(source, unpacked / str(n))
        elif source.suffix.lower() == ".json" and source.is_file():
            files.append(describe_file(source, [], label_folder))
            continue
        elif source.is_dir():
            root = source
        else:
            raise InputError(f"{source}: neither a folder nor a .zip or .json file; name one")
        with catch_read_errors(source):
            for at, folders, found in os.walk(root, followlinks=True, onerror=raise_error):
                folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
                inner = Path(at).relative_to(root)
                parents = outer + [(p.name, root / p) for p in [*reversed(inner.parents), inner] if p.name]
                names_here = sorted(name for name in found if name[0] != ".")
                files += [describe_file(Path(at, name), parents, label_folder) for name in names_here]
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
        archive.extractall(folder)
    return folder


def split_words(name):
    """Return the lower-case words of a name: "SegmentationClass", "train_masks2" -> segmentation class, train masks."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?=annot$)", " ", name)
    return [word.rstrip("0123456789") or word for word in re.split(r"[\W_]+", name.lower()) if word]


def describe_file(path, parents, label_folder):
    """Return the File of `path`. parents: [(name, path)] of its folders, outermost first; label_folder: of --labels."""
    role, part, group, below, is_chosen = "", "", [], [], False
    for n, (name, folder) in enumerate(parents):
        words = split_words(name)  # "train_masks" names a part and says "labels"
        part = next((PARTS[word] for word in words if word in PARTS), part)
        rest = name if not PARTS.keys() & set(words) else "_".join(word for word in words if word not in PARTS)
        chosen = label_folder and (folder.resolve() == Path(label_folder).resolve() or label_folder.strip("/").lower()
                                   in (name.lower(), "/".join(p[0] for p in parents[:n + 1]).lower()))
        says = ("label" if chosen else "" if is_chosen else "unused" if UNUSED_FOLDER.search(name) else
                "label" if LABEL_WORDS & set(words) else "image" if IMAGE_WORDS & set(words) else "")
        below += [rest] if rest or says else []
        is_chosen = is_chosen or bool(chosen)
        if says == "label" and label_folder and not chosen:
            says = "unused"
        if says:
            role, group, below = says, group + below, []
    stem = unicodedata.normalize("NFC", path.stem)
    while PurePosixPath(stem).suffix.lower() in READABLE:
        stem = PurePosixPath(stem).stem
    if role:
        return File(path, role, part, tuple(group), tuple(group[:-1]), tuple(below), stem)
    return File(path, role, part, tuple(below), tuple(below), (), stem)


def is_image_file(file):
    return file.path.suffix.lower() in READABLE


def core_name(stem):
    """Return (name without the words that say image or label, whether it says label): 001_mask -> 001, True."""
    words = re.split(SEPARATOR, stem)
    says_label = [word.lower() in LABEL_WORDS or word == "L" and n for n, word in enumerate(words)]
    core = [word for word, says in zip(words, says_label) if not says and word.lower() not in IMAGE_WORDS]
    return "_".join(core).lower(), any(says_label)


def split_roles(files):
    """Return (images, label candidates) among the image files.

    A file whose name is that of another file of its folder and a word such as "mask" is a label. If a folder says
    "images", files in folders that say nothing may be labels as well.
    """
    folders, image_files = {}, []
    for f in files:
        if is_image_file(f) and f.role != "unused":
            folders.setdefault(f.path.parent, []).append(f)
    for here in folders.values():
        named = [(f, *core_name(f.stem)) for f in here]
        plain = {core for _, core, says_label in named if not says_label}
        labels = {core for _, core, says_label in named
                  if says_label and plain & {"", *(core[:m.start()] for m in re.finditer("_|$", core))}}
        for f, core, says_label in named:
            role = "label" if says_label and core in labels else "image" if core in labels else f.role
            image_files.append(f._replace(role=role))
    image_role = "image" if any(f.role == "image" for f in image_files) else ""
    return [f for f in image_files if f.role == image_role], [f for f in image_files if f.role != image_role]


def match_names(images, labels):
    """Return ({index of an image: [labels]}, labels that are left) by folders and names.

    Tried are equal names, then without regard to case, without words such as "mask", and without what all names of a
    side begin or end with; with the folders below images/ and labels/, with the part alone, and without both. The
    attempt that finds the most images wins, and of equals the strictest.
    """
    def trim(files):
        names = [f.stem.lower() for f in files]
        start = re.match(rf"(.*{SEPARATOR})?", os.path.commonprefix(names))[0]
        end = re.match(rf"(.*{SEPARATOR})?", os.path.commonprefix([name[::-1] for name in names]))[0]
        return [name[len(start):len(name) - len(end)] if len(names) > 1 else name for name in names]

    is_shared = bool({f.above for f in images} & {f.above for f in labels})
    best, left = {}, labels
    for names in (lambda files: [f.stem for f in files], lambda files: [f.stem.lower() for f in files],
                  lambda files: [core_name(f.stem)[0] for f in files], trim):
        for key in (lambda f: (f.part, f.below), lambda f: f.part, lambda f: ""):
            keys, of_labels = ([(f.above if is_shared else (), key(f), name) for f, name in zip(side, names(side))]
                               for side in (images, labels))
            index = {k: n for n, k in enumerate(keys)}
            found, rest = {}, []
            for label, k in zip(labels, of_labels):
                found.setdefault(index[k], []).append(label) if k in index else rest.append(label)
            if len(index) == len(images) and len(found) > len(best):
                best, left = found, rest
    return best, left


def pair_masks(images, candidates, where):
    """Return {path of an image: path of its label map}, {} if there is none.

    Raises InputError if an image has several label maps, or if none has the name of an image.
    """
    first = {}
    for f in images:
        if (other := first.setdefault((f.above, f.part, f.below, f.stem), f)) is not f:
            raise InputError(f"{where}: two images of one name, {other.path} and {f.path}; rename one")
    labels = [f for f in candidates if f.role == "label"]
    alone, maps = (Counter(f.above for f in side) for side in (images, labels))
    if len(alone) > 1 and max(alone.values()) == 1 and any(maps[folder] > 1 for folder in alone):
        folder = max(alone, key=lambda folder: maps[folder])
        image = next(f.path for f in images if f.above == folder)
        raise InputError(f"{where}: a folder per image: {image} is alone, with {maps[folder]} label maps; join them to "
                         "one map of class ids per image, in images/ and labels/")
    groups, owners = {}, {}
    stems = {f.stem: f.path for f in images}
    for f in candidates:
        groups.setdefault("/".join(f.group) or ".", []).append(f)
    for group, members in groups.items():
        found, rest = match_names(images, members)
        if members[0].role != "label" and len(found) < len(members) / 2:
            continue
        maps = {images[n].path: owned for n, owned in found.items()}
        for f in rest:  # 1000_circle_1 and 1000_circle_2 are of the image 1000
            starts = [f.stem[:m.start()] for m in re.finditer(SEPARATOR, f.stem)]
            if owner := next((stems[start] for start in reversed(starts) if start in stems), None):
                maps[owner] = [*maps.get(owner, []), f]
        for image, owned in maps.items():
            if len(owned) > 1:
                raise InputError(f"{where}: {image.name} has several label maps, such as {owned[0].path.name} and "
                                 f"{owned[1].path.name}; join them to one map of class ids per image")
        for n, owned in found.items():
            owners.setdefault(images[n].path, {})[group] = owned[0].path
    for image, maps in owners.items():
        if len(maps) > 1:
            raise InputError(f"{where}: {' and '.join(maps)} both hold a label map of {image.name}; choose with "
                             + " or ".join(f"--labels {group}" for group in maps))
    if labels and images and not owners:
        raise InputError(f"{where}: no label map has the name of its image: {len(images)} images such as "
                         f"{images[0].path.name}, {len(labels)} label maps such as {labels[0].path.name}; rename them")
    return {image: next(iter(maps.values())) for image, maps in owners.items()}


def find_image(named, f, index):
    """Return the File of the image that the label file `f` names; an InputError if it is not there or not clear.

    index: {file name in NFC and lower case: [File]}. Of several the one whose folders are named too wins, then the one
    beside `f`, then one of its part.
    """
    parts = [p for p in re.split(r"[\\/]", unicodedata.normalize("NFC", str(named))) if p not in ("", ".", "..")]
    found = index.get(parts[-1].lower(), []) if parts else []
    for is_near in (lambda x: x.role != "label", lambda x: list(x.path.parts[-len(parts):]) == parts,
                    lambda x: x.path.parent == f.path.parent, lambda x: x.part == f.part):
        found = [x for x in found if len(found) > 1 and is_near(x)] or found
    if len(found) != 1:
        why = (f"but {found[0].path} and {found[1].path} have this name; rename one" if found else
               "which is not there; add it, or remove it from the file")
        raise InputError(f"{f.path}: names the image {named}, {why}")
    return found[0]


# Recognisers

def recognise(files, args, where, map_in_parallel):
    """Return the Found of the one kind of labels in the source; an InputError if there is none, or several."""
    images, candidates = split_roles(files)
    jsons = read_jsons(files) if args.kind not in MASK_KINDS + ("yolo",) else {}
    texts = [f for f in files if f.path.suffix.lower() == ".txt" and f.path.name.lower() not in CLASS_FILES]
    texts = {images[n].path: [f.path for f in found] for n, found in match_names(images, texts)[0].items()}
    kinds = {kind: shorten(f.path.name for f, _ in found) for kind, found in jsons.items() if found}
    if args.kind == "yolo" or any(is_numeric(path) for paths in texts.values() for path in paths):
        kinds["yolo"] = shorten(paths[0].name for paths in texts.values())
    if args.kind in SHAPE_KINDS:
        kinds = {args.kind: kinds[args.kind]} if kinds.get(args.kind) else {}
    elif args.kind:
        kinds = {"masks": ""}
    elif not kinds or match_names(images, candidates)[0]:
        kinds["masks"] = shorten(sorted({"/".join(f.group) or "." for f in candidates}))
    if len(kinds) > 1:
        held = ", ".join(f"{kind} ({names})" for kind, names in kinds.items())
        raise InputError(f"{where}: holds labels of several kinds: {held}; choose with --kind (of masks: index, "
                         "levels or colour)")
    kind = next(iter(kinds), None)
    found = None
    if kind == "masks":
        found = recognise_masks(files, images, candidates, args, where, map_in_parallel)
    elif kind:
        found = recognise_shapes(kind, files, images, jsons.get(kind), texts, args, where)
    if not found or not found.labels:
        endings = Counter(f"{'/'.join(f.group + f.below) or '.'}/*{f.path.suffix.lower()}" for f in files)
        held = ", ".join(f"{n} {ending}" for ending, n in endings.most_common(SHOWN))
        raise InputError(f"{where}: no labels that are recognised; it holds {held or 'no files'}; name the folder of "
                         "the label maps with --labels DIR")
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
    names = [line.name for line in classes]
    kind, values = label_formats.choose_encoding(scans, ids, colours, names, source, args.kind)
    table = [(background if line.name == layouts.LABELME_BACKGROUND else line.name, line.colour) for line in classes]
    held = {"index": "class ids", "levels": f"grey levels {shorten(v for v, _ in values)}", "colour": "colours"}[kind]
    labels = {image: Mask(path, kind, values) for image, path in pairs.items()}
    return Found(f"label maps with {held}, class names from {source}", images, labels, table, {})


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
    labels, parts, names, images_by_path = {}, {}, [], {f.path: f for f in images}
    if kind == "yolo":
        if not lines:
            raise InputError(f"{where}: no class names for YOLO's polygons; add data.yaml or classes.txt, or name the "
                             "file with --classes FILE")
        if two := next((paths for paths in texts.values() if len(paths) > 1), None):
            raise InputError(f"{two[0]}: {two[1]} is of the same image; remove one")
        numbers = {n if line.value is None else line.value: line.name for n, line in enumerate(lines)}
        for image, (path,) in texts.items():
            labels[image] = label_formats.read_yolo(path, numbers, upright_size(image)[0])
    index = {}
    for f in files:
        if is_image_file(f):
            index.setdefault(unicodedata.normalize("NFC", f.path.name).lower(), []).append(f)
    for f, content in jsons or []:
        part = f.part or next((PARTS[word] for word in split_words(f.stem) if word in PARTS), "")
        read = label_formats.read_coco if kind == "coco" else label_formats.read_labelme
        drawings, here = read(content, f.path, lambda named, f=f: find_image(named, f, index))
        names += here
        for image, drawing in drawings.items():
            if image.path in labels:
                raise InputError(f"{f.path}: {image.path.name} is also labelled by {labels[image.path].path}; remove "
                                 "one of them")
            labels[image.path], parts[image.path] = drawing, image.part or part
            images_by_path.setdefault(image.path, image)
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
    return Found(f"{kind}, class names from {source or 'it'}", [*images_by_path.values()], labels, table, parts)


def find_class_lines(files, args, where):
    """Return (ClassLines, name of their file) from --classes or the source; an InputError if files disagree."""
    if args.classes:
        named = [Path(args.classes)] if Path(args.classes).is_file() else [
            f.path for f in files if f.path.name.lower() == args.classes.lower()]
        if not named:
            raise InputError(f"--classes {args.classes}: no such file; correct its name")
    else:
        named = [f.path for f in files if f.path.name.lower() in CLASS_FILES]
    tables = {}
    for path in named:
        if lines := layouts.read_class_lines(path):
            key = tuple(x for x in lines if x.colour or x.value is not None or x.name != "__ignore__")
            tables.setdefault(tuple(x.name.lower() for x in key), {})[key] = path
    if len(tables) > 1:
        paths = [str(path) for table in tables.values() for path in table.values()]
        raise InputError(f"{where}: {' and '.join(paths[:3])} name different classes; choose with --classes FILE")
    for names, table in tables.items():
        if len(table) > 1 and len({key for key in table if key[0].colour or key[0].value is not None}) > 1:
            raise InputError(f"{where}: {' and '.join(map(str, table.values()))} give the classes different colours or "
                             "values; choose with --classes FILE")
        if any(names.count(name) > 1 for name in set(names) - {*layouts.VOID}):
            raise InputError(f"{next(iter(table.values()))}: names a class twice; correct it")
        key = max(table, key=lambda key: (key[0].colour is not None, key[0].value is not None))
        return list(key), table[key].name
    return [], ""


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
    """Return (the classes of a data set that is added to, table with its ids); an InputError if it lacks a class."""
    for name, _ in classes:
        if name not in dataset.classes:
            raise InputError(f"--add {dataset.root}: has no class {name}, only {', '.join(dataset.classes)}; leave it "
                             "out with --only, or rename it with --merge")
    ids = np.array([dataset.classes.index(name) for name, _ in classes] + [IGNORE] * (256 - len(classes)), np.uint8)
    return [(name, tuple(dataset.palette[3 * n:3 * n + 3])) for n, name in enumerate(dataset.classes)], ids[table]


def name_images(found):
    """Return {path of an image: id}: its stem, after its part and folders if two have the same."""
    ids = {f.path: f.stem for f in found.images}
    for folders in (lambda f: [f.part], lambda f: [*f.above, f.part, *f.below]):
        counts = Counter(name.lower() for name in ids.values())
        ids |= {f.path: "_".join(filter(None, [*folders(f), f.stem])) for f in found.images
                if counts[ids[f.path].lower()] > 1}
    first = {}
    for path, name in ids.items():
        if first.setdefault(name.lower(), path) != path:
            raise InputError(f"{path}: has the same name as {first[name.lower()]}; rename one")
    return ids


def read_parts(files, found, ids):
    """Return {id: "train", "val" or "test"} from the source's lists, or else from folders; {} if it names no two parts.

    A line of a list is an image, with its folder and suffix or without, or a pair of image and label map.
    """
    sources = {source.path for source in found.labels.values()}
    named, listed = {}, {}
    for f in found.images:
        for name in {f.stem, core_name(f.stem)[0]}:
            named.setdefault(name, []).append(f)
    for f in files:
        if not (part := list_part(f)) or f.path in sources:
            continue
        for line in layouts.read_lines(f.path):
            first, *_, last = line.split() * 2
            is_pair = last != first and PurePosixPath(first).suffix.lower() in READABLE
            image = None if is_pair else find_listed(named, line, part)
            if is_pair or re.fullmatch(r"\S+( -?[0-9]+)+", line):  # VOC's lists of a class have 1 or -1 after the name
                image = image or find_listed(named, first, part)
            if not image:
                raise InputError(f"{f.path}: lists {line}, which is not there; add it, or remove the line")
            label = found.labels.get(image.path)
            if is_pair and label and PurePosixPath(last.replace("\\", "/")).name != label.path.name:
                raise InputError(f"{f.path}: the line {line!r} names another label map than {label.path.name}, which "
                                 "has the image's name; rename the label maps after their images")
            if listed.setdefault(ids[image.path], part) != part:
                raise InputError(f"{f.path}: {line} is also in the list of {listed[ids[image.path]]}; remove one")
    parts = listed or {ids[f.path]: found.parts.get(f.path) or f.part for f in found.images}
    parts = {name: part for name, part in parts.items() if part}
    return parts if "train" in parts.values() and len(set(parts.values())) > 1 else {}


def list_part(f):
    """Return the part that a File lists, or None: train.txt, Validation.txt, test2017.txt."""
    return PARTS.get(f.stem.lower().rstrip("0123456789")) if f.path.suffix.lower() == ".txt" else None


def find_listed(named, name, part):
    """Return the File that a line of a list of `part` names, or None. named: {stem: [File]}."""
    path = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    stem = path.stem if path.suffix.lower() in READABLE else path.name
    found = named.get(stem, [])
    found = [f for f in found if f.part == part] if len(found) > 1 else found
    return found[0] if len(found) == 1 else None


def upright_size(path):
    """Return ((W,H) of an image after its EXIF orientation, whether it has one); an InputError for float or 16 bits."""
    with catch_label_errors(path), Image.open(path) as image:
        if image.mode[0] in "IF" or image.mode in ("RGBX", "La"):
            raise Refused(f"pixels of mode {image.mode}; convert it to 8 bits a channel, grey or RGB")
        if image.format in ("TIFF", "GIF") and getattr(image, "n_frames", 1) > 1:
            raise Refused(f"holds {image.n_frames} pages; save them as images of their own")
        orientation = image.getexif().get(0x0112, 1)
        if image.format == "TIFF":  # whether PIL gives the upright size before it loads the file depends on its version
            return ImageOps.exif_transpose(image).size, orientation in range(2, 9)
        return image.size[::-1] if orientation in range(5, 9) else image.size, orientation in range(2, 9)


def write_pair(job):
    """Write an image and its label map; return ((pixels of each value (256,), whether EXIF turns it), error or "").

    job: (image, Mask or Drawing or None, table (256,) uint8 from found to written ids, palette, image target without
    suffix, label target, whether to link).
    """
    path, source, table, palette, target, label_target, link = job
    try:
        (size, is_turned), counts = upright_size(path), np.zeros(256, int)
        if source:
            ids = table[label_formats.read_label_map(source, size)]
            counts = np.bincount(ids.ravel(), minlength=256)
            label = Image.fromarray(ids).convert("P")
            label.putpalette(palette)
            write_atomically(label_target, lambda f: label.save(f, "PNG"))
        write_image(path, target, link)
        return (counts, is_turned), ""
    except label_formats.WrongSize as e:
        remedy = ("the image's is after its EXIF orientation: if the labels lie on it as it is stored, remove it with "
                  "exiftool -Orientation= FILE") if is_turned else "make them equal"
        return None, f"{e}; {remedy}"
    except InputError as e:
        return None, str(e)


def write_image(path, target, link):
    """Copy or link an image to `target` plus its suffix, or write it anew as PNG if training cannot read its kind."""
    suffix = path.suffix.lower()
    if suffix in layouts.IMAGE_SUFFIXES:
        target = target.with_name(target.name + suffix)
        write_atomically(target, lambda f: f.symlink_to(path.resolve()) if link else shutil.copyfile(path, f))
        return
    with catch_read_errors(path), Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    write_atomically(target.with_name(target.name + ".png"), lambda f: image.save(f, "PNG"))


def run_all(map_in_parallel, function, items, what):
    """Return the results of function(item) -> (result, error); raises the first error as an InputError."""
    results = map_in_parallel(function, items, what) if len(items) > 20 else [function(item) for item in items]
    errors = [error for _, error in results if error]
    if errors:
        more = f" (and {len(errors) - 1} more files)" if len(errors) > 1 else ""
        raise InputError(errors[0] + more)
    return [result for result, _ in results]


def write_pairs(found, ids, table, palette, new, args, map_in_parallel):
    """Write images/, labels/ and unlabelled/ to the folder `new`; return ({id: pixels of each value}, turned ids)."""
    jobs = []
    for f in found.images:
        source, name = found.labels.get(f.path), ids[f.path]
        folder = "images" if source else "unlabelled"
        jobs.append((f.path, source, table, palette, new / folder / name, new / f"labels/{name}.png", args.link))
    results = run_all(map_in_parallel, write_pair, jobs, "writing")
    counts = {ids[f.path]: r[0] for f, r in zip(found.images, results) if f.path in found.labels}
    return counts, [ids[f.path] for f, r in zip(found.images, results) if f.path in found.labels and r[1]]


def make_lists(parts, counts, dataset):
    """Return {name: ids} of the labelled images: the source's parts, or a fifth for validation.

    Without a val part the fifth is drawn from what is for training, by the hash of the id as layouts does, but so that
    every class keeps a training image. What is added to a data set without parts is for training.
    """
    lists = {part: [i for i in counts if parts.get(i) == part] for part in ("train", "val", "test")}
    if not parts or not lists["train"]:
        lists["train"] = list(counts)
    if not lists["val"] and not dataset:
        remaining = Counter(value for i in lists["train"] for value in np.flatnonzero(counts[i]))
        for i in layouts.rank_for_val(lists["train"]):
            if len(lists["val"]) < math.ceil(len(lists["train"]) / 5) and all(
                    remaining[value] > 1 for value in np.flatnonzero(counts[i])):
                lists["val"].append(i)
                remaining.subtract(np.flatnonzero(counts[i]).tolist())
        lists["val"] = lists["val"] or layouts.rank_for_val(lists["train"])[:1]
        lists["train"] = sorted(set(lists["train"]) - set(lists["val"]))
    return {name: sorted(members) for name, members in lists.items() if members}


def write_dataset(out, new, lists, classes):
    """Write classes.txt and lists/ to `new` and move it to `out`."""
    palette = make_palette(classes)
    lines = [f"{name} {' '.join(map(str, palette[3 * n:3 * n + 3]))}" for n, (name, _) in enumerate(classes)]
    for file, content in [("classes.txt", lines)] + [(f"lists/{name}.txt", ids) for name, ids in lists.items()]:
        write_atomically(new / file, lambda f: f.write_text("".join(f"{line}\n" for line in content), encoding="utf-8"))
    if layouts.read_classes(new / "classes.txt")[0] != [name for name, _ in classes]:
        raise InputError(f"class names {', '.join(name for name, _ in classes)}: one is empty, there twice, or no "
                         "name; rename it")
    with catch_write_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        os.rename(new, out)


def add_to_dataset(dataset, new, lists):
    """Move what is in `new` into a data set and extend its lists; an InputError if an id is there."""
    known = dataset.images.keys() | dataset.labels.keys()
    files = [f for f in new.rglob("*") if not f.is_dir()]
    for f in files:
        if f.stem in known:
            raise InputError(f"--add {dataset.root}: {f.stem} is there already; rename the new one, or leave it out")
    folders = {"images": dataset.image_dir, "labels": dataset.label_dir, "unlabelled": dataset.root / "unlabelled"}
    written = {}
    for name in {"train", "val", *lists}:
        names = layouts.TRAIN_LISTS if name == "train" else [name]
        files_there = filter(None, (layouts.find_list(dataset.root, n) for n in names))
        file = next(files_there, dataset.root / f"lists/{name}.txt")
        there = dataset.ids(*names) if file.is_file() or name != "test" else []
        written[file] = there + lists.get(name, [])
    before = {file: file.read_bytes() if file.is_file() else None for file in written}
    moved = []
    try:
        for f in files:
            target = folders[f.parent.name] / f.name
            if os.path.lexists(target):
                raise InputError(f"--add {dataset.root}: {target.name} is there already; rename the new one")
            with catch_write_errors(target):
                target.parent.mkdir(exist_ok=True)
                os.rename(f, target)
            moved.append(target)
        for file, content in written.items():
            write_atomically(file, lambda f: f.write_text("".join(f"{i}\n" for i in content), encoding="utf-8"))
    except BaseException:
        for target in moved:
            target.unlink()
        for file, content in before.items():
            file.unlink(missing_ok=True) if content is None else file.write_bytes(content)
        raise


def print_report(args, out, found, files, classes, counts, lists, turned):
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
        if f.path not in used and not list_part(f) and f.path.name.lower() not in CLASS_FILES:
            why = (" (instances, previews, or not in --labels)" if f.role == "unused" else
                   " (no image of this name)" if f.role == "label" and is_image_file(f) else "")
            left["/".join([*f.group, *f.below, f"*{f.path.suffix}"]) + why] += 1
    print(f"not used: {shorten(f'{n:,} {name}' for name, n in left.items()) or 'nothing'}")
    script = "train_semi.py" if unlabelled else "train_base.py"
    print(f"to train: python {script} --data {out} --split 1")
