"""Folder layouts, lists, classes, the split, and the generated data set."""
import shutil

from common import console, layouts
from common.shapes import draw

import numpy as np
import pytest
from PIL import Image

import data


@pytest.mark.quick
def test_open(voc):
    dataset = layouts.open_dataset(str(voc))
    assert dataset.classes == ["grey", "red", "green", "blue"] and not dataset.note
    assert len(dataset.train_ids()) == 8 and len(dataset.ids("val")) == 2  # the last id has no newline behind it
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("train3\n\n train1 \r\n")
    assert dataset.train_ids() == ["train3", "train1"]
    (voc / "classes.txt").write_text("sky 1 2 3\nfire hydrant\nroad 4 5 6\ncar\n")
    dataset = layouts.open_dataset(str(voc))
    assert dataset.classes + dataset.palette[:9] == ["sky", "fire hydrant", "road", "car", 1, 2, 3, 128, 0, 0, 4, 5, 6]
    (voc / "classes.txt").unlink()
    dataset = layouts.open_dataset(str(voc))
    assert len(dataset.classes) == 21 and dataset.palette[3:12] == [128, 0, 0, 0, 128, 0, 128, 128, 0]


@pytest.mark.quick
def test_split_is_nested_and_seeded():
    ids = [f"p{n}" for n in range(10582)]
    parts = [layouts.split_ids(ids, f, 0)[0] for f in (1 / 8, 1 / 4, 1 / 2, 1)]
    assert [len(p) for p in parts] == [1323, 2646, 5291, 10582]  # round(), so 1322.75 is 1323 and 2645.5 is 2646
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    labelled, unlabelled = layouts.split_ids(ids, 1 / 8, 0)
    assert sorted(labelled + unlabelled) == sorted(ids) and not set(labelled) & set(unlabelled)
    assert set(layouts.split_ids(ids[::-1], 1 / 8, 0)[0]) == set(labelled)
    assert len(set(layouts.split_ids(ids, 1 / 8, 1)[0]) & set(labelled)) < 300


def test_labelled_ids(voc, tmp_path):
    (tmp_path / "mine.txt").write_text("train2\ntrain0")
    labelled, unlabelled, _ = layouts.open_dataset(str(voc)).split(0.9, 0, tmp_path / "mine.txt")
    assert [sample.id for sample in labelled] == ["train0", "train2"] and len(unlabelled) == 6
    with pytest.raises(console.InputError, match="--labelled-ids .*mine.txt: train2"):
        layouts.split_ids(["train0", "train1"], 0.9, 0, tmp_path / "mine.txt")


def test_layout_of_the_first_implementation(voc):
    for old, new in (("JPEGImages", "img"), ("SegmentationClassAug", "cls"), ("ImageSets/Segmentation", "lists")):
        (voc / old).rename(voc / new)
    dataset = layouts.open_dataset(str(voc))
    assert len(dataset.samples(dataset.train_ids())) == 8 and len(dataset.ids("val")) == 2 and not dataset.note
    with pytest.raises(console.InputError, match=f"{voc}/img/train9.jpg"):
        dataset.samples(["train9"])


def test_without_lists_a_fifth_is_val(voc):
    shutil.rmtree(voc / "ImageSets")
    dataset = layouts.open_dataset(str(voc))
    train, val = dataset.train_ids(), dataset.ids("val")
    assert len(train) == 8 and len(val) == 2 and not set(train) & set(val)
    assert "8 of its labelled images" in dataset.note and "2 for validation" in dataset.note
    (voc / "SegmentationClassAug" / f"{train[0]}.png").unlink()
    dataset = layouts.open_dataset(str(voc))
    assert len(now := dataset.train_ids()) == 7 and train[0] not in now and "1 have no label" in dataset.note
    (voc / "classes.txt").unlink()  # VOC's classes, but no lists: more likely a set that is not whole
    with pytest.raises(console.InputError, match="train.txt.*classes.txt"):
        layouts.open_dataset(str(voc)).train_ids()
    (voc / "classes.txt").write_text("a\nb\n")
    for file in (voc / "SegmentationClassAug").iterdir():
        file.rename(file.with_name(f"{file.stem}_mask.png"))
    with pytest.raises(console.InputError, match="SegmentationClassAug: 0 of 10"):
        layouts.open_dataset(str(voc))


def test_an_unknown_layout_is_described(voc):
    (voc / "JPEGImages").rename(voc / "Pictures")
    with pytest.raises(console.InputError, match="holds 10 .*/[*].png, 10 .*/[*].png, .*classes.txt.* import"):
        layouts.open_dataset(str(voc))


def test_odd_files_in_a_folder(voc):
    (voc / "JPEGImages/._train0.png").write_bytes(b"what a Mac leaves")
    assert len(layouts.open_dataset(str(voc)).images) == 10
    shutil.copy(voc / "JPEGImages/train0.png", voc / "JPEGImages/train0.jpg")
    with pytest.raises(console.InputError, match="same id train0"):
        layouts.open_dataset(str(voc))


def test_an_image_is_unlabelled_once(voc, tmp_path):
    """--unlabelled may hold, or link to, images of the data set: none comes twice, and none of train or val."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/link").symlink_to(voc / "JPEGImages")
    for file in (tmp_path / "more/new.png", voc / "JPEGImages/extra.png"):
        Image.new("RGB", (9, 9)).save(file)
    dataset = layouts.open_dataset(str(voc))
    labelled, unlabelled, _ = dataset.split(0.5, 0, None, tmp_path / "more")
    assert [sample.image for sample in unlabelled[4:]] == [
        str(tmp_path / "more/link/extra.png"), str(tmp_path / "more/new.png")]
    assert len(labelled) == 4 and not {sample.id for sample in labelled} & {sample.id for sample in unlabelled}
    with pytest.raises(console.InputError, match="--unlabelled .*ImageSets"):
        dataset.split(1, 0, None, voc / "ImageSets")


def test_names_of_classes(tmp_path):
    for text, named in (("a\na\n", "'a'"), ("a\nb\nvoid\n", "'void'"), ("a\n", "1 classes")):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(console.InputError, match=f"classes.txt: .*{named}"):
            layouts.read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes("\ufeffVoid 0 0 0\r\ncar 1 2 3\r\nsky 4 5 ²\r\n".encode())
    assert layouts.read_classes(tmp_path / "classes.txt")[0] == ["car", "sky 4 5 ²"]


@pytest.mark.parametrize("content", [
    "soil\nweed\nthe crop", "0 soil\n1 weed\n2 the crop", "name,r,g,b\nsoil,0,0,0\nweed,255,0,0\nthe crop,0,255,0\n",
    "# label:color_rgb:parts:actions\nsoil:0,0,0::\nweed:255,0,0::\nthe crop:0,255,0::\n",
    "0 0 0\tsoil\n255 0 0\tweed\n0 255 0\tthe crop", "soil #000000\nweed #ff0000\nthe crop #00FF00",
    "Pixel Value, Class\n2, the crop\n0, soil\n1, weed", '"soil",0,0,0\n"weed",255,0,0\n"the crop",0,255,0',
    "0;soil;0;0;0\r\n1;weed;255;0;0\r\n2;the crop;0;255;0\r\n", "__ignore__\nsoil\nweed\nthe crop",
    "class\nsoil\nweed\nthe crop"])
def test_forms_of_class_names(tmp_path, content):
    """Names, their order and their colours are the same in every form and encoding."""
    file = tmp_path / "classes.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        file.write_bytes(content.replace("soil", "sühl").encode(encoding))
        names, palette, colours = layouts.read_classes(file)
        assert names == ["sühl", "weed", "the crop"]
        if colours:
            assert palette[:9] == [0, 0, 0, 255, 0, 0, 0, 255, 0] and len(colours) == 3
        assert bool(colours) == ("255" in content or "#00" in content)


def test_a_table_is_no_list_of_names(tmp_path):
    """Such as ADE20K's objectInfo150.txt."""
    (tmp_path / "classes.txt").write_text("Idx\tRatio\tName\n1\t0.16\twall\n2\t0.11\tbuilding\n")
    with pytest.raises(console.InputError, match="Ratio"):
        layouts.read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("content", [
    "names: ['a b', \"c\"]\nnc: 2", "nc: 2\nnames:\n  0: a b  # first\n  1: c\ntrain: x", "names: {0: a b, 1: c}\n",
    "names:\n- a b\n- c\nval: y\n", "names: [\n'a b',\n'c'\n]"])
def test_class_names_in_yaml(tmp_path, content):
    (tmp_path / "data.yaml").write_text(content)
    assert [line.name for line in layouts.read_class_lines(tmp_path / "data.yaml")] == ["a b", "c"]


def test_class_names_that_are_refused(tmp_path):
    file = tmp_path / "classes.txt"
    for content, named in ((b"0 a\n2 b", "0, 2"), (b"0 __ignore__\n1 a\n2 b", "1, 2"),
                           (b"a 1 2 300\nb 1 2 3", "a 1 2 300"), (b"1 2 3\n4 5 6", "1 2 3"),
                           (b"\x89PNG\r\n\x1a\n\x00\x00", "not text")):
        file.write_bytes(content)
        with pytest.raises(console.InputError, match=f"classes.txt: .*{named}"):
            layouts.read_classes(file)


def test_an_own_folder_may_bring_unlabelled_images(voc):
    """ROOT/unlabelled is used without a flag, and named; only in a folder with classes.txt."""
    labelled, unlabelled, val = layouts.open_dataset(str(voc)).split(0.25, 0)
    assert [len(labelled), len(unlabelled), len(val)] == [2, 6, 2]
    assert all(s.label for s in labelled + val) and not any(s.label for s in unlabelled)
    (voc / "unlabelled/deep").mkdir(parents=True)
    for count in (0, 1):
        dataset = layouts.open_dataset(str(voc))
        unlabelled = dataset.split(0.25, 0, None, dataset.unlabelled_folder)[1]
        assert len(unlabelled) == 6 + count and f"{count} unlabelled images in {voc / 'unlabelled'}" in dataset.note
        Image.new("RGB", (9, 9)).save(voc / "unlabelled/deep/a.jpg")
    (voc / "classes.txt").unlink()
    assert layouts.open_dataset(str(voc)).unlabelled_folder is None


def test_shapes_and_the_bare_command(shapes, monkeypatch):
    monkeypatch.chdir(shapes.parent.parent)
    dataset = layouts.open_dataset(None)
    assert dataset.name == "shapes" and "python prepare.py voc" in dataset.note
    with pytest.raises(console.InputError, match="--data data/VOC2012: no "):
        layouts.open_dataset("data/VOC2012")
    train, val = dataset.train_ids(), dataset.ids("val")
    assert len(train) == 400 and len(val) == 100
    counts = np.zeros(256, int)
    for _, image, label in dataset.samples(train[:40] + val[:20]):
        counts += np.bincount(data.read_label(label, data.read_image(image).size).ravel(), minlength=256)
    assert (counts[:4] > 0.01 * counts.sum()).all() and 0.02 < counts[255] / counts.sum() < 0.3
    again = (draw(np.random.RandomState(5)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(*again))
