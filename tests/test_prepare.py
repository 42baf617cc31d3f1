"""prepare.py: data sets from their archives, and the commands that check and split one."""
import errno
import functools
import gzip
import hashlib
import http.server
import os
import shutil
import tarfile
import threading

from common import console, layouts

import numpy as np
import pytest
from conftest import Killed, call, interrupt
from PIL import Image
from scipy.io import savemat

import data
import prepare

VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
TRAIN, VAL, SBD_TRAIN, SBD_VAL = ["p0", "p1"], ["p2", "p3", "p4"], ["p1", "p5", "p6", "p2"], ["p7", "p8", "p3"]
AUG = ["p0", "p1", "p5", "p6", "p7", "p8"]  # union less val
COUNTS = {"train": 2, "val": 3, "train_aug": 6, "images": 10}


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with both archives as published, but small: 10 images, VOC's labels all 1, SBD's all 2 with a 3."""
    root, rng, palette = tmp_path_factory.mktemp("archives"), np.random.RandomState(0), layouts.voc_palette()
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    for file, ids in ((voc / "ImageSets/Segmentation/train.txt", TRAIN), (voc / "ImageSets/Segmentation/val.txt", VAL),
                      (sbd / "train.txt", SBD_TRAIN), (sbd / "val.txt", SBD_VAL), (voc / "Annotations/p0.xml", "-")):
        console.write_atomically(file, lambda f: f.write_text("\n".join(ids)))
    for n in range(10):
        image = Image.fromarray(rng.randint(0, 255, (60, 80, 3), np.uint8))
        console.write_atomically(voc / f"JPEGImages/p{n}.jpg", lambda f: image.save(f, "JPEG"))
    for i in TRAIN + VAL:
        prepare.write_label(voc / f"SegmentationClass/{i}.png", np.ones((60, 80), np.uint8), palette)
    ids = np.full((60, 80), 2, np.uint8)
    ids[0, 0] = 3
    mat = {"GTcls": {"Boundaries": np.zeros((20, 1), object), "Segmentation": ids, "CategoriesPresent": [2.0]}}
    for i in {*SBD_TRAIN, *SBD_VAL}:
        console.write_atomically(sbd / f"cls/{i}.mat", lambda f: savemat(f, mat, appendmat=False))
    for name, folder, mode in ((VOC, "VOCdevkit", "w"), (SBD, "benchmark_RELEASE", "w:gz")):
        with tarfile.open(root / name, mode) as tar:
            tar.add(root / folder, folder)
        shutil.rmtree(root / folder)
    return root


class Handler(http.server.SimpleHTTPRequestHandler):
    """Records in `server.asked` which files were requested."""

    def log_message(self, *_):
        self.server.asked.add(self.path[1:])


@pytest.fixture
def server(archives, monkeypatch, tmp_path):
    """Serves `server.folder`, a copy of `archives`."""
    folder = shutil.copytree(archives, tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.folder, server.asked = folder, set()
    server.handle_error = lambda *_: None  # torchvision closes once it knows that no redirect comes
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    table = [(name, f"http://127.0.0.1:{server.server_port}/{name}", hashlib.md5((archives / name).read_bytes(
        )).hexdigest()) for name in (VOC, SBD)]
    monkeypatch.setattr(prepare, "voc_archives", lambda: table)
    monkeypatch.setattr(prepare, "VOC_COUNTS", COUNTS)
    yield server
    server.shutdown()
    server.server_close()


def check_complete(root):
    dataset = layouts.open_dataset(str(root))
    assert dataset.train_ids() == AUG and dataset.ids("train") == TRAIN and dataset.ids("val") == VAL
    assert sorted(dataset.labels) == sorted(AUG + VAL) and len(dataset.images) == 10 and len(dataset.classes) == 21
    for i, label in dataset.labels.items():
        ids = data.read_label(layouts.Label(label, 21, ()), (80, 60))
        assert np.unique(ids).tolist() == ([1] if i in TRAIN + VAL else [2, 3]), i
        assert Image.open(label).getpalette() == layouts.voc_palette()
    assert not list(root.rglob("*.part")) and not list(root.rglob("*.xml"))  # no temporary files, nothing unneeded


def test_voc(server, tmp_path, capsys):
    """Killed between the archives and run again; then run again when all or only a part is there."""
    root = tmp_path / "VOC2012"
    with pytest.raises(Killed), interrupt(SBD, Killed):
        call("prepare", "voc", "--root", root)
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()
    call("prepare", "voc", "--root", root)
    assert "train_aug 6" in capsys.readouterr().out
    check_complete(root)
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*.*g")}
    shutil.rmtree(root / "archives")
    server.asked.clear()
    call("prepare", "voc", "--root", root)
    assert not server.asked and "unpacking" not in capsys.readouterr().out
    (root / "SegmentationClassAug/p7.png").unlink()
    call("prepare", "voc", "--root", root)
    assert server.asked == {SBD}
    check_complete(root)
    assert {f.stem for f in before if f.stat().st_mtime_ns != before[f]} == {"p7"}


@pytest.mark.quick
def test_voc_from_a_folder(archives, server, tmp_path, fails):
    """A file of the wrong size, and an SBD label of an image that VOC labels, are replaced."""
    root, wrong = tmp_path / "v", tmp_path / VOC
    console.write_atomically(root / "JPEGImages/p1.jpg", lambda f: f.write_bytes(b"cut"))
    for i in ("p0", "p2"):
        label = np.full((60, 80), 2, np.uint8)
        prepare.write_label(root / f"SegmentationClassAug/{i}.png", label, layouts.voc_palette())
    assert f"--from {tmp_path}: no {VOC}" in fails("prepare", "voc", "--root", root, "--from", tmp_path)
    wrong.write_bytes((archives / VOC).read_bytes() + b"more")
    assert f"--from {tmp_path}: no {VOC}" in fails("prepare", "voc", "--root", root, "--from", tmp_path)
    call("prepare", "voc", "--root", root, "--from", archives)
    check_complete(root)
    assert data.read_image(root / "JPEGImages/p1.jpg").size == (80, 60) and not server.asked


@pytest.mark.parametrize("kind", ["cut off", "changed", "gone"])
def test_a_failed_download(archives, server, tmp_path, kind):
    """It is named, nothing is unpacked, and the same command completes it later."""
    root = tmp_path / "v"
    content = (archives / VOC).read_bytes()
    if kind == "gone":
        (server.folder / VOC).unlink()
    else:
        (server.folder / VOC).write_bytes(content[:10000] if kind == "cut off" else content + b"more")
    with pytest.raises(console.InputError, match=f"{root}/archives/{VOC}: .*--from"):
        call("prepare", "voc", "--root", root)
    assert not (root / "JPEGImages").exists()
    shutil.copy(archives / VOC, server.folder)
    call("prepare", "voc", "--root", root)
    check_complete(root)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_a_conversion_that_was_cut_short_is_completed(archives, server, tmp_path, monkeypatch, error):
    """Half of a label is not taken for a label."""
    words, save = ("--root", tmp_path / "v", "--from", archives), Image.Image.save

    def save_half(image, file, *more):
        save(image, file, *more)
        if "SegmentationClassAug/p6" in str(file):
            os.truncate(file, 40)
            raise error
    monkeypatch.setattr(prepare, "map_in_parallel", lambda function, items, _: [*map(function, items)])
    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises((console.InputError, Killed)):
        call("prepare", "voc", *words)
    monkeypatch.setattr(Image.Image, "save", save)
    call("prepare", "voc", *words)
    check_complete(tmp_path / "v")


@pytest.mark.parametrize("name", ["train", "val", "train_aug"])
def test_another_number_of_images_than_published(archives, server, tmp_path, monkeypatch, fails, name):
    monkeypatch.setattr(prepare, "VOC_COUNTS", COUNTS | {name: 7})
    error = fails("prepare", "voc", "--root", tmp_path / "v", "--from", archives)
    assert f"{name} has {COUNTS[name]} images" in error and "7" in error
    assert not (tmp_path / "v/ImageSets/Segmentation/train_aug.txt").exists()


@pytest.mark.parametrize("name,kind", [("good/../evil", tarfile.REGTYPE), ("good/a/../../evil", tarfile.REGTYPE),
                                       ("/evil", tarfile.REGTYPE),
                                       ("good/link", tarfile.SYMTYPE), ("good/link", tarfile.LNKTYPE)])
def test_hostile_archives_write_nothing_elsewhere(tmp_path, name, kind):
    """And one that ends early is an error that names it."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member in map(tarfile.TarInfo, ("good/1.txt", name, "good/2.txt")):
            if member.name == name:
                member.type, member.linkname = kind, "../../secret"
            tar.addfile(member)
    prepare.unpack(tmp_path / "a.tar", "good/", [""], tmp_path / "root")
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["1.txt", "2.txt", "a.tar"]
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes())[:100])
    with pytest.raises(console.InputError, match="a.tar: "):
        prepare.unpack(tmp_path / "a.tar", "good/", [""], tmp_path / "root")


@pytest.mark.parametrize("kinds", [["labelTrainIds"], ["labelIds", "labelTrainIds"]])
def test_cityscapes(tmp_path, capsys, fails, kinds):
    root, image = tmp_path / "city", Image.new("RGB", (128, 64), (90, 90, 90))
    rows = {"labelIds": (23, 7, 4), "labelTrainIds": (10, 0, 255)}  # sky, road, static
    for name in ("train/aachen/aachen_000000_000019", "train/bonn/bonn_000001_000019", "val/ulm/ulm_000000_000019"):
        console.write_atomically(root / f"leftImg8bit/{name}_leftImg8bit.png", lambda f: image.save(f, "PNG"))
        for kind in kinds:
            label = Image.fromarray(np.repeat(np.array(rows[kind], np.uint8), (30, 20, 14))[:, None].repeat(128, 1))
            console.write_atomically(root / f"gtFine/{name}_gtFine_{kind}.png", lambda f: label.save(f, "PNG"))
    assert f"python prepare.py cityscapes --root {root}" in fails("prepare", "split", "--data", root)
    call("prepare", "cityscapes", "--root", root)
    assert "train 2 images" in capsys.readouterr().out
    dataset = layouts.open_dataset(str(root))
    assert dataset.train_ids() == ["aachen_000000_000019", "bonn_000001_000019"]
    assert dataset.ids("val") == ["ulm_000000_000019"]
    assert dataset.classes[0] == "road" and dataset.classes[10] == "sky" and len(dataset.classes) == 19
    assert dataset.palette[:3] == [128, 64, 128]
    label = dataset.samples(dataset.ids("val"))[0].label
    ids = data.read_label(label, (128, 64))
    assert (ids[:30] == 10).all() and (ids[30:50] == 0).all() and (ids[50:] == 255).all()
    Image.new("L", (128, 64), 34).save(label.path)
    with pytest.raises(console.InputError, match="value 34"):
        data.read_label(label, (128, 64))
    shutil.rmtree(root / "gtFine/val")
    assert "0 of 1 images of val" in fails("prepare", "cityscapes", "--root", root)


def test_camvid(tmp_path, capsys, fails):
    source, root = tmp_path / "SegNet", tmp_path / "camvid"
    rng = np.random.RandomState(0)
    for name, ids in (("train", ("a", "b")), ("val", ("c",))):
        for kind, high, shape in (("annot", 12, (36, 48)), ("", 255, (36, 48, 3))):
            (source / f"{name}{kind}").mkdir(parents=True)
            for i in ids:
                Image.fromarray(rng.randint(0, high, shape, np.uint8)).save(source / f"{name}{kind}/{i}.png")
    call("prepare", "camvid", "--from", source, "--root", root)
    assert "train 2 images, val 1 images" in capsys.readouterr().out
    dataset = layouts.open_dataset(str(root))
    assert len(dataset.classes) == 11 and dataset.palette[3:6] == [128, 0, 0]
    _, path, label = dataset.samples(["b"])[0]
    old = np.array(Image.open(source / "trainannot/b.png"))
    assert (data.read_label(label, (48, 36)) == np.where(old == 11, 255, old)).all()
    assert open(path, "rb").read() == (source / "train/b.png").read_bytes()
    shutil.copy(source / "train/b.png", source / "trainannot/b.png")
    assert "trainannot/b.png: " in fails("prepare", "camvid", "--from", source, "--root", root)  # by a worker
    (source / "trainannot/b.png").unlink()
    assert "b is in only one" in fails("prepare", "camvid", "--from", source)
    assert f"--from {tmp_path}" in fails("prepare", "camvid", "--from", tmp_path)


def check(capsys, root):
    with pytest.raises(SystemExit) as stop:
        call("prepare", "check", "--data", root)
    return stop.value.code, capsys.readouterr().out


@pytest.mark.quick
def test_check(voc, capsys):
    status, printed = check(capsys, voc)
    assert status == 0 and "10 images, 10 labels, 4 classes" in printed and "96x80 10" in printed
    labels = [np.array(Image.open(voc / f"SegmentationClassAug/train{n}.png")) for n in range(8)]
    percent = 100 * np.mean([label == 2 for label in labels])
    assert [line.split()[:3] for line in printed.splitlines() if "green" in line] == [["2", "green", f"{percent:.2f}"]]


def test_check_finds(voc, capsys):
    images, labels = voc / "JPEGImages", voc / "SegmentationClassAug"
    (images / "train0.png").write_bytes((images / "train0.png").read_bytes()[:100])
    Image.fromarray(np.full((80, 96), 9, np.uint8)).save(labels / "train1.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(labels / "train2.png")
    (images / "train3.png").unlink()
    (labels / "train4.png").unlink()
    (voc / "ImageSets/Segmentation/val.txt").write_text("val0\nval1\ntrain5")
    Image.open(images / "train6.png").save(images / "val1.png", compress_level=0)
    (voc / "classes.txt").write_text("grey\nred\ngreen\nblue\nblack\n")
    status, printed = check(capsys, voc)
    wrong = [line.removeprefix("problem, ") for line in printed.splitlines() if line.startswith("problem, ")]
    for kind, file in (("bad files", f"{images}/train0.png"), ("bad files", f"{labels}/train1.png: label value 9"),
                       ("bad files", f"{labels}/train2.png"), ("in a list, but not there", f"{images}/train3"),
                       ("in a list, but not there", f"{labels}/train4"),
                       ("both in train and val", "train5"),
                       ("both in train and val", "val1 of val has the pixels of train6")):
        assert any(line.startswith(f"{kind}: {file}") for line in wrong), (kind, file)
    assert status == 1 and len(wrong) == 7
    for warning in (f"1 labels, such as {labels}/train3.png, have no image", "shows black"):
        assert any(line.startswith("warning: ") and warning in line for line in printed.splitlines()), warning


@pytest.mark.quick
def test_split(voc, capsys, tmp_path):
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(f"train{n}" for n in range(8)))
    (voc / "ImageSets/Segmentation/train.txt").write_text("train0\ntrain1\ntrain2")
    call("prepare", "split", "--data", voc, "--split", "0.3", "--out", tmp_path)
    printed = capsys.readouterr().out
    labelled, unlabelled = (layouts.read_ids(tmp_path / f"{kind}_0.3_seed0.txt") for kind in ("labelled", "unlabelled"))
    assert (labelled, unlabelled) == layouts.split_ids([f"train{n}" for n in range(8)], 0.3, 0) and len(labelled) == 2
    assert [line for line in printed.splitlines() if line.startswith("train")] == labelled + unlabelled
    call("prepare", "split", "--data", voc, "--split", "0.5", "--list", "train", "--split-seed", 3)
    written = layouts.read_ids(voc / "ImageSets/Segmentation/labelled_train_0.5_seed3.txt")
    assert written == layouts.split_ids(["train0", "train1", "train2"], 0.5, 3)[0]
