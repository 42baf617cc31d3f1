"""python prepare.py: data sets from their archives, and the commands that look at one."""
import functools
import hashlib
import http.server
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, call, python
from PIL import Image
from scipy.io import savemat

import data
import prepare
from common import console, layouts

VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
TRAIN, VAL, SBD_TRAIN, SBD_VAL = ["p0", "p1"], ["p2", "p3", "p4"], ["p1", "p5", "p6", "p2"], ["p7", "p8", "p3"]
AUG = ["p0", "p1", "p5", "p6", "p7", "p8"]  # union less val
COUNTS = {"train": 2, "val": 3, "train_aug": 6, "images": 10}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with both archives as published, but small: 10 pictures, VOC's labels all 1, SBD's all 2 with a 3."""
    root, rng, palette = tmp_path_factory.mktemp("archives"), np.random.RandomState(0), layouts.voc_palette()
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    for file, ids in ((voc / "ImageSets/Segmentation/train.txt", TRAIN), (voc / "ImageSets/Segmentation/val.txt", VAL),
                      (sbd / "train.txt", SBD_TRAIN), (sbd / "val.txt", SBD_VAL), (voc / "Annotations/p0.xml", "-")):
        console.write_atomically(file, lambda f: f.write_text("\n".join(ids)))
    for n in range(10):
        picture = Image.fromarray(rng.randint(0, 255, (60, 80, 3), np.uint8))
        console.write_atomically(voc / f"JPEGImages/p{n}.jpg", lambda f: picture.save(f, "JPEG"))
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
    """Notes in `server.asked` which files were asked for, and hangs up after `server.cut` bytes of one."""

    def copyfile(self, source, target):
        target.write(source.read()[:self.server.cut])

    def log_message(self, *_):
        self.server.asked.add(self.path[1:])


def table(folder, base):
    return [(name, f"{base}/{name}", hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in (VOC, SBD)]


@pytest.fixture
def server(archives, monkeypatch, tmp_path):
    """Serves `server.folder`, a copy of `archives`."""
    folder = shutil.copytree(archives, tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.folder, server.cut, server.asked = folder, None, set()
    server.handle_error = lambda *_: None  # torchvision hangs up once it knows that no redirect comes
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(prepare, "voc_archives", lambda: table(archives, f"http://127.0.0.1:{server.server_port}"))
    monkeypatch.setattr(prepare, "VOC_COUNTS", COUNTS)
    yield server
    server.shutdown()
    server.server_close()


def is_complete(root):
    dataset = layouts.open_dataset(str(root))
    assert dataset.train_ids() == AUG and dataset.ids("train") == TRAIN and dataset.ids("val") == VAL
    assert sorted(dataset.labels) == sorted(AUG + VAL) and len(dataset.images) == 10 and len(dataset.classes) == 21
    for i, label in dataset.labels.items():
        ids = data.read_label(layouts.Label(label, 21, ()), (80, 60))
        assert np.unique(ids).tolist() == ([1] if i in TRAIN + VAL else [2, 3]), i
        assert Image.open(label).getpalette() == layouts.voc_palette()
    left = {f.relative_to(root).parts[0] for f in root.rglob("*") if f.is_file()} - {"archives"}
    assert left == {"JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets"}
    assert not list(root.rglob("*.part")) and not list(root.rglob("*.xml"))


def test_voc(server, tmp_path, capsys):
    root = tmp_path / "VOC2012"
    call("prepare", "voc", "--root", root)
    said = capsys.readouterr().out
    assert "train_aug 6 images (2 of them with VOC's own labels" in said and "val 3" in said
    is_complete(root)
    # what is there is not done again, and what is not is done without the rest
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*.*g")}
    shutil.rmtree(root / "archives")
    server.asked.clear()
    call("prepare", "voc", "--root", root)
    assert not server.asked and "unpacking" not in capsys.readouterr().out
    (root / "SegmentationClassAug/p7.png").unlink()
    call("prepare", "voc", "--root", root)
    assert server.asked == {SBD}
    (root / "JPEGImages/p7.jpg").unlink()
    call("prepare", "voc", "--root", root)
    is_complete(root)
    assert {f.stem for f in before if f.stat().st_mtime_ns != before[f]} == {"p7"}


@pytest.mark.quick
def test_voc_from_a_folder(archives, server, tmp_path, fails):
    """A picture of another size and an SBD label where VOC has its own are replaced; a wrong archive is not taken."""
    root, wrong = tmp_path / "v", tmp_path / VOC
    console.write_atomically(root / "JPEGImages/p1.jpg", lambda f: f.write_bytes(b"cut"))
    for i in ("p0", "p2"):
        label = np.full((60, 80), 2, np.uint8)
        prepare.write_label(root / f"SegmentationClassAug/{i}.png", label, layouts.voc_palette())
    for write in (lambda: None, lambda: wrong.write_bytes((archives / VOC).read_bytes() + b"more")):
        write()
        assert f"--from {tmp_path}: no {VOC} with the MD5" in fails(
            "prepare", "voc", "--root", root, "--from", tmp_path)
    assert wrong.exists()  # it is the user's
    call("prepare", "voc", "--root", root, "--from", archives)
    is_complete(root)
    assert data.read_image(root / "JPEGImages/p1.jpg").size == (80, 60) and not server.asked


@pytest.mark.parametrize("kind,say", [("cut", "corrupted"), ("wrong", "corrupted"), ("gone", "HTTP Error 404"),
                                      ("refused", "Connection refused")])
def test_a_failed_download(archives, server, tmp_path, monkeypatch, kind, say):
    root = tmp_path / "v"
    if kind == "cut":
        server.cut = 10000
    elif kind == "wrong":
        (server.folder / VOC).write_bytes((archives / VOC).read_bytes() + b"more")
    elif kind == "gone":
        (server.folder / VOC).unlink()
    with monkeypatch.context() as patch, pytest.raises(console.InputError) as error:
        if kind == "refused":
            patch.setattr(prepare, "voc_archives", lambda: table(archives, NOWHERE))
        call("prepare", "voc", "--root", root)
    assert re.fullmatch(f"{root}/archives/{VOC}: .*{say}.*--from", str(error.value))
    assert not (root / "JPEGImages").exists()
    server.cut = None
    shutil.copy(archives / VOC, server.folder)
    call("prepare", "voc", "--root", root)
    is_complete(root)


def test_counts_have_to_be_the_published_ones(archives, server, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(prepare, "VOC_COUNTS", COUNTS | {"train_aug": 7})
    assert "train_aug has 6 images, 7 are published" in fails("prepare", "voc", "--root", tmp_path / "v",
                                                                "--from", archives)
    assert not (tmp_path / "v/ImageSets/Segmentation/train_aug.txt").exists()


def script(archives, more=""):
    """Source of a process that runs `voc` on these archives."""
    return f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import prepare; from common import console; {more}
prepare.voc_archives, prepare.VOC_COUNTS = lambda: {table(archives, NOWHERE)!r}, {COUNTS!r}
console.launch(prepare.main, prepare.flags)
"""


def test_a_killed_conversion(archives, server, tmp_path):
    root = tmp_path / "v"
    words = "voc", "--root", root, "--from", archives
    half = "import time; prepare.Image.Image.save = lambda _, file, *kind: (file.write_bytes(b'half'), time.sleep(60))"
    process = subprocess.Popen([sys.executable, "-c", script(archives, half), *words])
    until = time.monotonic() + 60
    while not list(root.glob("SegmentationClassAug/*")) and time.monotonic() < until:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert list(root.glob("SegmentationClassAug/*")) and not list(root.glob("SegmentationClassAug/*.png"))
    assert not (root / "ImageSets/Segmentation/train_aug.txt").exists()
    call("prepare", *words)
    is_complete(root)


def test_a_full_disk(archives, tmp_path):
    """On a tmpfs of a few pages, and then on the same with more."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: unshare --user --mount is not allowed")
    root, file = tmp_path / "v", tmp_path / "voc.py"
    root.mkdir()
    done = f"test_prepare.is_complete(pathlib.Path({str(root)!r}))"
    file.write_text(f"{script(archives)}import pathlib, test_prepare; {done}")
    run = f"{sys.executable} {file} voc --root {root} --from {archives}"
    done = subprocess.run([*unshare, "sh", "-c", f"""
        mount -t tmpfs -o size=40k none {root} && {run}; echo status $?
        find {root} -name '*.part'; mount -o remount,size=10m none {root} && {run} && echo complete"""],
                          capture_output=True, text=True)
    assert done.stderr.count("\n") == 1 and "cannot be written (No space left on device)" in done.stderr, done
    assert "status 2\n" in done.stdout and "complete" in done.stdout and ".part" not in done.stdout, done


@pytest.mark.parametrize("name,kind", [("good/../evil", tarfile.REGTYPE), ("good/a/../../evil", tarfile.REGTYPE),
                                       ("/evil", tarfile.REGTYPE),
                                       ("good/link", tarfile.SYMTYPE), ("good/link", tarfile.LNKTYPE)])
def test_archives_write_nothing_elsewhere(tmp_path, name, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member in map(tarfile.TarInfo, ("good/1.txt", name, "good/2.txt")):
            if member.name == name:
                member.type, member.linkname = kind, "../../secret"
            tar.addfile(member)
    prepare.unpack(tmp_path / "a.tar", "good/", [""], tmp_path / "root")
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["1.txt", "2.txt", "a.tar"]


def test_a_damaged_archive(archives, tmp_path):
    (tmp_path / SBD).write_bytes((archives / SBD).read_bytes()[:-200])
    with pytest.raises(console.InputError, match=f"{SBD}: cannot be unpacked"):
        prepare.unpack(tmp_path / SBD, "benchmark_RELEASE/", [""], tmp_path)


@pytest.mark.parametrize("kinds", [["labelIds"], ["labelTrainIds"], ["labelIds", "labelTrainIds"]])
def test_cityscapes(tmp_path, capsys, fails, kinds):
    root, picture = tmp_path / "city", Image.new("RGB", (128, 64), (90, 90, 90))
    rows = {"labelIds": (23, 7, 4), "labelTrainIds": (10, 0, 255)}  # sky, road, static
    for name in ("train/aachen/aachen_000000_000019", "train/bonn/bonn_000001_000019", "val/ulm/ulm_000000_000019"):
        console.write_atomically(root / f"leftImg8bit/{name}_leftImg8bit.png", lambda f: picture.save(f, "PNG"))
        for kind in kinds:
            label = Image.fromarray(np.repeat(np.array(rows[kind], np.uint8), (30, 20, 14))[:, None].repeat(128, 1))
            console.write_atomically(root / f"gtFine/{name}_gtFine_{kind}.png", lambda f: label.save(f, "PNG"))
    assert f"python prepare.py cityscapes --root {root}" in fails("prepare", "split", "--data", root)
    call("prepare", "cityscapes", "--root", root)
    said = capsys.readouterr().out
    assert "train 2 images (published: 2,975)" in said
    dataset = layouts.open_dataset(str(root))
    assert dataset.train_ids() == ["aachen_000000_000019", "bonn_000001_000019"]
    assert dataset.ids("val") == ["ulm_000000_000019"]
    assert dataset.classes[0] == "road" and dataset.classes[10] == "sky" and len(dataset.classes) == 19
    assert dataset.palette[:3] == [128, 64, 128] and dataset.kind == "cityscapes"
    label = dataset.samples(dataset.ids("val"))[0].label
    ids = data.read_label(label, (128, 64))
    assert (ids[:30] == 10).all() and (ids[30:50] == 0).all() and (ids[50:] == 255).all()
    Image.new("L", (128, 64), 34).save(label.path)
    with pytest.raises(console.InputError, match="label value 34 is outside the 19 classes"):
        data.read_label(label, (128, 64))
    for f in (root / "gtFine/val").rglob("*.png"):
        f.unlink()
    assert "0 of 1 images of val" in fails("prepare", "cityscapes", "--root", root)


def test_camvid(tmp_path, capsys, fails):
    source, root = tmp_path / "SegNet", tmp_path / "camvid"
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        for n in range(count):
            rng = np.random.RandomState(n)
            for kind, array in (("annot", rng.randint(0, 12, (36, 48))), ("", rng.randint(0, 255, (36, 48, 3)))):
                (source / f"{name}{kind}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(source / f"{name}{kind}/{name}{n}.png")
    for _ in range(2):
        call("prepare", "camvid", "--from", source, "--root", root)
    assert "train 3 images, val 2 images, test 1 images, 11 classes" in capsys.readouterr().out
    dataset = layouts.open_dataset(str(root))
    assert len(dataset.classes) == 11 and dataset.palette[3:6] == [128, 0, 0]
    _, path, label = dataset.samples(["train2"])[0]
    old = np.array(Image.open(source / "trainannot/train2.png"))
    assert (data.read_label(label, (48, 36)) == np.where(old == 11, 255, old)).all()
    assert open(path, "rb").read() == (source / "train/train2.png").read_bytes()
    shutil.copy(source / "train/train2.png", source / "trainannot/train2.png")
    done = python("prepare.py", "camvid", "--from", source, "--root", root)  # a worker finds it
    assert re.fullmatch("prepare.py: .*/train2.png: is not an index image.*\n", done.stderr) and done.returncode
    (source / "trainannot/train2.png").unlink()
    assert "train2 is in only one of train/ and trainannot/" in fails("prepare", "camvid", "--from", source)
    assert "needs train/, trainannot/" in fails("prepare", "camvid", "--from", tmp_path)


def checked(capsys, root):
    with pytest.raises(SystemExit) as stop:
        call("prepare", "check", "--data", root)
    return stop.value.code, capsys.readouterr().out


@pytest.mark.quick
def test_check(voc, capsys):
    status, said = checked(capsys, voc)
    assert status == 0 and "10 images, 10 labels, 4 classes" in said and "96x80 10" in said
    assert said.endswith("\nnothing is wrong\n")
    labels = [np.array(Image.open(voc / f"SegmentationClassAug/train{n}.png")) for n in range(8)]
    share = 100 * np.mean([label == 2 for label in labels])
    assert [line.split()[:3] for line in said.splitlines() if "green" in line] == [["2", "green", f"{share:.2f}"]]


def test_check_finds(voc, capsys):
    pictures, labels = voc / "JPEGImages", voc / "SegmentationClassAug"
    (pictures / "train0.png").write_bytes((pictures / "train0.png").read_bytes()[:100])
    Image.fromarray(np.full((80, 96), 9, np.uint8)).save(labels / "train1.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(labels / "train2.png")
    (pictures / "train3.png").unlink()
    (labels / "train4.png").unlink()
    (voc / "ImageSets/Segmentation/val.txt").write_text("val0\nval1\ntrain5")
    Image.open(pictures / "train6.png").save(pictures / "val1.png", compress_level=0)
    (voc / "classes.txt").write_text("grey\nred\ngreen\nblue\nblack\n")
    status, said = checked(capsys, voc)
    for line in (f"bad files: {pictures}/train0.png: cannot be read",
                 f"bad files: {labels}/train1.png: label value 9 is outside the 5 classes",
                 f"bad files: {labels}/train2.png: the label's size (5, 5) is not its image's (96, 80)",
                 f"in a list, but not there: {pictures}/train3\n", f"in a list, but not there: {labels}/train4\n",
                 f"label without an image: {labels}/train3.png\n", "both in train and val: train5\n",
                 "both in train and val: val1 of val has the pixels of train6 of train\n",
                 "class that no training label shows: 4, black"):
        assert f"wrong, {line}" in said, line
    assert status == 1 and said.endswith("\n9 mistakes\n")


@pytest.mark.quick
def test_split(voc, capsys, tmp_path):
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(f"train{n}" for n in range(8)))
    (voc / "ImageSets/Segmentation/train.txt").write_text("train0\ntrain1\ntrain2")
    call("prepare", "split", "--data", voc, "--split", "0.3", "--out", tmp_path)
    said = capsys.readouterr().out
    labelled, unlabelled = (layouts.read_ids(tmp_path / f"{kind}_0.3_seed0.txt") for kind in ("labelled", "unlabelled"))
    assert (labelled, unlabelled) == layouts.split_ids([f"train{n}" for n in range(8)], 0.3, 0) and len(labelled) == 2
    assert [line for line in said.splitlines() if line.startswith("train")] == labelled + unlabelled
    assert "0.3 of the 8 images of the training list, 2.4 rounded to 2" in said
    call("prepare", "split", "--data", voc, "--split", "0.5", "--list", "train", "--split-seed", 3)
    assert "0.5 of the 3 images of train, 1.5 rounded to 2" in capsys.readouterr().out
    written = layouts.read_ids(voc / "ImageSets/Segmentation/labelled_train_0.5_seed3.txt")
    assert written == layouts.split_ids(["train0", "train1", "train2"], 0.5, 3)[0]


def test_wrong_commands(fails, tmp_path, voc):
    assert "--split 2.0" in fails("prepare", "split", "--data", voc, "--split", 2)
    assert "required: COMMAND" in fails("prepare")
    assert "invalid choice: 'vok'" in fails("prepare", "vok")
    assert "unrecognized arguments: --root" in fails("prepare", "check", "--root", "x")
    assert f"--data {tmp_path}: no data there" in fails("prepare", "check", "--data", tmp_path)
    assert "0 of 0 images of train" in fails("prepare", "cityscapes", "--root", tmp_path)
