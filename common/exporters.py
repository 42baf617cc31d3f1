"""Predictions for annotation tools: a zip that CVAT imports, or COCO JSON. prepare.py import reads both.

Both are written from label maps on disk, one image at a time: PNGs of class ids in mode P, 255 where unlabelled.
"""
import json
import os
import re
import zipfile
from pathlib import Path

from common.console import InputError, write_atomically
from common.importers import make_palette
from common.layouts import IGNORE

import numpy as np
from PIL import Image

SUFFIXES = {"cvat": ".zip", "coco": ".json"}
NOT_IN_LABELMAP = re.compile("[:,]|^#")  # a colon ends the name, a comma separates numbers, # begins a comment


def check_export(out, kind, classes):
    """Return --out as a Path; an InputError if it is not a new file of this kind, or cannot hold the class names."""
    if Path(out).suffix.lower() != SUFFIXES[kind]:
        raise InputError(f"--out {out}: --format {kind} writes one file; give it a name that ends in {SUFFIXES[kind]}")
    if os.path.lexists(out):
        raise InputError(f"--out {out}: exists; name a new file, or remove it")
    if names := [name for name in classes if kind == "cvat" and NOT_IN_LABELMAP.search(name)]:
        raise InputError(f"--format cvat: the class name {names[0]!r} has a comma, a colon or # at its start, which "
                         "labelmap.txt cannot hold; use --format coco")
    return Path(out)


def write_cvat(out, paths, labels, classes, palette):
    """Write label maps as a zip in CVAT's format Segmentation mask 1.1: RGB images, and labelmap.txt of their colours.

    Args:
        out: the zip.
        paths: of the images; CVAT finds them by their names without suffix.
        labels: paths of their label maps.
        classes: names.
        palette: 768 numbers; VOC's is used if it gives two classes one colour. 255 has the colour of `void`.
    """
    palette = make_palette([(name, tuple(palette[3 * n:3 * n + 3])) for n, name in enumerate(classes)])
    entries = dict(zip(classes, range(len(classes))))

    def write(part):
        with zipfile.ZipFile(part, "w") as archive:
            for path, label in zip(paths, labels):
                with Image.open(label) as image, archive.open(f"SegmentationClass/{path.stem}.png", "w") as file:
                    if image.getextrema()[1] == IGNORE:
                        entries["void"] = IGNORE  # CVAT refuses colours that are not in labelmap.txt
                    image.putpalette(palette)
                    image.convert("RGB").save(file, "PNG")
            lines = [f"{name}:{','.join(map(str, palette[3 * n:3 * n + 3]))}::" for name, n in entries.items()]
            for name, text in (("labelmap.txt", ["# label:color_rgb:parts:actions", *lines]),
                               ("ImageSets/Segmentation/default.txt", [path.stem for path in paths])):
                archive.writestr(name, "".join(f"{line}\n" for line in text))
    write_atomically(out, write)


def write_coco(out, paths, labels, classes, palette=None):
    """Write label maps as COCO JSON, an annotation for each class of an image; unlabelled pixels are in none.

    Category ids are class ids + 1, because tools take 0 for "no category". Arguments as in write_cvat, without colours.
    """
    def write(part):
        images, count = [], 0
        with open(part, "w", encoding="utf-8") as file:
            file.write('{"annotations": [')
            for path, label in zip(paths, labels):
                with Image.open(label) as image:
                    ids = np.asarray(image)
                images.append(dict(id=len(images) + 1, file_name=path.name, width=ids.shape[1], height=ids.shape[0]))
                for annotation in coco_annotations(ids):
                    count += 1
                    file.write(",\n" * (count > 1) + json.dumps(dict(id=count, image_id=len(images), **annotation)))
            categories = [dict(id=n + 1, name=name, supercategory="") for n, name in enumerate(classes)]
            file.write(f'],\n"categories": {json.dumps(categories)},\n"images": {json.dumps(images)}}}\n')
    write_atomically(out, write)


def coco_annotations(ids):
    """Yield the annotation of each class in a label map (H,W), as COCO's uncompressed run lengths."""
    flat = ids.T.ravel()  # column by column
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.stack([np.r_[0, edges], np.r_[edges, flat.size]], 1)  # (runs, 2): start and end
    for class_id in np.unique(flat[flat != IGNORE]).tolist():
        own, mask = bounds[flat[bounds[:, 0]] == class_id], ids == class_id
        counts = np.diff(own.ravel(), prepend=0, append=flat.size)  # outside and inside in turns
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        corner, end = (columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)
        yield dict(category_id=class_id + 1, iscrowd=1, area=int(counts[1::2].sum()),
                   bbox=[*map(int, corner), *(int(b - a) for a, b in zip(corner, end))],
                   segmentation=dict(counts=counts.tolist(), size=list(ids.shape)))


WRITERS = {"cvat": write_cvat, "coco": write_coco}
