"""python data.py: data sets from their archives, and the commands that look at one."""
import hashlib
import http.server
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time

import numpy as np
import pytest
from conftest import COLOURS, ROOT
from PIL import Image
from scipy.io import savemat

import cli
import data
import prepare

VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
TRAIN, VAL, SBD_TRAIN, SBD_VAL = ["p0", "p1"], ["p2", "p3", "p4"], ["p1", "p5", "p6", "p2"], ["p7", "p8", "p3"]
AUG = ["p0", "p1", "p5", "p6", "p7", "p8"]  # union less val
COUNTS = {"train": 2, "val": 3, "train_aug": 6, "pictures": 10}


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encoded(array, kind):
    file = io.BytesIO()
    image = Image.fromarray(array)
    if kind == "PNG":
        image = image.convert("P")
        image.putpalette(data.voc_palette())
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with both archives as they are published, but small: 10 pictures, VOC's labels all 1, SBD's all 2 with a 3."""
    folder, rng = tmp_path_factory.mktemp("archives"), np.random.RandomState(0)
    with tarfile.open(folder / VOC, "w") as tar:
        add(tar, "VOCdevkit/VOC2012/Annotations/p0.xml", b"<annotation/>")
        for name, ids in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
            add(tar, f"VOCdevkit/VOC2012/ImageSets/Segmentation/{name}.txt", "\n".join(ids).encode() + b"\n")
        for n in range(10):
            add(tar, f"VOCdevkit/VOC2012/JPEGImages/p{n}.jpg", encoded(rng.randint(0, 255, (60, 80, 3), np.uint8), "JPEG"))
        for i in TRAIN + VAL:
            add(tar, f"VOCdevkit/VOC2012/SegmentationClass/{i}.png", encoded(np.ones((60, 80), np.uint8), "PNG"))
            add(tar, f"VOCdevkit/VOC2012/SegmentationObject/{i}.png", b"not wanted")
    with tarfile.open(folder / SBD, "w:gz") as tar:
        add(tar, "benchmark_RELEASE/dataset/train.txt", "\n".join(SBD_TRAIN).encode())
        add(tar, "benchmark_RELEASE/dataset/val.txt", "\n".join(SBD_VAL).encode())
        for i in {*SBD_TRAIN, *SBD_VAL}:
            file, ids = io.BytesIO(), np.full((60, 80), 2, np.uint8)
            ids[0, 0] = 3
            savemat(file, {"GTcls": {"Boundaries": np.zeros((20, 1), object), "Segmentation": ids, "CategoriesPresent": [2.0]}})
            add(tar, f"benchmark_RELEASE/dataset/cls/{i}.mat", file.getvalue())
            add(tar, f"benchmark_RELEASE/dataset/img/{i}.jpg", b"not wanted")
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves the archives; `cut` is how many bytes it sends before it hangs up, with a TCP reset where `reset` is set,
    `spoilt` what it sends instead, `ranges` whether it knows them.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.cut, self.reset, self.spoilt, self.ranges, self.asked = folder, None, False, None, True, []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path[1:], self.server
        server.asked.append((name, self.headers["Range"]))
        if not (server.folder / name).exists():
            return self.send_error(404, "Not Found")
        content = server.spoilt or (server.folder / name).read_bytes()
        start = int((self.headers["Range"] or "bytes=0-").split("=")[1][:-1]) if server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416, "Range Not Satisfiable")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        self.wfile.write(content[start:][:server.cut])
        if server.reset:
            self.wfile.flush()
            time.sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


def table(folder, base):
    return {name: (f"{base}/{name}", hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in (VOC, SBD)}


@pytest.fixture
def server(archives, monkeypatch):
    server = Server(archives)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "voc_archives", lambda: table(archives, f"http://127.0.0.1:{server.server_port}"))
    monkeypatch.setattr(prepare, "VOC_COUNTS", COUNTS)
    yield server
    server.shutdown()
    server.server_close()


def prepare_main(*words):
    prepare.main(prepare.flags().parse_args(list(map(str, words))))


def is_complete(root):
    dataset, _ = data.open_data(str(root))
    assert dataset.train_ids() == AUG and dataset.ids("train") == TRAIN and dataset.ids("val") == VAL
    assert sorted(dataset.labels) == sorted(AUG + VAL) and len(dataset.pictures) == 10 and len(dataset.classes) == 21
    for i, label in dataset.labels.items():
        ids = data.read_label(data.Label(label, 21, ()), (80, 60))
        assert np.unique(ids).tolist() == ([1] if i in TRAIN + VAL else [2, 3]), i
        assert Image.open(label).getpalette() == data.voc_palette()
    left = {f.relative_to(root).parts[0] for f in root.rglob("*") if f.is_file()} - {"archives"}
    assert left == {"JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets"}
    assert not list(root.rglob("*.part")) and not list(root.rglob("*.xml"))


def test_voc(server, tmp_path, capsys):
    root = tmp_path / "VOC2012"
    prepare_main("voc", "--root", root)
    said = capsys.readouterr().out
    assert "train_aug 6 pictures (2 of them with VOC's own labels" in said and "val 3" in said
    is_complete(root)
    # what is there is not done again, and what is not is done without the rest
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*.*g")}
    shutil.rmtree(root / "archives")
    server.asked.clear()
    prepare_main("voc", "--root", root)
    assert not server.asked and "unpacking" not in capsys.readouterr().out
    (root / "SegmentationClassAug/p7.png").unlink()
    prepare_main("voc", "--root", root)
    assert [name for name, _ in server.asked] == [SBD]
    (root / "JPEGImages/p7.jpg").unlink()
    prepare_main("voc", "--root", root)
    is_complete(root)
    again = {f for f in before if f.stat().st_mtime_ns != before[f]}
    assert {f.stem for f in again} == {"p7"}


def test_voc_from_a_folder(archives, server, tmp_path, fails):
    prepare_main("voc", "--root", tmp_path / "a", "--from", archives)
    is_complete(tmp_path / "a")
    assert not server.asked
    assert f"--from {tmp_path}: {VOC} is not there; get it from http" in fails("prepare", "voc", "--root", tmp_path / "b",
                                                                              "--from", tmp_path)
    (tmp_path / VOC).write_bytes(b"something else")
    assert f"{tmp_path}/{VOC}: is not the published file" in fails("prepare", "voc", "--root", tmp_path / "b",
                                                                   "--from", tmp_path)
    assert (tmp_path / VOC).exists()  # it is the user's


def test_a_broken_download_goes_on(server, tmp_path, fails):
    root = tmp_path / "VOC2012"
    server.cut = 10000
    assert "the download stopped at 0.0 MB (the connection ended early); run the same command again" in fails(
        "prepare", "voc", "--root", root)
    part = root / "archives" / f"{VOC}.part"
    assert part.stat().st_size == 10000 and not (root / "JPEGImages").exists()
    server.cut = None
    prepare_main("voc", "--root", root)
    is_complete(root)
    assert server.asked[:2] == [(VOC, None), (VOC, "bytes=10000-")]
    # cut off between the last byte and its new name
    (root / "archives" / VOC).rename(part)
    (root / "JPEGImages/p0.jpg").unlink()
    prepare_main("voc", "--root", root)
    is_complete(root)


def test_a_server_that_knows_no_ranges(server, tmp_path, fails):
    server.cut = 10000
    fails("prepare", "voc", "--root", tmp_path / "v")
    server.cut, server.ranges = None, False
    prepare_main("voc", "--root", tmp_path / "v")
    is_complete(tmp_path / "v")


def test_a_reset_connection(server, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    server.cut, server.reset = 10000, True
    assert "the download stopped at 0.0 MB ([Errno 104] Connection reset by peer); run the same command" in fails(
        "prepare", "voc", "--root", tmp_path / "v")
    assert (tmp_path / f"v/archives/{VOC}.part").stat().st_size == 10000
    server.cut, server.spoilt = None, b"Please log in"
    server.reset, server.ranges = False, False
    assert "gives 13 bytes, fewer than" in fails("prepare", "voc", "--root", tmp_path / "v")
    server.spoilt = None
    prepare_main("voc", "--root", tmp_path / "v")
    is_complete(tmp_path / "v")


def test_what_is_there_but_wrong(archives, server, tmp_path):
    """A file of another size and an SBD label where VOC has its own are replaced; the user's own files stay."""
    root = tmp_path / "v"
    for file, content in (("JPEGImages/p1.jpg", b"cut"), ("benchmark_RELEASE/mine.txt", b"mine")):
        (root / file).parent.mkdir(parents=True)
        (root / file).write_bytes(content)
    prepare.save_label(np.full((60, 80), 2, np.uint8), data.voc_palette(), root / "SegmentationClassAug/p0.png")
    prepare_main("voc", "--root", root, "--from", archives)
    assert (root / "benchmark_RELEASE/mine.txt").read_bytes() == b"mine"
    shutil.rmtree(root / "benchmark_RELEASE")
    is_complete(root)
    assert data.read_picture(root / "JPEGImages/p1.jpg").size == (80, 60)


def test_a_wrong_download(server, tmp_path, fails):
    server.spoilt = b"an error page" * 100
    assert f"{VOC}: gave a file that is not the published one, whose MD5 is" in fails(
        "prepare", "voc", "--root", tmp_path / "v")
    assert not list((tmp_path / "v/archives").iterdir())
    server.spoilt = None
    prepare_main("voc", "--root", tmp_path / "v")
    is_complete(tmp_path / "v")


def test_no_server_no_file(server, tmp_path, fails, monkeypatch, archives):
    monkeypatch.setattr(server, "folder", tmp_path)
    assert f"{VOC}: 404 Not Found; get the file elsewhere and name its folder with --from" in fails(
        "prepare", "voc", "--root", tmp_path / "v")
    monkeypatch.setattr(prepare, "voc_archives", lambda: table(archives, "http://127.0.0.1:9"))
    assert "the download stopped at 0.0 MB ([Errno 111] Connection refused)" in fails(
        "prepare", "voc", "--root", tmp_path / "v")


def test_counts_have_to_be_the_published_ones(server, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(prepare, "VOC_COUNTS", COUNTS | {"train_aug": 7})
    assert "train_aug has 6 pictures, published are 7" in fails("prepare", "voc", "--root", tmp_path / "v")
    assert not (tmp_path / "v/ImageSets/Segmentation/train_aug.txt").exists()


def script(archives, more=""):
    """Source of a process that runs `voc` on these archives."""
    return textwrap.dedent("""
        import sys; sys.path.insert(0, {root!r})
        import cli, prepare
        prepare.voc_archives, prepare.VOC_COUNTS = lambda: {table!r}, {counts!r}
        {more}
        cli.launch(prepare.main, prepare.flags)
    """).format(root=str(ROOT), table=table(archives, "http://127.0.0.1:9"), counts=COUNTS, more=more)


def test_a_killed_conversion(archives, server, tmp_path):
    root = tmp_path / "v"
    slow = textwrap.dedent("""
        import time
        from PIL import Image
        def half(image, file, *kind, save=Image.Image.save):
            save(image, file, *kind)
            if "p5" not in str(file):
                with open(file, "r+b") as f:  # in the middle of writing
                    f.truncate(50)
                time.sleep(60)
        Image.Image.save = half
    """)
    process = subprocess.Popen([sys.executable, "-c", script(archives, slow), "voc", "--root", root, "--from", archives])
    until = time.monotonic() + 60
    while not (root / "SegmentationClassAug/p5.png").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = data.index(root / "SegmentationClassAug", [".png"])
    assert "p5" in done and len(done) < 6 and not (root / "ImageSets/Segmentation/train_aug.txt").exists()
    first = os.stat(done["p5"]).st_mtime_ns
    prepare_main("voc", "--root", root, "--from", archives)
    is_complete(root)
    assert os.stat(done["p5"]).st_mtime_ns == first


def test_a_full_disk(archives, tmp_path):
    """On a tmpfs of a few pages, and then on the same with more."""
    if os.system("unshare --user --map-root-user --mount true 2>/dev/null"):
        pytest.skip("no tmpfs can be mounted here: unshare --user --mount is not allowed")
    root = tmp_path / "v"
    root.mkdir()
    (tmp_path / "voc.py").write_text(script(archives))
    run = f"{sys.executable} {tmp_path}/voc.py voc --root {root} --from {archives}"
    check = f"{sys.executable} -c \"import sys; sys.path[:0] = ['{ROOT}', '{ROOT}/tests']; " \
            f"import test_prepare as t, pathlib; t.is_complete(pathlib.Path('{root}'))\""
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"""
        mount -t tmpfs -o size=40k none {root} && {run}; echo status $?
        find {root} -name '*.part'; mount -o remount,size=10m none {root} && {run} && {check} && echo complete"""],
                          capture_output=True, text=True)
    assert done.stderr.count("\n") == 1 and "cannot be written (No space left on device); make room" in done.stderr, done
    assert "status 2\n" in done.stdout and "complete" in done.stdout and ".part" not in done.stdout, done


@pytest.mark.parametrize("kind", ["../evil", "/evil", "a/../../evil", "symbolic", "hard", "a\\..\\evil"])
def test_unsafe_archives_are_refused(tmp_path, kind):
    file, root = tmp_path / "a.tar", tmp_path / "root"
    root.mkdir()
    with tarfile.open(file, "w") as tar:
        add(tar, "good/1.txt", b"1")
        if kind in ("symbolic", "hard"):
            member = tarfile.TarInfo("good/link")
            member.type, member.linkname = tarfile.SYMTYPE if kind == "symbolic" else tarfile.LNKTYPE, "../../secret"
            tar.addfile(member)
        else:
            add(tar, f"{tmp_path}/evil" if kind == "/evil" else f"good/{kind}", b"evil")
        add(tar, "good/2.txt", b"2")
    with pytest.raises(cli.InputError, match="a link or a path that leads elsewhere"):
        prepare.unpack(file, root, {"good": "there"})
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["a.tar", "1.txt"]


def test_a_damaged_archive(archives, tmp_path):
    (tmp_path / SBD).write_bytes((archives / SBD).read_bytes()[:-200])
    with pytest.raises(cli.InputError, match=f"{SBD}: cannot be unpacked"):
        prepare.unpack(tmp_path / SBD, tmp_path, {"benchmark_RELEASE": "b"})


def city(root, kinds=("labelIds",)):
    """Two training and one validation picture as Cityscapes has them: road, sky, and what does not count."""
    for split, name, n in (("train", "aachen", 0), ("train", "bonn", 1), ("val", "ulm", 0)):
        i = f"{name}_00000{n}_000019"
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 128, 3), 90, np.uint8)).save(root / f"leftImg8bit/{split}/{name}/{i}_leftImg8bit.png")
        ids = np.full((64, 128), 7, np.uint8)  # road
        ids[:30], ids[50:] = 23, 4  # sky, static
        for kind in kinds:
            label = ids if kind == "labelIds" else np.where(ids == 7, 0, np.where(ids == 23, 10, 255)).astype(np.uint8)
            Image.fromarray(label).save(root / f"gtFine/{split}/{name}/{i}_gtFine_{kind}.png")
    return root


@pytest.mark.parametrize("kinds", [["labelIds"], ["labelTrainIds"], ["labelIds", "labelTrainIds"]])
def test_cityscapes(tmp_path, capsys, fails, kinds):
    root = city(tmp_path / "city", kinds)
    small = "--backbone efficientnet_lite0 --init none --crop 65 --iters 2 --workers 0 --gpu -1 --split 1".split()
    assert f"python data.py cityscapes --root {root}" in fails("train_base", "--data", root, *small)
    prepare_main("cityscapes", "--root", root)
    assert "train 2 pictures (published: 2,975)" in capsys.readouterr().out
    dataset, _ = data.open_data(str(root))
    assert dataset.train_ids() == ["aachen_000000_000019", "bonn_000001_000019"] and len(dataset.ids("val")) == 1
    assert dataset.classes[0] == "road" and dataset.classes[10] == "sky" and len(dataset.classes) == 19
    assert dataset.palette[:3] == [128, 64, 128] and dataset.defaults["input_scale"] == 0.5
    ids = data.read_label(dataset.samples(dataset.ids("val"))[0][1], (128, 64))
    assert (ids[:30] == 10).all() and (ids[30:50] == 0).all() and (ids[50:] == 255).all()
    import train_base
    out = tmp_path / "out"
    train_base.main(train_base.flags().parse_args(["--data", str(root), *small, "--out", str(out)]))
    assert (out / "best.pt").exists()
    with pytest.raises(SystemExit) as stop:
        prepare_main("check", "--data", root)
    assert stop.value.code == 1 and "has the pixels of aachen_000000_000019 of train" in capsys.readouterr().out
    for f in (root / "gtFine/val").rglob("*.png"):
        f.unlink()
    assert "1 of 1 pictures have no label" in fails("prepare", "cityscapes", "--root", root)


def test_a_cityscapes_id_that_it_has_not(tmp_path):
    root = city(tmp_path)
    file = root / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    Image.fromarray(np.full((64, 128), 34, np.uint8)).save(file)
    with pytest.raises(cli.InputError, match="label value 34 is outside the 19 classes"):
        data.read_label(data.Label(str(file), 19, ()), (128, 64))


def test_camvid(tmp_path, capsys, fails):
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        for folder in (name, f"{name}annot"):
            (tmp_path / "SegNet" / folder).mkdir(parents=True)
        for n in range(count):
            rng = np.random.RandomState(n)
            label = rng.randint(0, 12, (36, 48)).astype(np.uint8)
            Image.fromarray(rng.randint(0, 255, (36, 48, 3), np.uint8)).save(tmp_path / f"SegNet/{name}/{name}{n}.png")
            Image.fromarray(label).save(tmp_path / f"SegNet/{name}annot/{name}{n}.png")
    prepare_main("camvid", "--from", tmp_path / "SegNet", "--root", tmp_path / "camvid")
    prepare_main("camvid", "--from", tmp_path / "SegNet", "--root", tmp_path / "camvid")
    assert "train 3 pictures, val 2 pictures, test 1 pictures, 11 classes" in capsys.readouterr().out
    dataset, _ = data.open_data(str(tmp_path / "camvid"))
    assert dataset.classes == (ROOT / "../shared/camvid/classes.txt").read_text().split() if (
        ROOT / "../shared/camvid").is_dir() else len(dataset.classes) == 11
    path, label = dataset.samples(["train2"])[0]
    old = np.array(Image.open(tmp_path / "SegNet/trainannot/train2.png"))
    assert (data.read_label(label, (48, 36)) == np.where(old == 11, 255, old)).all()
    (tmp_path / "SegNet/trainannot/train2.png").unlink()
    assert "train2 is in only one of train/ and trainannot/" in fails("prepare", "camvid", "--from", tmp_path / "SegNet")
    assert "needs train/, trainannot/" in fails("prepare", "camvid", "--from", tmp_path)


def checked(capsys, root):
    with pytest.raises(SystemExit) as stop:
        prepare_main("check", "--data", root)
    return stop.value.code, capsys.readouterr().out


def test_check(voc, capsys):
    status, said = checked(capsys, voc)
    assert status == 0 and "nothing is wrong" in said and "10 pictures, 10 labels, 4 classes" in said and "96x80 10" in said
    labels = [np.array(Image.open(voc / f"SegmentationClassAug/train{n}.png")) for n in range(8)]
    share = 100 * np.mean([label == 2 for label in labels])
    assert [line.split()[:3] for line in said.splitlines() if "green" in line] == [["2", "green", f"{share:.2f}"]]


@pytest.mark.parametrize("kind,say", [
    ("picture", "bad files: {voc}/JPEGImages/train3.png: cannot be read"),
    ("value", "bad files: {voc}/SegmentationClassAug/train3.png: label value 9 is outside the 4 classes"),
    ("size", "bad files: {voc}/SegmentationClassAug/train3.png: the label is 5x5, its picture 96x80"),
    ("missing", "in a list, but not there: {voc}/JPEGImages/train3"),
    ("unlabelled", "in a list, but not there: {voc}/SegmentationClassAug/train3"),
    ("orphan", "label without a picture: {voc}/SegmentationClassAug/nobody.png"),
    ("same id", "both in train and val: train3"),
    ("same pixels", "both in train and val: val1 of val has the pixels of train3"),
])
def test_check_finds(voc, capsys, kind, say):
    picture, label = voc / "JPEGImages/train3.png", voc / "SegmentationClassAug/train3.png"
    if kind == "picture":
        picture.write_bytes(picture.read_bytes()[:100])
    elif kind == "value":
        Image.fromarray(np.full((80, 96), 9, np.uint8)).save(label)
    elif kind == "size":
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(label)
    elif kind in ("missing", "unlabelled"):
        label.unlink()
        if kind == "missing":
            picture.unlink()
    elif kind == "orphan":
        shutil.copy(label, label.with_name("nobody.png"))
    elif kind == "same id":
        (voc / "ImageSets/Segmentation/val.txt").write_text("val0\ntrain3\n")
    else:
        Image.open(picture).save(voc / "JPEGImages/val1.png", compress_level=0)
    status, said = checked(capsys, voc)
    assert status == 1 and "wrong, " + say.format(voc=voc) in said and "nothing is wrong" not in said


def test_split(voc, capsys, tmp_path, train):
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(f"train{n}" for n in range(8)))
    (voc / "ImageSets/Segmentation/train.txt").write_text("train0\ntrain1\ntrain2")
    prepare_main("split", "--data", voc, "--split", "0.3", "--out", tmp_path)
    said = capsys.readouterr().out
    labelled, unlabelled = (data.read_ids(tmp_path / f"{kind}_0.3_seed0.txt") for kind in ("labelled", "unlabelled"))
    assert (labelled, unlabelled) == data.split_ids([f"train{n}" for n in range(8)], 0.3, 0) and len(labelled) == 2
    assert said.splitlines()[:8] == labelled + unlabelled
    assert "0.3 of the 8 pictures of the training list, 2.4 rounded to 2" in said
    assert f"{len(set(labelled) & {'train0', 'train1', 'train2'})} of the labelled are of the 3 in train.txt" in said
    prepare_main("split", "--data", voc, "--split", "0.5", "--list", "train", "--split-seed", 3)
    assert "0.5 of the 3 pictures of train, 1.5 rounded to 2" in capsys.readouterr().out
    list_3 = voc / "ImageSets/Segmentation/labelled_train_0.5_seed3.txt"
    out = train("train_base", "--labelled-ids", list_3)
    assert (out / "labelled.txt").read_text() == list_3.read_text()


def test_bench(voc, capsys):
    prepare_main("bench", "--data", voc, "--pictures", 8, "--rounds", 1, "--crop", 65)
    said = capsys.readouterr().out
    assert said.count("data.py is ") == 2 and said.count("pictures/s") == 3


def test_the_bench_compares_like_with_like(voc):
    """Each gives crops of one size, scaled within the same bounds, where colours tell the class."""
    import argparse
    dataset, _ = data.open_data(str(voc))
    samples = dataset.samples(dataset.train_ids())
    for scale in ((1, 1), (0.3, 0.5)):
        settings = argparse.Namespace(crop=65, scale=scale, input_scale=1, seed=0, drop_last=False, batch_size=1)
        for stream in (data.Stream(samples, settings, "x"), prepare.Torchvision(samples, (96, 80), settings, True),
                       prepare.Torchvision(samples, (96, 80), settings, False)):
            for n in range(30):
                pixels, ids = (np.asarray(x) for x in stream[n])
                pixels = pixels if pixels.shape[2] == 3 else pixels.transpose(1, 2, 0)
                assert pixels.shape == (65, 65, 3) and ids.shape == (65, 65)
                padded = (pixels == data.PADDING).all(2).mean()
                if scale == (1, 1):
                    known = ids != 255
                    assert (pixels[known] == COLOURS[ids[known]]).all() and padded == 0
                else:
                    assert 1 - 48 * 40 / 65**2 - 0.01 <= padded <= 1 - 29 * 24 / 65**2 + 0.01


def test_wrong_commands(fails, tmp_path):
    assert "--split 2.0: it is the labelled fraction" in fails("prepare", "split", "--data", "shapes", "--split", 2)
    assert "required: COMMAND" in fails("prepare")
    assert "invalid choice: 'vok'" in fails("prepare", "vok")
    assert "unrecognized arguments: --root" in fails("prepare", "check", "--root", "x")
    assert f"--data {tmp_path}: no data there" in fails("prepare", "check", "--data", tmp_path)
    assert f"--root {tmp_path}: needs the folders leftImg8bit and gtFine" in fails("prepare", "cityscapes", "--root", tmp_path)
