"""prepare.py import: exports of annotation tools and folders of masks, read, converted, or refused in one line."""
import base64
import hashlib
import io
import json
import os
import re
import shutil
import unicodedata
import zipfile
from pathlib import Path

from common import label_formats, layouts

import numpy as np
import pytest
from conftest import ROOT, call
from PIL import Image

import data

NAMES = ["background", "weed", "crop"]
RGB = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)  # of the classes
# of each image: (class, (left, top, right, bottom)), ...
BOXES = [[(1, (4 + n, 5, 20 + n, 15)), (2, (10, 18, 30 - n, 28))] for n in range(5)]
CASES = ROOT.parent / "shared/cases"
COMPRESSED = f"n9:d{'0' * 38}j8"  # class 2 of image 0, as pycocotools.mask.encode gives it


def ids_of(n):
    """The label map (30,40) uint8 of image n."""
    ids = np.zeros((30, 40), np.uint8)
    for value, (left, top, right, bottom) in BOXES[n]:
        ids[top:bottom, left:right] = value
    return ids


def write(file, content):
    """Write text, bytes, an object as JSON, or an array as an image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def picture(n):
    """A noisy photograph (30,40,3) of image n."""
    return RGB[ids_of(n % 5)] // 2 + np.random.RandomState(n).randint(25 * n, 25 * n + 9, (30, 40, 3), np.uint8)


def masks(root, name="images/a{n}.png", label="masks/a{n}.png", encode=np.copy, classes="background\nweed\ncrop",
          file="classes.txt", count=5):
    """Write a folder of images and label maps; encode: function of class ids (H,W) -> array or bytes of a file."""
    for n in range(count):
        part = "val" if n == 4 else "train"
        write(root / name.format(n=n, part=part), picture(n))
        write(root / label.format(n=n, part=part), encode(ids_of(n)))
    if classes:
        write(root / file, classes)


def paletted(ids, palette):
    image = Image.fromarray(ids).convert("P")
    image.putpalette(palette)
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def box_points(box):
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def coco(n_images=5, first=0, **more):
    """A COCO file: polygons for class 1, uncompressed run lengths for class 2."""
    images, annotations = [], []
    for n in range(first, first + n_images):
        images.append({"id": n, "file_name": f"a{n}.png", "width": 40, "height": 30})
        for value, box in BOXES[n]:
            mask = (ids_of(n) == value).T.ravel()
            edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), mask.size]
            rle = {"counts": np.diff(edges).tolist() if n else COMPRESSED, "size": [30, 40]}
            polygon = [[x for point in box_points(box) for x in point]]
            annotations.append({"id": len(annotations), "image_id": n, "category_id": 7 + value, "iscrowd": value - 1,
                                "segmentation": polygon if value == 1 else rle})
    categories = [{"id": 9, "name": "crop"}, {"id": 8, "name": "weed"}]
    return {"images": images, "annotations": annotations, "categories": categories} | more


def labelme(n, **more):
    """A LabelMe file: class 1 as a rectangle, class 2 as a mask."""
    with io.BytesIO() as file:
        (_, box), (_, (left, top, right, bottom)) = BOXES[n]
        Image.new("1", (right - left, bottom - top), 1).save(file, "PNG")
        mask = base64.b64encode(file.getvalue()).decode()
    shapes = [{"label": "weed", "shape_type": "rectangle", "points": [box[:2], box[2:]]},
              {"label": "crop", "shape_type": "mask", "mask": mask, "points": [[left, top], [right - 1, bottom - 1]]}]
    return {"shapes": shapes, "imagePath": f"a{n}.png", "imageWidth": 40, "imageHeight": 30, "imageData": None} | more


def yolo(n):
    return "".join(f"{value - 1} " + " ".join(f"{x / 40:.6f} {y / 30:.6f}" for x, y in box_points(box)) + "\n"
                   for value, box in BOXES[n])


def photos(root, name="images/a{n}.png"):
    for n in range(5):
        write(root / name.format(n=n, part="val" if n == 4 else "train"), picture(n))


def run(source, tmp_path, *flags, out="mine"):
    """Import into tmp_path/mine; return the Dataset, after checking that the source is as it was."""
    before = {f: hashlib.md5(f.read_bytes()).digest() for f in Path(source).rglob("*") if f.is_file()}
    call("prepare", "import", source, *([] if "--add" in flags else ["--out", tmp_path / out]), *flags)
    assert before == {f: hashlib.md5(f.read_bytes()).digest() for f in Path(source).rglob("*") if f.is_file()}
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    return layouts.open_dataset(str(tmp_path / out))


def label_maps(dataset):
    """{id: class ids (H,W)} as training reads them."""
    samples = dataset.samples(sorted(dataset.labels))
    return {s.id: data.read_label(s.label, data.read_image(s.image).size) for s in samples}


def check(dataset, names=NAMES, ids="a{n}", expected=ids_of, count=5):
    """All label maps are those of ids_of, and lie on their images."""
    found = label_maps(dataset)
    assert dataset.classes == names and sorted(found) == sorted(ids.format(n=n) for n in range(count))
    for n in range(count):
        assert np.array_equal(found[ids.format(n=n)], expected(n)), n
        image = np.array(data.read_image(dataset.images[ids.format(n=n)]))
        assert np.abs(image.astype(int) - picture(n)).mean() < 10
    assert sorted(dataset.train_ids() + dataset.ids("val")) == sorted(found)


LEVELS, VOC, PIXELS = np.array([0, 127, 254], np.uint8), layouts.voc_palette(), np.arange(1200).reshape(30, 40)
TABLE = "\n".join(f"{name} {r} {g} {b}" for name, (r, g, b) in zip(NAMES, RGB.tolist()))
MASKS = {
    "index": {},
    "palette": dict(encode=lambda ids: paletted(ids, VOC)),
    "16 bits": dict(encode=lambda ids: ids.astype(np.uint16)),
    "grey as RGB": dict(encode=lambda ids: np.dstack([ids] * 3)),
    "tif": dict(name="images/a{n}.tif", label="masks/a{n}.tif"),
    "bmp": dict(name="images/a{n}.bmp", label="masks/a{n}.bmp"),
    "levels": dict(encode=LEVELS.__getitem__),
    "colours": dict(encode=RGB.__getitem__, classes=TABLE),
    "colours with void": dict(encode=RGB.__getitem__, classes=TABLE + "\nvoid 255 255 255"),
    "palette in the classes' colours": dict(classes=TABLE, encode=lambda ids: paletted(
        5 - ids, [9] * 9 + RGB[::-1].ravel().tolist())),
    "class_dict.csv": dict(encode=RGB.__getitem__, file="class_dict.csv",
                           classes="name,r,g,b\n" + TABLE.replace(" ", ",")),
    "numbers with gaps": dict(encode=np.array([0, 3, 7], np.uint8).__getitem__,
                              classes="7 crop\n0 background\n3 weed"),
    "numbers without background": dict(classes="1 weed\n2 crop"),
    "label_colors.txt": dict(encode=RGB.__getitem__, file="label_colors.txt", classes="\n".join(
        f"{r} {g} {b}\t{name}" for name, (r, g, b) in zip(NAMES, RGB.tolist()))),
    "GIF": dict(label="masks/a{n}.gif"),
    "GIF in colours": dict(encode=RGB.__getitem__, classes=TABLE, label="masks/a{n}.gif"),
    "RGBA": dict(encode=lambda ids: np.dstack([RGB[ids], np.full_like(ids, 255)]), classes=TABLE),
    "suffixes": dict(name="images/a{n}_image.png", label="annotations/a{n}_annotation.png"),
    "prefixes": dict(name="imgs/image_{n}.png", label="gt/mask_{n}.png"),
    "unknown suffixes": dict(name="images/a{n}_training.png", label="manual/a{n}_manual1.png"),
    "one folder": dict(name="a{n}.png", label="a{n}_segmentation.png"),
    "camvid": dict(name="images/a{n}.png", label="LabeledApproved_full/a{n}_L.png"),
    "two suffixes": dict(name="images/a{n}.jpg", label="masks/a{n}.jpg.png"),
    "upper case": dict(name="Images/A{n}.PNG", label="Masks/a{n}.png"),
    "parts below": dict(name="images/{part}/a{n}.png", label="masks/{part}/a{n}.png"),
    "parts above": dict(name="{part}/input/a{n}.png", label="{part}/labels/a{n}.png"),
    "parts in names": dict(name="{part}/a{n}.png", label="{part}_labels/a{n}.png"),
    "wrapped": dict(name="My Labels/images/a{n}.png", label="My Labels/masks/a{n}.png"),
    "a name composed in two ways": dict(name=unicodedata.normalize("NFD", "images/fräse{n}.png"),
                                        label=unicodedata.normalize("NFC", "masks/fräse{n}.png")),
    "images at the top": dict(name="a{n}.png", label="masks/a{n}.png"),
    "satellite": dict(name="{part}/{n}_sat.jpg", label="{part}/{n}_mask.png"),
    "roboflow": dict(name="{part}/a{n}_jpg.rf.00{n}.png", label="{part}/a{n}_jpg.rf.00{n}_mask.png",
                     file="train/_classes.csv", classes="Pixel Value, Class\n0, background\n1, weed\n2, crop"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(tmp_path, kind):
    """As the label maps are, so is what training reads; the parts of the source are the lists."""
    options = MASKS[kind]
    masks(tmp_path / "source", **options)
    dataset = run(tmp_path / "source", tmp_path)
    stem = unicodedata.normalize("NFC", Path(options.get("name", "images/a{n}.png")).stem)
    check(dataset, ids=stem)
    if "{part}" in options.get("name", ""):
        assert dataset.ids("val") == [stem.format(n=4)]


@pytest.mark.quick
def test_binary(tmp_path):
    """0 and 255 are two classes, in any mode and with JPEG noise; 255 beside 0 and 1 is ignored."""
    names, white = ["background", "polyp"], np.array([0, 255, 255], np.uint8)
    for n, options in enumerate([
            dict(encode=white.__getitem__), dict(encode=lambda ids: ids > 0),
            dict(encode=lambda ids: np.dstack([white[ids]] * 3), label="masks/a{n}.jpg"),
            dict(encode=white.__getitem__, classes="background 0 0 0\npolyp 255 255 255"),
            dict(encode=lambda ids: 255 - white[ids], classes="background 255 255 255\npolyp 0 0 0")]):
        masks(tmp_path / f"source{n}", **dict(classes="\n".join(names)) | options)
        check(run(tmp_path / f"source{n}", tmp_path, out=f"mine{n}"), names, expected=lambda n: ids_of(n) > 0)
    for name, pixels in ("void", np.array), ("palette", lambda ids: paletted(ids, [0, 0, 0, 9, 8, 7, *VOC[6:]])):
        masks(tmp_path / name, encode=lambda ids: pixels(np.array([0, 1, 255], np.uint8)[ids]),
              classes="background 0 0 0\npolyp 9 8 7")
        dataset = run(tmp_path / name, tmp_path, out=f"{name}s")
        check(dataset, names, expected=lambda n: np.array([0, 1, 255])[ids_of(n)])


def cvat(root):
    lines = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(NAMES, RGB.tolist())]
    masks(root, "JPEGImages/a{n}.png", "SegmentationClass/a{n}.png", RGB.__getitem__,
          "\n".join(["# label:color_rgb:parts:actions", *lines]), "labelmap.txt")
    masks(root, "JPEGImages/a{n}.png", "SegmentationObject/a{n}.png", lambda ids: RGB[ids][..., ::-1], "")
    write(root / "ImageSets/Segmentation/train.txt", "a0\na1\na2\n")
    write(root / "ImageSets/Segmentation/val.txt", "a3\na4\n")


def labelme2voc(root):
    masks(root, "JPEGImages/a{n}.png", "SegmentationClass/a{n}.png", lambda ids: paletted(ids, VOC),
          "_background_\nweed\ncrop", "class_names.txt")
    masks(root, "JPEGImages/a{n}.png", "SegmentationClassVisualization/a{n}.png", RGB.__getitem__,
          "__ignore__\n_background_\nweed\ncrop", "labels.txt")
    write(root / "SegmentationClassNpy/a0.npy", b"\x93NUMPY")


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("export", [cvat, labelme2voc])
def test_exports_of_masks(tmp_path, export, is_zip):
    source = tmp_path / "job 1"
    export(source)
    if is_zip:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for file in source.rglob("*"):
                archive.write(file, Path("top") / file.relative_to(source))
        source = tmp_path / "a.zip"
    dataset = run(source, tmp_path)
    check(dataset)
    assert export is labelme2voc or dataset.ids("val") == ["a3", "a4"] and dataset.palette[3:6] == [250, 50, 83]


def polygons(image, label="", content=None, **files):
    """Return a function that writes images, a label file for each, and other files, to a folder."""
    def make(root):
        photos(root, image)
        for n in range(5 if label else 0):
            write(root / label.format(n=n, part="val" if n == 4 else "train"), content(n))
        for file, text in files.items():
            write(root / file, text)
    return make


# as Roboflow writes it: a category that groups the others
GROUPS = [{"id": 0, "name": "plants", "supercategory": "none"}, {"id": 8, "name": "weed", "supercategory": "plants"},
          {"id": 9, "name": "crop", "supercategory": "plants"}]
coco_one = polygons("images/a{n}.png", **{"annotations/a.json": coco()})
coco_parts = polygons("{part}/a{n}.png", **{"train/_annotations.coco.json": coco(4, categories=GROUPS),
                                            "val/_annotations.coco.json": coco(1, 4, categories=GROUPS[::-1])})
labelme_folder = polygons("a{n}.png", "a{n}.json", labelme, **{"labels.txt": "__ignore__\n_background_\nweed\ncrop"})
labelme_apart = polygons("images/a{n}.png", "json/a{n}.json", lambda n: labelme(n, imagePath=f"..\\images\\a{n}.png"),
                         **{"labels.txt": "weed\ncrop"})
yolo_yaml = polygons("images/{part}/a{n}.png", "labels/{part}/a{n}.txt", yolo,
                     **{"seg.yaml": "path: .\ntrain: images/train\nnames:\n  0: weed\n  1: crop\n"})
yolo_flat = polygons("a{n}.png", "a{n}.txt", yolo, **{"classes.txt": "weed\ncrop\n"})


def test_grey_palettes_of_their_own(tmp_path):
    """GIF numbers the greys of each file anew: a file without class 1 has index 1 for class 2."""
    masks(tmp_path / "source", label="masks/a{n}.gif", encode=LEVELS.__getitem__)
    write(tmp_path / "source/masks/a1.gif", LEVELS[np.where(ids_of(1) == 1, 0, ids_of(1))])
    assert set(np.unique(label_maps(run(tmp_path / "source", tmp_path))["a1"])) == {0, 2}


@pytest.mark.quick
@pytest.mark.parametrize("export", [coco_one, coco_parts, labelme_folder, labelme_apart, yolo_yaml, yolo_flat],
                         ids="coco_one coco_parts labelme_folder labelme_apart yolo_yaml yolo_flat".split())
def test_polygons(tmp_path, export):
    export(tmp_path / "source")
    dataset = run(tmp_path / "source", tmp_path)
    check(dataset)
    assert export not in (coco_parts, yolo_yaml) or dataset.ids("val") == ["a4"]


def test_a_polygon_covers_the_pixels_whose_centres_are_in_it():
    """Also if it is drawn in strips, and if it lies partly outside."""
    rows, columns = np.mgrid[:60, :80] + 0.5
    for x, y, radius in ((40.3, 31.2, 9.0), (76, 3, 12), (30.2, 30, 2.5)):
        angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        inside = (columns - x) ** 2 + (rows - y) ** 2 < radius ** 2
        label = np.zeros((60, 80), np.uint8)
        label_formats.draw_polygon(label, points, 3)
        assert ((label == 3) != inside).sum() < 0.04 * inside.sum() + 2 and set(np.unique(label)) == {0, 3}
    label_formats.draw_polygon(label, [(1, 1), (5, 5)], 7)
    label_formats.draw_polygon(label, [(-9, -9), (-5, -5), (-9, -5)], 7)
    assert 7 not in label


def test_shapes_of_labelme(tmp_path):
    """A circle, a later shape on an earlier one, and what is ignored."""
    shapes = [{"label": "weed", "shape_type": "circle", "points": [[20, 15], [30, 15]]},
              {"label": "crop", "points": [[10, 5], [20, 5], [20, 25], [10, 25]]},
              {"label": "__ignore__", "shape_type": "rectangle", "points": [[0, 0], [40, 2]]},
              {"label": "_background_", "shape_type": "rectangle", "points": [[12, 10], [14, 12]]}]
    photos(tmp_path / "source", "a{n}.png")
    for n in range(2):
        write(tmp_path / f"source/a{n}.json", labelme(n, shapes=shapes))
    ids = label_maps(dataset := run(tmp_path / "source", tmp_path))["a0"]
    assert dataset.classes == ["background", "crop", "weed"]
    assert (ids[:2] == 255).all() and (ids[5:10, 10:20] == 1).all() and not ids[10:12, 12:14].any()
    assert abs((ids == 2).sum() - np.pi * 100 / 2) < 12
    assert len(list((tmp_path / "mine/unlabelled").iterdir())) == 3


def test_images_without_labels(tmp_path):
    """They go to unlabelled/; with an explicit --background, those that a COCO file lists are that class."""
    photos(tmp_path / "source")
    write(tmp_path / "source/a.json", coco() | {"annotations": [a for a in coco()["annotations"] if a["image_id"] > 1]})
    dataset = run(tmp_path / "source", tmp_path)
    assert sorted(dataset.labels) == ["a2", "a3", "a4"] == sorted(dataset.images)
    assert sorted(f.name for f in (tmp_path / "mine/unlabelled").iterdir()) == ["a0.png", "a1.png"]
    dataset = run(tmp_path / "source", tmp_path, "--background", "soil", out="other")
    assert dataset.classes[0] == "soil" and not label_maps(dataset)["a0"].any() and len(dataset.labels) == 5
    masks(tmp_path / "satellite", "train/{n}_sat.jpg", "train/{n}_mask.png")
    write(tmp_path / "satellite/valid/9_sat.jpg", picture(0))
    run(tmp_path / "satellite", tmp_path, out="third")
    assert [f.name for f in (tmp_path / "third/unlabelled").iterdir()] == ["9_sat.jpg"]


@pytest.mark.parametrize("turned", [False, True])
def test_orientation(tmp_path, turned, fails):
    """Labels lie on the upright image; a label of the stored size is refused."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    for n in range(2):
        upright = Image.fromarray(picture(n))
        write(tmp_path / f"source/masks/a{n}.png", np.rot90(ids_of(n)).copy() if turned else ids_of(n))
        (tmp_path / "source/images").mkdir(exist_ok=True)
        for suffix in ("jpg",) if n else ("tif",):
            upright.rotate(90, expand=True).save(tmp_path / f"source/images/a{n}.{suffix}", exif=exif, quality=99)
    write(tmp_path / "source/classes.txt", "\n".join(NAMES))
    if turned:
        assert "EXIF" in fails("prepare", "import", tmp_path / "source", "--out", tmp_path / "mine")
    else:
        check(run(tmp_path / "source", tmp_path), count=2)


def test_lists(tmp_path):
    """With suffixes, as pairs of image and label, with folders; val and test stay what they are."""
    masks(tmp_path / "source")
    write(tmp_path / "source/train.txt", "images/a0.png masks/a0.png\n/set/images/a3.png /set/masks/a3.png\n")
    write(tmp_path / "source/lists/val.txt", "a1.png\n")
    write(tmp_path / "source/Test.txt", "a2\na4\n")
    dataset = run(tmp_path / "source", tmp_path)
    assert [dataset.ids(name) for name in ("train", "val", "test")] == [["a0", "a3"], ["a1"], ["a2", "a4"]]
    (tmp_path / "source/train.txt").unlink()  # the rest is for training
    write(tmp_path / "source/Test.txt", "a2 1 1\n")
    dataset = run(tmp_path / "source", tmp_path, out="other")
    assert [dataset.ids(name) for name in ("train", "val", "test")] == [["a0", "a3", "a4"], ["a1"], ["a2"]]


def test_lists_of_equal_names_in_folders(tmp_path):
    """As CVAT writes them for several videos."""
    for folder in ("cam0", "cam1"):
        masks(tmp_path / "source", f"JPEGImages/{folder}/a{{n}}.png", f"SegmentationClass/{folder}/a{{n}}.png")
    for name, ids in (("train", "cam0/a0\ncam1/a1\n"), ("val", "cam0/a1\ncam1/a0\n")):
        write(tmp_path / f"source/ImageSets/Segmentation/{name}.txt", ids)
        write(tmp_path / f"source/ImageSets/Main/{name}.txt", "cam0/a1\n")
    assert run(tmp_path / "source", tmp_path).ids("val") == ["cam0_a1", "cam1_a0"]


def test_names_that_end_in_the_part(tmp_path, fails):
    """As in DRIVE, whose masks are the field of view: the user has to choose."""
    for n in range(4):
        part = "training" if n < 3 else "test"
        write(tmp_path / f"source/{part}/images/{n}_{part}.tif", picture(n))
        write(tmp_path / f"source/{part}/1st_manual/{n}_manual1.gif", ids_of(n))
        write(tmp_path / f"source/{part}/mask/{n}_{part}_mask.gif", np.ones((30, 40), np.uint8))
    write(tmp_path / "source/classes.txt", "\n".join(NAMES))
    error = fails("prepare", "import", tmp_path / "source", "--out", tmp_path / "x")
    assert "--labels 1st_manual or --labels mask" in error
    dataset = run(tmp_path / "source", tmp_path, "--labels", "1st_manual")
    assert all(np.array_equal(ids, ids_of(int(name[0]))) for name, ids in label_maps(dataset).items())
    assert dataset.ids("test") == ["3_test"]


def test_the_drawn_val_is_a_fifth_and_leaves_each_class_in_train(tmp_path):
    rare = layouts.rank_for_val([f"b{n}" for n in range(30)])[0]  # the first that would be taken
    for n in range(30):
        write(tmp_path / f"source/images/b{n}.png", picture(0))
        ids = ids_of(0)
        ids[ids == 2] = 2 if f"b{n}" == rare else 0
        write(tmp_path / f"source/masks/b{n}.png", ids)
    write(tmp_path / "source/classes.txt", "\n".join(NAMES))
    dataset = run(tmp_path / "source", tmp_path)
    assert len(dataset.ids("val")) == 6 and rare in dataset.train_ids()
    assert not set(dataset.ids("val")) & set(dataset.train_ids())


def test_equal_stems_in_parts(tmp_path):
    masks(tmp_path / "source", "{part}/images/a{n}.png", "{part}/masks/a{n}.png", count=4)
    write(tmp_path / "source/val/images/a0.png", picture(1))
    write(tmp_path / "source/val/masks/a0.png", ids_of(1))
    dataset = run(tmp_path / "source", tmp_path)
    assert dataset.ids("val") == ["val_a0"] and dataset.train_ids() == ["a1", "a2", "a3", "train_a0"]
    assert np.array_equal(label_maps(dataset)["val_a0"], ids_of(1))


def test_the_rule_that_pairs_most_images_wins(tmp_path):
    masks(tmp_path / "source", "images/a{n}_image.png", "masks/a{n}_mask.png")
    write(tmp_path / "source/images/b.png", picture(0))
    write(tmp_path / "source/masks/b.png", ids_of(0))
    assert len(run(tmp_path / "source", tmp_path).labels) == 6


@pytest.mark.parametrize("flags,names,values", [
    (["--only", "crop"], ["background", "crop"], [0, 0, 1]),
    (["--only", "crop,weed"], NAMES, [0, 1, 2]),
    (["--only", "crop", "--others", "void"], ["background", "crop"], [0, 255, 1]),
    (["--merge", "plant=weed+crop"], ["background", "plant"], [0, 1, 1]),
    (["--merge", "crop=weed"], ["background", "crop"], [0, 1, 1]),
    (["--merge", "soil=background"], ["soil", "weed", "crop"], [0, 1, 2]),
    (["--merge", "plant=weed", "--only", "plant"], ["background", "plant"], [0, 1, 0])])
def test_only_and_merge(tmp_path, flags, names, values):
    masks(tmp_path / "source", classes=TABLE)
    dataset = run(tmp_path / "source", tmp_path, *flags)
    check(dataset, names, expected=lambda n: np.array(values)[ids_of(n)])
    if names[-1] == "crop":
        assert dataset.palette[3 * len(names) - 3:3 * len(names)] == RGB[2].tolist()


def test_background_is_class_0(tmp_path):
    """A category of that name is class 0, wherever it stands."""
    photos(tmp_path / "source")
    content = coco()
    content["categories"].append({"id": 11, "name": "soil"})
    content["annotations"].append(dict(content["annotations"][0], category_id=11))
    write(tmp_path / "source/a.json", content)
    dataset = run(tmp_path / "source", tmp_path, "--background", "soil")
    ids = label_maps(dataset)["a0"]
    assert dataset.classes == ["soil", "weed", "crop"] and np.array_equal(ids, np.where(ids_of(0) == 1, 0, ids_of(0)))


def test_link(tmp_path):
    masks(tmp_path / "source")
    dataset = run(tmp_path / "source", tmp_path, "--link")
    check(dataset)
    assert all(os.path.realpath(f) == str(tmp_path / f"source/images/{i}.png") for i, f in dataset.images.items())


@pytest.mark.quick
def test_add(tmp_path, fails):
    """Classes are matched by name, val stays as it is; a new class or an id that is there changes nothing."""
    masks(tmp_path / "source", count=3)
    dataset = run(tmp_path / "source", tmp_path)
    val, before = dataset.ids("val"), {f: f.read_bytes() for f in (tmp_path / "mine").rglob("*") if f.is_file()}
    masks(tmp_path / "more", name="images/b{n}.png", label="masks/b{n}.png", classes="crop\nbackground\nweed",
          encode=np.array([1, 2, 0], np.uint8).__getitem__)
    masks(tmp_path / "new class", name="images/c{n}.png", label="masks/c{n}.png", classes="background\nweed\ntree")
    masks(tmp_path / "known", name="images/{n}.png", label="masks/{n}.png")
    for f in ("images", "masks"):
        (tmp_path / f"known/{f}/4.png").rename(tmp_path / f"known/{f}/a1.png")
    assert "tree" in fails("prepare", "import", tmp_path / "new class", "--add", tmp_path / "mine")
    assert "a1" in fails("prepare", "import", tmp_path / "known", "--add", tmp_path / "mine")
    assert before == {f: f.read_bytes() for f in (tmp_path / "mine").rglob("*") if f.is_file()}
    dataset = run(tmp_path / "more", tmp_path, "--add", tmp_path / "mine")
    assert dataset.ids("val") == val and len(dataset.train_ids()) == 7 and dataset.classes == NAMES
    found = label_maps(dataset)
    assert all(np.array_equal(found[f"{x}{n}"], ids_of(n)) for n in range(3) for x in "ab")


def test_add_the_label_of_an_image_that_is_there(tmp_path, fails, monkeypatch):
    """It stays in its list, its file stays; other pixels are refused; after an error nothing has changed."""
    masks(tmp_path / "source", count=3)
    dataset = run(tmp_path / "source", tmp_path)
    mine, (train, val) = tmp_path / "mine", (dataset.train_ids(), dataset.ids("val"))
    for i in (train[0], val[0]):
        name, image = f"{i}.png", picture(int(i[1:]))
        label = mine / "labels" / name
        before = (mine / "images" / name).read_bytes()
        again, other = tmp_path / f"again {i}", tmp_path / f"other {i}"
        for folder, pixels in ((again, image), (other, 255 - image)):
            write(folder / f"images/{i}.bmp", pixels)
            write(folder / "masks" / name, ids_of(3))
            write(folder / "classes.txt", "\n".join(NAMES))
        assert i in fails("prepare", "import", again, "--add", mine)  # it has a label
        assert np.array_equal(label_maps(dataset)[i], ids_of(int(i[1:])))
        label.unlink()
        assert i in fails("prepare", "import", other, "--add", mine) and not label.exists()
        dataset = run(again, tmp_path, "--add", mine)
        assert (dataset.train_ids(), dataset.ids("val")) == (train, val) and len(dataset.images) == 3
        assert not (mine / f"images/{i}.bmp").exists()
        assert (mine / "images" / name).read_bytes() == before and np.array_equal(label_maps(dataset)[i], ids_of(3))
    masks(tmp_path / "more", name="images/b{n}.png", label="masks/b{n}.png")
    before = {f: f.read_bytes() for f in mine.rglob("*") if f.is_file()}
    move, count = os.replace, iter(range(100))

    def full_disk(source, target):
        if str(target).startswith(f"{mine}/lists") and next(count) == 1:
            raise OSError(28, "No space left on device")
        move(source, target)
    monkeypatch.setattr(os, "replace", full_disk)
    assert "No space" in fails("prepare", "import", tmp_path / "more", "--add", mine)
    assert before == {f: f.read_bytes() for f in mine.rglob("*") if f.is_file()}


def test_add_a_part_of_the_images_that_were_chosen(tmp_path, fails):
    """Images that are still without a label are there already, and stay; one with other pixels is refused."""
    masks(tmp_path / "source", count=3)
    for n in (7, 8):
        write(tmp_path / f"source/images/u{n}.png", picture(n))
    run(tmp_path / "source", tmp_path)
    before = {f.name for f in (tmp_path / "mine/unlabelled").iterdir()}
    for n in (7, 8):
        write(tmp_path / f"chosen/images/u{n}.png", picture(n))
    write(tmp_path / "chosen/masks/u7.png", ids_of(1))
    write(tmp_path / "chosen/classes.txt", "\n".join(NAMES))
    shutil.copytree(tmp_path / "chosen", tmp_path / "other")
    write(tmp_path / "other/images/u8.png", 255 - picture(8))
    assert "u8" in fails("prepare", "import", tmp_path / "other", "--add", tmp_path / "mine")
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying, upright the same
    Image.fromarray(picture(8)).rotate(90, expand=True).save(tmp_path / "chosen/images/u8.png", exif=turned)
    dataset = run(tmp_path / "chosen", tmp_path, "--add", tmp_path / "mine")
    assert before == {f.name for f in (tmp_path / "mine/unlabelled").iterdir()} == {"u7.png", "u8.png"}
    assert np.array_equal(label_maps(dataset)["u7"], ids_of(1)) and "u8" not in dataset.labels


def several_labels(root):
    masks(root)
    masks(root, label="annotations/a{n}_annotation.png")


def without(export, name):
    return lambda root: [export(root), (root / name).unlink()]


def change(export, file, edit):
    def make(root):
        export(root)
        content = json.loads((root / file).read_text())
        edit(content)
        write(root / file, content)
    return make


def and_file(export, name, content):
    def make(root):
        export(root)
        write(root / name, content(root) if callable(content) else content)
    return make


def foreign_palette(ids):
    return paletted(ids, [200, 10, 10, 0, 0, 0, 10, 200, 10])


REFUSED = {
    "several folders of labels": (several_labels, "annotations.*masks|masks.*annotations"),
    "no class names": (lambda root: masks(root, classes=""), "0, 1, 2.*--classes"),
    "a value without a class": (lambda root: masks(root, classes="a\nb"), "0, 1, 2.*2 classes"),
    "instances": (lambda root: masks(root, encode=lambda ids: ids.astype(np.uint16) * 150), "instance"),
    "a colour without a class": (lambda root: masks(root, encode=RGB.__getitem__, classes=TABLE.replace("83", "84")),
                                 "250 50 83 .*%.*weed"),
    "colours without a table": (lambda root: masks(root, encode=RGB.__getitem__), "51 221 255"),
    "a palette that is not the table's": (lambda root: masks(root, encode=foreign_palette, classes=TABLE), "200 10 10"),
    "a paint program's palette": (lambda root: masks(root, encode=foreign_palette), "palette.*--kind index"),
    "levels fewer than classes": (lambda root: masks(root, encode=np.array([0, 255, 255], np.uint8).__getitem__),
                                  "0, 255.*3 classes"),
    "float": (lambda root: masks(root, label="masks/a{n}.tif", encode=lambda ids: ids.astype(np.float32)), "mode F"),
    "an alpha channel only": (lambda root: masks(root, encode=lambda ids: np.dstack([ids * 0] * 3 + [255 - ids])),
                              "transparency"),
    "grey of VOC's colours": (lambda root: masks(root, classes="b\nc\na\nd\ne", encode=lambda ids: np.array(
        [[0, 14, 38], [75, 113, 0]], np.uint8)[(np.arange(40) % 2)[None], ids]), "grey"),
    "class ids in JPEG": (lambda root: masks(root, label="masks/a{n}.jpg", encode=np.zeros_like), "JPEG"),
    "a 16-bit image": (and_file(masks, "images/a0.png", np.full((30, 40), 900, np.uint16)), "a0.png.*8 bits"),
    "one per object": (lambda root: [masks(root, label=f"masks/a{{n}}_{x}_1.png") for x in ("red", "blue")], "several"),
    "a second mask": (and_file(lambda root: masks(root, label="images/a{n}_mask.png"), "images/a1_mask_1.png",
                               ids_of(0)), "several"),
    "a folder that may be labels": (lambda root: [masks(root), masks(root, label="manual/a{n}_manual.png")], "manual"),
    "three levels of two classes": (lambda root: masks(root, classes="a\nb", encode=LEVELS.__getitem__), "0, 127, 254"),
    "noise beside three levels": (lambda root: masks(root, encode=lambda ids: np.where(
        PIXELS % 100, LEVELS[ids], 30 + PIXELS // 20).astype(np.uint8)), "3 classes"),
    "255 may be class 1 in some": (and_file(lambda root: masks(root, encode=lambda ids: ids > 0, classes="a\nb"),
                                            "masks/a1.png", 255 * (ids_of(1) > 0).astype(np.uint8)), "--kind index"),
    "a line of a list that begins with a name": (and_file(masks, "train.txt", "a1 left.png\n"), "a1 left"),
    "one image for training": (and_file(masks, "train.txt", "images/a0.png masks/a0.png\n"), "lists name 1"),
    "a folder per image": (lambda root: [masks(root, "s/{n}/images/{n}.png", f"s/{{n}}/masks/{x}.png") for x in "ab"],
                           "folder per image"),
    "one labelled image": (lambda root: masks(root, count=1), "at least"),
    "no labels": (photos, "5 like images/a0.png"),
    "an empty folder": (lambda root: root.mkdir(), "no files"),
    "two images of one name": (and_file(masks, "images/a1.jpg", picture(1)), "a1.png.*a1.jpg"),
    "another size": (and_file(masks, "masks/a1.png", ids_of(1)[:20]), "a1.png.*40x20"),
    "a broken label": (and_file(masks, "masks/a1.png", b"\x89PNG"), "a1.png: cannot be read"),
    "a broken image": (and_file(masks, "images/a1.png", b"\x89PNG"), "a1.png: cannot be read"),
    "two tables": (and_file(masks, "class_names.txt", "soil\nweed\ncrop"), "class_names.txt.*--classes"),
    "a class twice": (lambda root: masks(root, classes="a\nb\na"), "twice"),
    "an id that is not there": (and_file(masks, "train.txt", "a0\nb7\n"), "b7"),
    "an id in two lists": (and_file(and_file(masks, "train.txt", "a0\na1\n"), "val.txt", "a1\n"), "a1"),
    "a broken JSON": (and_file(coco_one, "annotations/b.json", '{"images": ['), "b.json: cannot be read"),
    "an image that is not there": (without(coco_one, "images/a3.png"), "a3.png.*not there"),
    "LabelMe without its image": (without(labelme_folder, "a3.png"), "a3.json.*a3.png.*not there"),
    "boxes in COCO": (change(coco_one, "annotations/a.json",
                             lambda c: c["annotations"][3].update(segmentation=[])), "annotation 3.*box"),
    "a category that is not there": (change(coco_one, "annotations/a.json",
                                            lambda c: c["categories"].pop()), "a.json: annotation 0"),
    "RLE of another size": (change(coco_one, "annotations/a.json", lambda c: c["annotations"][1][
        "segmentation"].update(size=[40, 30])), "30x40.*40x30"),
    "an image in two files": (and_file(coco_one, "annotations/b.json", coco()), "a0.png.*b.json|b.json.*a0.png"),
    "a line in LabelMe": (change(labelme_folder, "a2.json", lambda c: c["shapes"][0].update(shape_type="line")),
                          "a2.json.*line"),
    "compressed run lengths": (change(coco_one, "annotations/a.json", lambda c: c["annotations"][1][
        "segmentation"].update(counts="0")), "run lengths of 0 pixels"),
    "LabelMe of another size": (change(labelme_folder, "a2.json", lambda c: c.update(imageWidth=41)), "a2.json.*41x30"),
    "a label without a class": (change(labelme_folder, "a2.json", lambda c: c["shapes"][0].update(label="tree")),
                                "labels.txt.*tree"),
    "boxes in YOLO": (and_file(yolo_flat, "a1.txt", "0 0.5 0.5 0.1 0.1\n"), "a1.txt.*boxes"),
    "two YOLO files of an image": (and_file(yolo_yaml, "masks/train/a1.txt", yolo(0)), "a1.txt.*a1.txt"),
    "a YOLO class": (and_file(yolo_flat, "a1.txt", "5 0.5 0.5 0.1 0.1 0.2 0.2\n"), "a1.txt.*5 0.5"),
    "YOLO in pixels": (and_file(yolo_flat, "a1.txt", "0 5 5 20 5 20 15\n"), "a1.txt.*fractions"),
    "LabelMe that names another's image": (change(labelme_folder, "a2.json", lambda c: c.update(imagePath="a1.png")),
                                           "a2.json.*imagePath"),
    "a COCO size out of all reason": (change(coco_one, "annotations/a.json", lambda c: [
        image.update(width=10**6, height=10**6) for image in c["images"]]), "1000000x1000000.*40x30"),
    "YOLO without names": (and_file(yolo_flat, "classes.txt", ""), "data.yaml"),
    "two kinds": (and_file(coco_one, "a0.json", labelme(0)), "coco.*labelme.*--kind"),
    "masks and polygons": (lambda root: [coco_one(root), masks(root)], "coco.*masks.*--kind"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, fails, kind):
    """In one line that says what and where; nothing is written."""
    make, says = REFUSED[kind]
    make(tmp_path / "source")
    error = fails("prepare", "import", tmp_path / "source", "--out", tmp_path / "mine")
    assert re.search(says, error), error
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name,mode", [("../evil.png", 0), ("/evil.png", 0), ("a/../../evil.png", 0),
                                       ("..\\evil.png", 0), ("C:/evil.png", 0), ("link", 0o120777)])
def test_a_zip_that_leads_outside(tmp_path, fails, name, mode):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        archive.writestr(entry, "x")
    error = fails("prepare", "import", tmp_path / "a.zip", "--out", tmp_path / "in/mine")
    assert "a.zip: " in error and "leads outside" in error
    assert [f.name for f in tmp_path.iterdir()] == ["a.zip"]


def test_wrong_flags(tmp_path, fails):
    masks(tmp_path / "source")
    (tmp_path / "there").mkdir()
    (tmp_path / "a.txt").write_text("a")
    for flags, says in ((["--out", tmp_path / "there"], "there: exists"), ([], "--out, --add"),
                        (["--out", "x", "--only", "tree"], "tree.*weed"),
                        (["--out", "x", "--others", "void"], "--only"),
                        (["--out", "x", "--merge", "a=tree"], "tree.*weed"),
                        (["--out", "x", "--labels", "nowhere"], "--labels nowhere"),
                        (["--out", "x", "--classes", "nowhere"], "--classes nowhere"),
                        (["--out", "x", "--kind", "coco"], "no labels"),
                        (["--out", "x", "--merge", "a=background+weed+crop"], "1 class")):
        assert re.search(says, fails("prepare", "import", tmp_path / "source", *flags)), flags
    assert "a.txt" in fails("prepare", "import", tmp_path / "a.txt", "--out", tmp_path / "mine")
    assert "nowhere" in fails("prepare", "import", tmp_path / "nowhere", "--out", tmp_path / "mine")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "source", "there"]


def test_chosen_labels(tmp_path):
    """--labels by name or by path, also outside the source; --kind if it is not clear."""
    several_labels(tmp_path / "source")
    check(run(tmp_path / "source", tmp_path, "--labels", "annotations"))
    check(run(tmp_path / "source", tmp_path, "--labels", tmp_path / "source/masks", out="second"))
    photos(tmp_path / "photographs", "a{n}.png")
    write(tmp_path / "names.csv", "0, background\n1, weed\n2, crop")
    flags = "--labels", tmp_path / "source/masks", "--classes", tmp_path / "names.csv"
    check(run(tmp_path / "photographs", tmp_path, *flags, out="third"))
    masks(tmp_path / "foreign", encode=foreign_palette)
    check(run(tmp_path / "foreign", tmp_path, "--kind", "index", out="fourth"))


def test_several_sources(tmp_path):
    """Images and COCO file apart; and two folders of one structure."""
    photos(tmp_path, "pictures/a{n}.png")
    write(tmp_path / "a.json", coco())
    call("prepare", "import", tmp_path / "pictures", tmp_path / "a.json", "--out", tmp_path / "mine")
    check(layouts.open_dataset(str(tmp_path / "mine")))
    masks(tmp_path / "first")
    masks(tmp_path / "second")
    call("prepare", "import", tmp_path / "first", tmp_path / "second", "--out", tmp_path / "both")
    found = label_maps(layouts.open_dataset(str(tmp_path / "both")))
    assert len(found) == 10 and all(np.array_equal(found[f"second_a{n}"], ids_of(n)) for n in range(5))


@pytest.mark.parametrize("case", sorted(CASES.iterdir()) if CASES.is_dir() else [], ids=lambda case: case.name)
def test_cases(tmp_path, case, fails):
    """Small copies of real exports, where they are at hand."""
    if not (case / "expected.json").is_file():
        return
    expected = json.loads((case / "expected.json").read_text())
    if "refuse" in expected:
        error = fails("prepare", "import", case, "--out", tmp_path / "mine")
        assert re.search(expected["refuse"], error.replace(str(case), "")), error
        return
    dataset = run(case, tmp_path)
    counts = np.bincount(np.concatenate([ids.ravel() for ids in label_maps(dataset).values()]), minlength=256)[:255]
    assert dataset.classes == expected["classes"] and len(dataset.images) == expected["images"]
    if "share" in expected:
        assert counts[:len(dataset.classes)] / counts.sum() == pytest.approx(expected["share"], rel=0.1)
