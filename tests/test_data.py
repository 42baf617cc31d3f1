import shutil

import numpy as np
import pytest
import torch
from conftest import COLOURS
from PIL import Image

import cli
import data


def settings(crop=65, scale=(0.5, 1.5), seed=0, input_scale=1):
    import argparse
    return argparse.Namespace(crop=crop, scale=scale, seed=seed, input_scale=input_scale, drop_last=False, batch_size=2)


def stream(voc, labelled=True, name="labelled", **kw):
    dataset, _ = data.open_data(str(voc))
    return data.Stream(dataset.samples(dataset.train_ids(), labelled), 4, settings(**kw), name)


def test_open(voc):
    dataset, note = data.open_data(str(voc))
    assert dataset.classes == ["grey", "red", "green", "blue"] and not note
    assert len(dataset.train_ids()) == 8 and len(dataset.ids("val")) == 2  # the last id has no newline behind it
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("train3\n\n train1 \r\n")
    assert dataset.train_ids() == ["train3", "train1"]
    (voc / "classes.txt").write_text("sky 1 2 3\nfire hydrant\nroad 4 5 6\ncar\n")
    dataset, _ = data.open_data(str(voc))
    assert dataset.classes == ["sky", "fire hydrant", "road", "car"] and dataset.palette[:9] == [1, 2, 3, 128, 0, 0, 4, 5, 6]
    (voc / "classes.txt").unlink()
    assert len(data.open_data(str(voc))[0].classes) == 21


def test_voc_palette():
    p = np.reshape(data.voc_palette(), (256, 3)).tolist()
    assert p[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]] and p[20] == [0, 64, 128] and p[255] == [224, 224, 192]


def test_split_is_nested_and_seeded():
    ids = [f"p{n}" for n in range(10582)]
    parts = [data.split_ids(ids, f, 0)[0] for f in (1 / 8, 1 / 4, 1 / 2, 1)]
    assert [len(p) for p in parts] == [1323, 2646, 5291, 10582]  # round(), so 1322.75 is 1323 and 2645.5 is 2646
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    labelled, unlabelled = data.split_ids(ids, 1 / 8, 0)
    assert sorted(labelled + unlabelled) == sorted(ids) and not set(labelled) & set(unlabelled)
    assert set(data.split_ids(ids[::-1], 1 / 8, 0)[0]) == set(labelled)
    assert len(set(data.split_ids(ids, 1 / 8, 1)[0]) & set(labelled)) < 300


def test_labelled_ids(voc, tmp_path):
    (tmp_path / "mine.txt").write_text("train2\ntrain0")
    labelled, unlabelled = data.split_ids([f"train{n}" for n in range(8)], 0.9, 0, tmp_path / "mine.txt")
    assert labelled == ["train0", "train2"] and len(unlabelled) == 6


def test_picture_and_label_stay_together(voc):
    """Every class has its own colour: away from block edges the transformed picture must show the transformed label's."""
    s, seen = stream(voc), 0
    for n in range(60):
        picture, target = s[n]
        ids = target.numpy()
        inner = np.ones_like(ids, bool)
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                inner &= np.roll(ids, (dy, dx), (0, 1)) == ids
        inner[:3], inner[-3:], inner[:, :3], inner[:, -3:] = False, False, False, False
        known = inner & (ids != 255)
        assert (picture.permute(1, 2, 0).numpy()[known] == COLOURS[ids[known]]).all()
        assert set(np.unique(ids)) <= {0, 1, 2, 3, 255}
        seen += known.sum()
    assert seen > 20000


def test_transform_covers_what_it_should(voc):
    draws = [data.random_geometry((96, 80), 65, (0.5, 1.5), data.random.Random(n)) for n in range(300)]
    assert {flip for *_, flip in draws} == {True, False}
    factors = [size[0] / (box[2] - box[0]) for box, size, _ in draws]
    assert 0.5 <= min(factors) < 0.55 and 1.45 < max(factors) <= 1.51
    assert all(0 <= b[0] < b[2] <= 96 and 0 <= b[1] < b[3] <= 80 for b, *_ in draws)
    assert len({b[:2] for b, *_ in draws}) > 150


def test_scale_one_is_a_plain_crop(voc):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (80, 96, 3), np.uint8))
    for n in range(20):
        box, size, flip = data.random_geometry(image.size, 65, (1, 1), data.random.Random(n))
        x, y = int(box[0]), int(box[1])
        want = np.asarray(image)[y:y + 65, x:x + 65]
        got = data.place(image, (box, size, flip), 65, Image.Resampling.BILINEAR, 0)
        assert (got == (want[:, ::-1] if flip else want)).all()


def test_a_draw_hangs_on_seed_stream_and_number_alone(voc):
    a, b = stream(voc), stream(voc)
    wanted = {n: a[n] for n in (0, 5, 100, 12345)}
    for n in (12345, 0, 100, 5):  # in another order, after other draws
        b[n + 7]
        assert all(torch.equal(x, y) for x, y in zip(b[n], wanted[n]))
    for other in (stream(voc, name="unlabelled"), stream(voc, seed=1)):
        assert not all(torch.equal(other[n][0], wanted[n][0]) for n in wanted)


def test_an_epoch_shows_every_picture_once(voc):
    s = stream(voc)
    orders = []
    for epoch in range(3):
        orders.append([])
        for n in range(8 * epoch, 8 * epoch + 8):
            s[n]
            orders[-1].append(s.order[1][n % 8])
    assert all(sorted(o) == list(range(8)) for o in orders) and orders[0] != orders[1]


def test_batches_do_not_hang_on_workers_or_start(voc):
    def take(workers, start):
        return list(data.batches(stream(voc), 2, start, 4, workers, torch.device("cpu")))
    want = take(0, 0)
    assert len(want) == 4
    for workers, start in ((1, 0), (2, 0), (2, 2)):
        for (x, y), (p, t) in zip(take(workers, start), want[start:], strict=True):
            assert torch.equal(x, p) and torch.equal(y, t)


def test_unlabelled_stream_needs_no_label_files(voc, monkeypatch):
    shutil.rmtree(voc / "SegmentationClassAug")
    (voc / "SegmentationClassAug").mkdir()
    Image.new("L", (96, 80)).save(voc / "SegmentationClassAug/val0.png")
    monkeypatch.setattr(data, "read_label", None)
    s = stream(voc, labelled=False, name="unlabelled", scale=(0.3, 0.9))
    padded = 0
    for n in range(20):
        picture, valid = s[n]
        assert picture.shape == (3, 65, 65) and valid.dtype == torch.bool
        grey = (picture == torch.tensor(data.PADDING, dtype=torch.uint8)[:, None, None]).all(0)
        assert grey[~valid].all() and not grey[valid].any()
        padded += (~valid).sum()
    assert padded > 0


def test_padding_of_labelled_draws_is_void(voc):
    for n, (picture, target) in enumerate(map(stream(voc, scale=(0.3, 0.5)).__getitem__, range(10))):
        grey = (picture == torch.tensor(data.PADDING, dtype=torch.uint8)[:, None, None]).all(0)
        assert (target[grey] == 255).all() and grey.any(), n


def test_input_scale_shrinks_what_the_net_sees(voc):
    a, b = stream(voc, scale=(0.4, 0.5)), stream(voc, scale=(0.8, 1.0), input_scale=0.5)
    assert all(torch.equal(x, y) for x, y in zip(a[3], b[3]))


def test_evaluation_pads_right_and_below(voc):
    dataset, _ = data.open_data(str(voc))
    picture, target = data.Whole(dataset.samples(["val0"]), 4, 16)[0]
    assert picture.shape == (3, 81, 97) and target.shape == (81, 97)
    assert (target[80:] == 255).all() and (target[:, 96:] == 255).all() and (target[40:80, :96] != 255).all()
    assert (target[:80, :96].numpy() == np.asarray(Image.open(voc / "SegmentationClassAug/val0.png"))).all()


def test_shapes_and_the_bare_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, note = data.open_data(None)
    assert dataset.name == "shapes" and "data/VOC2012 is not there" in note and "python data.py voc" in note
    with pytest.raises(cli.InputError, match="--data data/VOC2012: no data there"):
        data.open_data("data/VOC2012")
    train, val = dataset.train_ids(), dataset.ids("val")
    assert len(train) == 400 and len(val) == 100
    counts = np.zeros(256, int)
    for picture, label in dataset.samples(train[:100] + val):
        size = data.read_picture(picture).size
        counts += np.bincount(np.asarray(data.read_label(label, 6, size)).ravel(), minlength=256)
    assert size == (128, 128) and (counts[:6] > 0.01 * counts.sum()).all() and 0.02 < counts[255] / counts.sum() < 0.3
    again = data.draw_shapes(np.random.RandomState(5))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(again, data.draw_shapes(np.random.RandomState(5))))
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["shapes"]  # nothing half-made beside it


def spoil(kind, path):
    label = np.zeros((80, 96), np.uint8)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "unreadable":
        path.write_text("no picture")
    elif kind == "outside":
        label[5, 5] = 4
        Image.fromarray(label).save(path)
    elif kind == "size":
        Image.fromarray(label[:-1]).save(path)
    elif kind == "16 bit":
        Image.fromarray(label.astype(np.uint16)).save(path)
    else:
        Image.fromarray(label).convert(kind).save(path)


@pytest.mark.parametrize("folder,kind,say", [
    ("JPEGImages", "missing", "not there"), ("JPEGImages", "truncated", "cannot be read"),
    ("JPEGImages", "unreadable", "cannot be read"), ("SegmentationClassAug", "missing", "not there"),
    ("SegmentationClassAug", "truncated", "cannot be read"), ("SegmentationClassAug", "unreadable", "cannot be read"),
    ("SegmentationClassAug", "outside", "label value 4 is outside the 4 classes"),
    ("SegmentationClassAug", "size", "96x79, its picture 96x80"), ("SegmentationClassAug", "16 bit", "index picture"),
    ("SegmentationClassAug", "RGB", "index picture"), ("SegmentationClassAug", "RGBA", "index picture"),
])
def test_bad_files_are_named(voc, tmp_path, fails, folder, kind, say):
    """In training (all ids labelled, so the first epoch finds it) and in evaluation."""
    from conftest import SMALL
    for i, done in (("train0", False), ("val1", kind != "missing")):
        path = voc / folder / f"{i}.png"
        good = path.read_bytes()
        spoil(kind, path)
        error = fails("train_base", "--data", voc, *SMALL, "--iters", 4, "--split", 1, "--batch-size", 8, "--out", tmp_path / i)
        assert str(path).replace(".png", "") in error and say in error
        assert not list((tmp_path / i).glob("*.part")) and (tmp_path / i / "last.pt").exists() == done
        path.write_bytes(good)

