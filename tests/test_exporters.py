"""predict.py --format and --min-confidence: what annotation tools get is what prepare.py import reads back."""
import json
import zipfile

from common import distributed, exporters, label_formats, layouts

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import data
import model
import predict
from csrc import ops

CLASSES = ["background", "class 1", "zebra crossing", "a#b"]
ENDS = {"cvat": ".zip", "coco": ".json"}


def write_images(folder):
    """Write images of blocks with names as people have them, one turned by EXIF, one in a subfolder."""
    (folder / "deep").mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    for n, name in enumerate(("a b.c.jpg", "deep/ä_mask.png", "turned.png", "x.jpg")):
        pixels = np.random.RandomState(n).randint(0, 255, (5, 6 + n, 3), np.uint8).repeat(19, 0).repeat(17, 1)
        Image.fromarray(pixels).save(folder / name, **({"exif": turned} if n == 2 else {}))
    return folder


def read_labels(root):
    """Return {id: label map} of the data set in `root`, and its class names."""
    dataset = layouts.open_dataset(str(root))
    return {i: np.array(Image.open(file)) for i, file in dataset.labels.items()}, dataset.classes


@pytest.mark.parametrize("limit", [None, 0.35])
@pytest.mark.parametrize("kind", ENDS)
def test_predictions_come_back(trained, tmp_path, kind, limit):
    """To the pixel and by name; with --min-confidence, CVAT's void is 255 and COCO's gaps are class 0."""
    words = ["--ckpt", trained["train_base"] / "last.pt", "--gpu", -1, write_images(tmp_path / "photos")]
    words += [] if limit is None else ["--min-confidence", limit]
    call("predict", *words, "--out", tmp_path / "palette")
    expected = {f.stem: np.array(Image.open(f)) for f in (tmp_path / "palette").iterdir() if f.stem != "legend"}
    seen = set(np.concatenate([ids.ravel() for ids in expected.values()]).tolist())
    assert len(seen - {255}) > 1 and (255 in seen) == (limit is not None)
    call("predict", *words, "--out", out := tmp_path / f"new/job{ENDS[kind]}", "--format", kind)
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    if kind == "coco":
        names = [image["file_name"] for image in json.loads(out.read_text())["images"]]
        assert sorted(names) == sorted(f.name for f in (tmp_path / "photos").rglob("*.*"))
    zero = ["--background", "grey"] if kind == "coco" else []
    call("prepare", "import", out, tmp_path / "photos", "--out", tmp_path / "mine", *zero)
    found, classes = read_labels(tmp_path / "mine")
    assert classes == ["grey", "red", "green", "blue"] and found.keys() == expected.keys()
    for i, ids in expected.items():
        ids[ids == 255] = 0 if kind == "coco" else 255
        assert np.array_equal(found[i], ids), i


@pytest.mark.quick
@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("colours", [
    [(0, 0, 0), (9, 8, 7), (200, 0, 0), (0, 0, 200)], [(0, 0, 0), (9, 8, 7), (9, 8, 7), (1, 2, 3)],
    [(0, 0, 0), (224, 224, 192), (7, 7, 7), (1, 1, 1)]], ids=["own", "one colour twice", "the colour of void"])
def test_label_maps_come_back(tmp_path, kind, colours):
    """Of classes whose colours are not clear, of background alone, of a class in one pixel, of void in the corners."""
    rng, paths, labels = np.random.RandomState(0), [], []
    palette = [x for colour in colours for x in colour] + layouts.voc_palette()[12:]
    maps = [rng.choice(4, (13, 7)), np.zeros((5, 9)), np.pad([[3]], ((4, 0), (0, 6))), np.full((1, 1), 2),
            rng.choice(4, (6, 8)).repeat(5, 0).repeat(5, 1)]
    maps += [np.pad(maps[-1][:-1, 1:-1], 1, constant_values=255)] * (kind == "cvat")
    (tmp_path / "images").mkdir()
    for n, ids in enumerate(maps):
        paths.append(tmp_path / f"images/{n}.png")
        Image.fromarray(rng.randint(0, 255, (*ids.shape, 3), np.uint8)).save(paths[-1])
        labels.append(tmp_path / f"labels/{n}.png")
        image = predict.palette_image(ids.astype(np.uint8), ids.shape[::-1], palette)
        exporters.write_atomically(labels[-1], lambda f: image.save(f, "PNG"))
    out = tmp_path / f"job{ENDS[kind]}"
    exporters.WRITERS[kind](out, paths, labels, CLASSES, palette)
    call("prepare", "import", out, tmp_path / "images", "--out", tmp_path / "mine")
    found, classes = read_labels(tmp_path / "mine")
    assert classes == CLASSES
    assert all(np.array_equal(found[str(n)], ids) for n, ids in enumerate(maps))
    if kind == "cvat" and colours[3] == (0, 0, 200):
        with zipfile.ZipFile(out) as archive:
            lines = archive.read("labelmap.txt").decode().split("\n")
            assert lines[2] == "class 1:9,8,7::" and lines[5:] == ["void:224,224,192::", ""]
            assert archive.read("ImageSets/Segmentation/default.txt") == b"0\n1\n2\n3\n4\n5\n"
            with archive.open("SegmentationClass/0.png") as file:
                assert Image.open(file).mode == "RGB"  # of a palette PNG, CVAT may take the indices


@pytest.mark.quick
def test_coco_annotations():
    """One for each class: run lengths down the columns, area, and the box that encloses it; none for 255."""
    ids = np.array([[0, 0, 255, 5], [0, 5, 5, 255], [255, 255, 5, 255]], np.uint8)
    zero, five = exporters.coco_annotations(ids)
    assert zero["segmentation"] == {"counts": [0, 2, 1, 1, 8], "size": [3, 4]} and five["category_id"] == 6
    assert (zero["area"], zero["bbox"], five["area"], five["bbox"]) == (3, [0, 0, 2, 2], 4, [1, 0, 3, 3])
    assert zero["iscrowd"] == five["iscrowd"] == 1
    assert label_formats.decode_rle(*five["segmentation"].values(), (4, 3)).tolist() == (ids == 5).tolist()
    json.dumps([zero, five])  # of plain numbers
    assert not list(exporters.coco_annotations(np.full((2, 2), 255, np.uint8)))


@pytest.mark.parametrize("flags", [[], ["--window", 65], ["--tta"]])
def test_min_confidence(trained, tmp_path, capsys, flags):
    """255 where the softmax of the logits is not above it, also of windows and views; the share; COCO's gaps."""
    ckpt, photo = trained["train_base"] / "last.pt", write_images(tmp_path / "photos") / "turned.png"
    seg, image = model.load_segmenter(ckpt), data.read_image(photo)
    pixels, size = data.pad_to_stride(image, seg.stride, seg.input_scale)
    with torch.inference_mode():
        window = 65 if "--window" in flags else predict.WINDOW
        logits = predict.predict_logits(seg, pixels[None], None, window, "--tta" in flags)
        highest, ids = ops.upsample_softmax_reference(logits, size)[0, :, :image.height, :image.width].max(0)
    limit = highest.median().item()
    words = "--ckpt", ckpt, "--gpu", -1, photo, "--min-confidence", limit, *flags
    call("predict", *words, "--out", tmp_path / "out")
    got, share = np.array(Image.open(tmp_path / "out/turned.png")), capsys.readouterr().out
    clear = ((highest - limit).abs() > 1e-4).numpy()
    assert clear.mean() > 0.9 and 0.4 < (got == 255).mean() < 0.6
    assert np.array_equal(got[clear], np.where(highest > limit, ids, 255)[clear])
    assert f"{100 * (got == 255).mean():.1f} % of the pixels unlabelled" in share
    call("predict", *words, "--out", tmp_path / "job.json", "--format", "coco")
    annotations = json.loads((tmp_path / "job.json").read_text())["annotations"]
    assert {a["category_id"] - 1: a["area"] for a in annotations} == {
        k: (got == k).sum() for k in np.unique(got[got < 255]).tolist()}


def test_one_file_of_all_ranks(trained, tmp_path, monkeypatch):
    """Each rank predicts its images; the first waits for the others, and writes all in their order."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "init_device", lambda gpu: torch.device("cpu"))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: None)
    words = "--ckpt", trained["train_base"] / "last.pt", "--gpu", -1, write_images(tmp_path / "photos")
    (tmp_path / "photos/x.jpg").rename(tmp_path / "photos/legend.jpg")  # a name that only --format palette refuses
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "RANK", rank)
        assert not (tmp_path / "new/job.zip").exists()
        call("predict", *words, "--out", tmp_path / "new/job.zip", "--format", "cvat")
    with zipfile.ZipFile(tmp_path / "new/job.zip") as archive:
        stems = ["a b.c", "ä_mask", "legend", "turned"]  # sorted by their paths
        assert archive.namelist()[:4] == [f"SegmentationClass/{stem}.png" for stem in stems]
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_what_is_refused(trained, tmp_path, fails, monkeypatch):
    """In one line, with nothing written, before the images are predicted if that tells."""
    photos, new, ckpt = write_images(tmp_path / "photos"), tmp_path / "new", trained["train_base"] / "last.pt"
    new.mkdir()

    def refused(*words, images=photos, ckpt=ckpt):
        error = fails("predict", "--ckpt", ckpt, "--gpu", -1, images, *words)
        assert not list(new.iterdir())
        return error

    for kind, end in ENDS.items():
        for file in (new, new / "a.png"):
            assert end in refused("--format", kind, "--out", file)
        for name in ("file", "folder"):
            (tmp_path / name).mkdir()
            taken = (tmp_path / name).rename(tmp_path / f"{name}{end}")
            if name == "file":
                taken.rmdir()
                taken.write_text("corrected by hand")
            assert "exists" in refused("--format", kind, "--out", taken)
            assert name == "folder" or taken.read_text() == "corrected by hand"
        words = "--format", kind, "--out", new / f"a{end}"
        assert "--blend" in refused(*words, "--blend")
        Image.new("RGB", (70, 70)).save(photos / "turned.jpg")
        assert "turned.png" in refused(*words)
        (photos / "turned.jpg").unlink()
        (photos / "x.jpg").write_bytes(b"no image")  # the last one
        assert "x.jpg" in refused(*words)
        (photos / "x.jpg").unlink()
        monkeypatch.setattr(exporters.Image, "open", lambda file: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exporters.WRITERS[kind](new / f"a{end}", [photos], [photos], CLASSES, layouts.voc_palette())
        monkeypatch.undo()
        assert not list(new.iterdir())
    for value in (1, -0.1, "high"):
        assert "--min-confidence" in refused("--out", new / "out", "--min-confidence", value)
    for name in ("car, red", "car:red", "# cars"):
        content = torch.load(ckpt, weights_only=True)
        content["classes"] = ["grey", name, "green", "blue"]
        torch.save(content, named := tmp_path / "named.pt")
        assert repr(name) in refused("--format", "cvat", "--out", new / "a.zip", ckpt=named)
    call("predict", "--ckpt", named, "--gpu", -1, photos, "--format", "coco", "--out", new / "a.json")
    assert json.loads((new / "a.json").read_text())["categories"][1]["name"] == "# cars"
