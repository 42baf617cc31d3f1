import shutil

import numpy as np
import pytest
import torch
from conftest import COLOURS, SMALL
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

import data
from common import console, distributed, layouts


def stream(voc, labelled=True, name="labelled", seed=0, crop=65, **more):
    dataset = layouts.open_dataset(str(voc))
    return data.TrainDataset(dataset.samples(dataset.train_ids(), labelled), name, seed, crop, **more)


def test_transform_covers_what_it_should():
    draws = []
    for n in range(300):
        draw = data.random.Random(n)
        factor = draw.uniform(0.5, 1.5)
        draws.append((factor, *data.random_geometry((96, 80), 65, factor, draw)))
    assert {flip for *_, flip in draws} == {True, False}
    for factor, box, size, _ in draws:
        assert abs(size[0] / factor - (box[2] - box[0])) <= 1 and abs(size[1] / factor - (box[3] - box[1])) <= 1
        assert 0 <= box[0] < box[2] <= 96 and 0 <= box[1] < box[3] <= 80 and max(size) <= 65
    assert len({box[:2] for _, box, *_ in draws}) > 150


@pytest.mark.quick
def test_scale_one_is_a_plain_crop():
    image, ids = (np.random.RandomState(0).randint(0, 255, shape, np.uint8) for shape in ((80, 96, 3), (80, 96)))
    for n in range(20):
        (x, y, _, _), size, flip = geometry = data.random_geometry((96, 80), 65, 1, data.random.Random(n))
        assert size == (65, 65)
        got = data.place_image(Image.fromarray(image), geometry, torch.zeros(65, 65, 3, dtype=torch.uint8))
        for whole, part in ((image, got), (ids, data.place_label(ids, geometry, 65))):
            want = whole[y:y + 65, x:x + 65]
            assert (part.numpy() == (want[:, ::-1] if flip else want)).all()


def test_a_third_is_the_middle_of_three():
    ids = np.arange(99, dtype=np.uint8)[None].repeat(81, 0)
    geometry = data.random_geometry((99, 81), 65, 1 / 3, data.random.Random(1))
    want = ids[1::3, 1::3][:, ::-1 if geometry[2] else 1]
    assert geometry[1] == (33, 27) and (data.place_label(ids, geometry, 65).numpy()[:27, :33] == want).all()
    image = Image.fromarray(np.stack([ids] * 3, 2))
    pixels = data.place_image(image, geometry, torch.zeros(65, 65, 3, dtype=torch.uint8))
    assert (pixels[:27, 1:32, 0].numpy() == want[:, 1:-1]).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@examples(max_examples=60, deadline=None)
@given(w=st.integers(1, 250), h=st.integers(1, 250), low=st.floats(0.1, 1.5), more=st.floats(1, 2),
       crop=st.integers(65, 129), n=st.integers(0, 10**6), suffix=st.sampled_from(["png", "jpg"]))
def test_image_and_label_show_the_same_place(folder, w, h, low, more, crop, n, suffix):
    """Red and green of the image are the column and the row, two labels are too: after any draw they still agree."""
    y, x = np.mgrid[:h, :w].astype(np.uint8)
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], 2)).save(folder / f"p.{suffix}", quality=98, subsampling=0)
    scale, drawn = (low, low * more), []
    for name, ids in (("columns", x), ("rows", y)):
        Image.fromarray(ids).save(folder / f"{name}.png")
        label = layouts.Label(str(folder / f"{name}.png"), 251, ())
        sample = layouts.Sample("p", str(folder / f"p.{suffix}"), label)
        drawn.append(data.TrainDataset([sample], "property", n, crop, scale)[n])
    (image, columns), (again, rows) = drawn
    inside = (columns != 255).numpy()
    assert torch.equal(image, again) and ((columns != 255) == (rows != 255)).all() and inside[0, 0]
    assert (image.numpy()[~inside] == data.PADDING).all()
    # bilinear and nearest differ by half an output pixel, a cut-off antialiasing kernel by another, a JPEG rounds
    allowed = 1.6 + 1.1 / low + 5 * (suffix == "jpg")
    for channel, ids in ((0, columns), (1, rows)):
        error = np.abs(image.numpy()[..., channel].astype(int) - ids.numpy())[inside]
        assert error.max() <= allowed, (error.max(), allowed)


@examples(max_examples=60, deadline=None)
@given(w=st.integers(1, 80), h=st.integers(1, 80), factor=st.floats(0.1, 3), classes=st.integers(2, 255),
       n=st.integers(0, 10**6))
def test_labels_gain_no_value_and_keep_void(w, h, factor, classes, n):
    """A transformed label shows values that it had, 255 among them, and new names for them change nothing else."""
    rng, draw = np.random.RandomState(n), data.random.Random(n)
    ids = rng.choice([*range(classes), 255], (h, w)).astype(np.uint8)
    names = np.append(rng.permutation(255), 255).astype(np.uint8)
    geometry = data.random_geometry((w, h), 65, factor, draw)
    got, renamed = (data.place_label(i, geometry, 65).numpy() for i in (ids, names[ids]))
    (left, top, right, bottom), (ow, oh), _ = geometry
    box = ids[top:bottom, left:right]
    assert set(got[:oh, :ow].flat) <= set(box.flat) and (got[oh:] == 255).all() and (got[:, ow:] == 255).all()
    assert (renamed == names[got]).all()
    if factor >= 1 and max(ow, oh) < 65:  # all of it, enlarged: every value survives
        assert set(got[:oh, :ow].flat) == set(ids.flat)


@examples(max_examples=20, deadline=None)
@given(colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=3, max_size=20, unique=True),
       n=st.integers(0, 10**6), mode=st.sampled_from(["RGB", "RGBA"]))
def test_colour_labels_are_the_ids_they_stand_for(folder, colours, n, mode):
    """The last colour is void; a image in colours reads as the ids it was drawn from."""
    *classes, void = colours
    (folder / "classes.txt").write_text("".join(f"class {i} {r} {g} {b}\n" for i, (r, g, b) in enumerate(classes))
                                        + "void {} {} {}\n".format(*void))
    names, palette, codes = layouts.read_classes(folder / "classes.txt")
    assert names == [f"class {i}" for i in range(len(classes))] and palette[:3 * len(classes)] == list(sum(classes, ()))
    ids = np.random.RandomState(n).randint(0, len(colours), (9, 7))
    Image.fromarray(np.array(colours, np.uint8)[ids]).convert(mode).save(folder / "label.png")
    got = data.read_label(layouts.Label(str(folder / "label.png"), len(names), codes), (7, 9))
    assert (got == np.where(ids == len(classes), 255, ids)).all() and got.dtype == np.uint8


def test_colour_labels_that_cannot_be_read(tmp_path):
    Image.fromarray(COLOURS[None]).save(tmp_path / "label.png")
    for lines, say in (("a 40 40 40\nb 220 60 60\nc 60 200 60\n", "colour 60 60 220 is no class's"),
                       ("a 40 40 40\nb\n", "classes.txt gives each"), ("a 1 2 3\nb 1 2 3\n", "classes.txt gives each")):
        (tmp_path / "classes.txt").write_text(lines)
        names, _, colours = layouts.read_classes(tmp_path / "classes.txt")
        with pytest.raises(console.InputError, match=say):
            data.read_label(layouts.Label(str(tmp_path / "label.png"), len(names), colours), (4, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_other_modes(tmp_path, mode):
    file = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    grey = np.random.RandomState(0).randint(0, 255, (9, 13), np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(np.stack([grey] * 3, 2)).convert(mode)
    image.save(file)
    got = data.read_image(str(file))
    assert got.mode == "RGB" and got.size == (104, 72)
    assert np.abs(np.subtract(got, image.convert("RGB"), dtype=int)).max() <= (8 if mode == "CMYK" else 0)


def test_images_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((90, 131), 40000, np.uint16)).save(tmp_path / "p.png")
    with pytest.raises(console.InputError, match="mode I;16: convert it to 8 bits a channel"):
        data.read_image(str(tmp_path / "p.png"))


def test_colours_that_pass_for_indices(tmp_path):
    """Colour labels saved with a palette, and masks of 0 and 255: an error, not swapped or lost classes."""
    (tmp_path / "classes.txt").write_text("ground 0 0 0\nroad 10 20 30\ncar 255 255 255\n")
    names, palette, colours = layouts.read_classes(tmp_path / "classes.txt")
    label = layouts.Label(str(tmp_path / "label.png"), 3, colours)
    rgb = Image.fromarray(np.array([[(255, 255, 255), (10, 20, 30)], [(0, 0, 0), (0, 0, 0)]], np.uint8))
    rgb.save(label.path)
    assert data.read_label(label, (2, 2)).tolist() == [[2, 1], [0, 0]]
    index = Image.fromarray(np.array([[2, 1], [0, 0]], np.uint8)).convert("P")
    index.putpalette(palette)
    index.save(label.path)
    assert data.read_label(label, (2, 2)).tolist() == [[2, 1], [0, 0]]
    swapped = Image.fromarray(np.array([[0, 2], [1, 1]], np.uint8)).convert("P")
    swapped.putpalette([255, 255, 255, 0, 0, 0, 10, 20, 30])
    for image in (swapped, Image.fromarray(np.array([[255, 1], [0, 0]], np.uint8))):
        image.save(label.path)
        with pytest.raises(console.InputError, match="value (0|255) has the colour 255 255 255"):
            data.read_label(label, (2, 2))


@pytest.mark.quick
def test_a_draw_hangs_on_seed_stream_and_number_alone(voc):
    a, b = stream(voc), stream(voc)
    wanted = {n: a[n] for n in (0, 5, 100, 12345)}
    for n in (12345, 0, 100, 5):  # in another order, after other draws
        b[n + 7]
        assert all(torch.equal(x, y) for x, y in zip(b[n], wanted[n]))
    for other in (stream(voc, name="unlabelled"), stream(voc, seed=1)):
        assert not all(torch.equal(other[n][0], wanted[n][0]) for n in wanted)


def test_an_epoch_shows_every_image_once(voc):
    s = stream(voc)
    orders = []
    for epoch in range(3):
        orders.append([])
        for n in range(8 * epoch, 8 * epoch + 8):
            s[n]
            orders[-1].append(s.order[1][n % 8])
    assert all(sorted(o) == list(range(8)) for o in orders) and orders[0] != orders[1]


@pytest.mark.quick
def test_batches_depend_on_neither_workers_nor_start_nor_ranks(voc, monkeypatch):
    def take(workers, start):
        dataset = layouts.open_dataset(str(voc))
        return list(data.batches(
            dataset.samples(dataset.train_ids()), "labelled", seed=0, batch_size=2, iters=4, crop=65, scale=(0.5, 1.5),
            input_scale=1, workers=workers, start=start, device=torch.device("cpu")))
    want = take(0, 0)
    assert len(want) == 4
    for workers, start in ((1, 0), (2, 0), (2, 2)):
        for (x, y), (p, t) in zip(take(workers, start), want[start:], strict=True):
            assert torch.equal(x, p) and torch.equal(y, t)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "RANK", rank)
        ranks.append(take(0, 0))
    for (x, _), (y, _), (whole, _) in zip(*ranks, want, strict=True):
        assert torch.equal(torch.cat([x, y]), whole)


def test_unlabelled_stream_needs_no_label_files(voc, monkeypatch):
    shutil.rmtree(voc / "SegmentationClassAug")
    (voc / "SegmentationClassAug").mkdir()
    Image.new("L", (96, 80)).save(voc / "SegmentationClassAug/val0.png")
    monkeypatch.setattr(data, "read_label", None)
    s = stream(voc, labelled=False, name="unlabelled", scale=(0.3, 0.9))
    padded = 0
    for n in range(20):
        image, valid = s[n]
        assert image.shape == (65, 65, 3) and valid.dtype == torch.bool
        grey = (image == torch.tensor(data.PADDING, dtype=torch.uint8)).all(2)
        assert grey[~valid].all() and not grey[valid].any()
        padded += (~valid).sum()
    assert padded > 0


def test_input_scale_shrinks_what_the_net_sees(voc):
    a, b = stream(voc, scale=(0.4, 0.5)), stream(voc, scale=(0.8, 1.0), input_scale=0.5)
    assert all(torch.equal(x, y) for x, y in zip(a[3], b[3]))


def test_evaluation_pads_right_and_below(voc):
    dataset = layouts.open_dataset(str(voc))
    image, target = data.EvalDataset(dataset.samples(["val0"]), 16)[0]
    assert image.shape == (3, 81, 97) and target.shape == (81, 97)
    assert (target[80:] == 255).all() and (target[:, 96:] == 255).all() and (target[40:80, :96] != 255).all()
    assert (target[:80, :96].numpy() == np.asarray(Image.open(voc / "SegmentationClassAug/val0.png"))).all()


@pytest.mark.quick
def test_evaluation_shrinks_as_training_does(voc, tmp_path):
    """A image that needs no padding: the net is shown the crop that is all of it, at the scale of --input-scale."""
    pixels = np.random.RandomState(0).randint(0, 255, (129, 193, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    shown, size = data.pad_to_stride(data.read_image(tmp_path / "p.png"), 8, 0.5)
    assert shown.shape == (3, 65, 97) and size == (129, 193)
    crop = data.place_image(Image.fromarray(pixels), ((0, 0, 193, 129), (97, 65), False), torch.zeros(65, 97, 3))
    assert torch.equal(crop.permute(2, 0, 1), shown)


def spoil(kind, path):
    label = np.zeros((80, 96), np.uint8)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "unreadable":
        path.write_text("no image")
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
    ("JPEGImages", "missing", "missing"), ("JPEGImages", "truncated", "cannot be read"),
    ("JPEGImages", "unreadable", "cannot be read"), ("SegmentationClassAug", "missing", "missing"),
    ("SegmentationClassAug", "truncated", "cannot be read"), ("SegmentationClassAug", "unreadable", "cannot be read"),
    ("SegmentationClassAug", "outside", "label value 4 is outside the 4 classes"),
    ("SegmentationClassAug", "size", "96, 80"), ("SegmentationClassAug", "16 bit", "index image"),
    ("SegmentationClassAug", "RGB", "index image"), ("SegmentationClassAug", "RGBA", "index image"),
])
def test_bad_files_are_named(voc, tmp_path, fails, folder, kind, say):
    """In training (all ids labelled, so the first epoch finds it) and in evaluation."""
    early = kind == "missing" or (folder, kind) == ("JPEGImages", "unreadable")  # their lists and sizes are read first
    for i, done in (("train0", False), ("val1", not early)):
        path = voc / folder / f"{i}.png"
        good = path.read_bytes()
        spoil(kind, path)
        words = "--iters 2 --split 1 --batch-size 8 --eval-every 9 --save-every 1 --out".split()
        error = fails("train_base", "--data", voc, *SMALL, *words, tmp_path / i)
        assert str(path).replace(".png", "") in error and say in error
        assert not list((tmp_path / i).glob("*.part")) and (tmp_path / i / "last.pt").exists() == done
        path.write_bytes(good)


@pytest.mark.quick
def test_strong_views_are_draws_of_their_own(monkeypatch):
    """The same for any number of processes, other ones in the next step; sizes and places stay."""
    images = torch.randint(0, 128, (16, 3, 20, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[..., :6, :6] += 128
    views = data.strong_view(images, 0, 2)
    assert views.dtype == torch.uint8 and views.shape == images.shape
    changed = [not torch.equal(a, b) for a, b in zip(views, images)]
    grey = [torch.equal(v[0], v[1]) for v in views]
    assert 10 < sum(changed) and 0 < sum(grey) < 10
    light = views.float().mean(1)
    assert (light[:, :6, :6].mean((1, 2)) > 1.2 * light[:, -6:, -6:].mean((1, 2))).all()
    assert torch.equal(views, data.strong_view(images, 0, 2))
    assert not any(torch.equal(views, data.strong_view(images, seed, step)) for seed, step in ((0, 1), (1, 2)))
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "RANK", rank)
        halves.append(data.strong_view(images[8 * rank:8 * rank + 8], 0, 2))
    assert torch.equal(torch.cat(halves), views)


@pytest.mark.quick
@pytest.mark.parametrize("height, width", [(33, 33), (65, 17), (9, 40)])
def test_mixed_by_the_same_boxes(monkeypatch, height, width):
    """In half of the images a box is the neighbour's, in all maps alike, for any number of processes."""
    first = torch.arange(64 * height * width).view(64, height, width)
    maps = first, torch.stack([first, 2 * first, 3 * first], 1), first % 3 == 0
    one, three, mask = data.cut_mix(maps, 0.5, 0, 2)
    assert torch.equal(three, torch.stack([one, 2 * one, 3 * one], 1)) and torch.equal(mask, one % 3 == 0)
    changed, neighbour = one != first, first.view(32, 2, height, width).flip(1).view(first.shape)
    assert torch.equal(one, neighbour.where(changed, first))
    boxes = changed.any(2)[:, :, None] & changed.any(1)[:, None]
    assert torch.equal(boxes, changed) and 16 < changed.any((1, 2)).sum() < 48
    share = changed.float().mean((1, 2))
    assert share.max() < 0.42 and share[share > 0].min() > 0.005 and 0.15 < share[share > 0].mean() < 0.27
    assert not any(torch.equal(one, data.cut_mix(maps, 0.5, seed, step)[0]) for seed, step in ((0, 1), (1, 2)))
    assert torch.equal(data.cut_mix(maps, 0, 0, 1)[0], first)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "RANK", rank)
        halves.append(data.cut_mix([x[32 * rank:32 * rank + 32] for x in maps], 0.5, 0, 2)[0])
    assert torch.equal(torch.cat(halves), one)
