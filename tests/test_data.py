"""Reading images and labels, augmentation, the training and evaluation data sets, batches."""
import random
import re
import shutil

from common import console, layouts

import numpy as np
import pytest
import torch
from conftest import on_each_rank
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from stress import survive
from torchvision.transforms.v2 import functional as TF

import data

pytestmark = pytest.mark.quick


def train_dataset(voc, labelled=True, name="labelled", seed=0, crop=65, **more):
    dataset = layouts.open_dataset(str(voc))
    return data.TrainDataset(dataset.samples(dataset.train_ids(), labelled), name, seed, crop, **more)


def test_crops_are_flipped_and_everywhere():
    draws = [data.random_geometry((96, 80), 65, 0.8 + n / 500, random.Random(n)) for n in range(300)]
    assert {flip for *_, flip in draws} == {True, False} and len({box[:2] for box, *_ in draws}) > 150


def test_a_third_of_the_size_is_the_middle_of_three_pixels():
    ids = np.arange(99, dtype=np.uint8)[None].repeat(81, 0)
    geometry = data.random_geometry((99, 81), 65, 1 / 3, random.Random(1))
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
    """Red and green of an image are the column and the row, as are two labels: after any draw they still agree."""
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
def test_labels_gain_no_value_and_keep_255(w, h, factor, classes, n):
    """Resized by nearest pixel: a label has values of its box only, and other ids change nothing else."""
    rng, draw = np.random.RandomState(n), random.Random(n)
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
    """The last colour is void; a label in colours reads as the ids that it was made from."""
    *classes, void = colours
    (folder / "classes.txt").write_text("".join(f"class {i} {r} {g} {b}\n" for i, (r, g, b) in enumerate(classes))
                                        + "void {} {} {}\n".format(*void))
    names, palette, codes = layouts.read_classes(folder / "classes.txt")
    assert names == [f"class {i}" for i in range(len(classes))] and palette[:3 * len(classes)] == list(sum(classes, ()))
    ids = np.random.RandomState(n).randint(0, len(colours), (9, 7))
    Image.fromarray(np.array(colours, np.uint8)[ids]).convert(mode).save(folder / "label.png")
    got = data.read_label(layouts.Label(str(folder / "label.png"), len(names), codes), (7, 9))
    assert (got == np.where(ids == len(classes), 255, ids)).all() and got.dtype == np.uint8


def indexed(ids, *palette):
    image = Image.fromarray(np.array(ids, np.uint8)).convert("P")
    image.putpalette(palette)
    return image


RGB = Image.fromarray(np.array([[(255, 255, 255), (10, 20, 30)], [(0, 0, 0), (0, 0, 0)]], np.uint8))
COLOURS, NAMES = "ground 0 0 0\nroad 10 20 30\ncar 255 255 255\n", "ground\nroad\ncar\n"  # of classes.txt


@pytest.mark.parametrize("image, classes, error", [
    (RGB, COLOURS, None), (indexed([[2, 1], [0, 0]], 0, 0, 0, 10, 20, 30, 255, 255, 255), COLOURS, None),
    (indexed([[0, 2], [1, 1]], 255, 255, 255, 0, 0, 0, 10, 20, 30), COLOURS, "value 0"),  # the colours are meant
    (Image.fromarray(np.array([[255, 1], [0, 0]], np.uint8)), COLOURS, "value 255"),  # a binary mask: 255 is a class
    (RGB, "a 0 0 0\nb 10 20 30\n", "255 255 255"),  # a colour that is no class's
    (RGB, "a 0 0 0\nb\n", "classes.txt"), (RGB, "a 1 2 3\nb 1 2 3\n", "classes.txt"), (RGB, NAMES, "index image"),
    (RGB.convert("RGBA"), NAMES, "index image"), (Image.new("I;16", (2, 2)), NAMES, "index image"),
    (Image.new("L", (2, 2), 3), NAMES, "value 3"), (Image.new("L", (2, 1)), NAMES, "2, 2")])
def test_labels_are_read_as_they_are_meant(tmp_path, image, classes, error):
    """A label that may be meant in another way is an error, and not read as swapped or lost classes."""
    (tmp_path / "classes.txt").write_text(classes)
    names, _, colours = layouts.read_classes(tmp_path / "classes.txt")
    image.save(tmp_path / "label.png")
    label = layouts.Label(str(tmp_path / "label.png"), len(names), colours)
    if error:
        with pytest.raises(console.InputError, match=f"label.png: .*{error}"):
            data.read_label(label, (2, 2))
    else:
        assert data.read_label(label, (2, 2)).tolist() == [[2, 1], [0, 0]]


def write_labels(root, values, classes="ground\nroad\ncar\n", change=None, suffix="png", exif=None):
    """Write four images of 12x8 pixels with labels of the four `values`; change: function (label image) -> image."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    if classes:
        (root / "classes.txt").write_text(classes)
    for n in range(4):
        noise = np.random.RandomState(n).randint(0, 256, (8, 12, 3), np.uint8)
        Image.fromarray(noise).save(root / f"images/{n}.{suffix}", **{"exif": exif} if exif else {})
        label = Image.fromarray(np.array(values, np.uint8).repeat(3)[None].repeat(8, 0))
        (change(label) if change else label).save(root / f"labels/{n}.png")


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def replace_images(root):
    for file in (root / "labels").iterdir():
        shutil.copy(file, root / "images")


def blacken(root):
    """Make an image and its label black: they have equal pixels, and nothing is wrong."""
    for folder, mode in (("images", "RGB"), ("labels", "L")):
        Image.new(mode, (12, 8)).save(root / folder / "1.png")


def crop(root):
    for file in root.glob("*/*.???"):
        image = Image.open(file)
        image.crop((0, 0, 8, 8)).save(file, exif=image.getexif())


def random_palette(label):
    return indexed(label, *np.random.RandomState(0).randint(0, 256, 768))


LABELS = [0, 1, 0, 2]
INSPECTED = {  # (arguments of write_labels, change of the folder or None, error or None, warning or None)
    "plain": (dict(values=LABELS), None, None, None),
    "a binary mask": (dict(values=[0, 0, 0, 255]), None, "only 0 and 255.*prepare.py import", None),
    "soft edges": (dict(values=[*range(0, 255, 25), 255], change=lambda x: x.resize((12, 8))), None,
                   "soft edges.*prepare.py import", None),
    "its palette": (dict(values=LABELS, change=lambda x: indexed(x, *layouts.voc_palette())), None, None, None),
    "a foreign palette": (dict(values=LABELS, change=random_palette), None, "palette.*import.*--kind index", None),
    "a grey palette": (dict(values=LABELS, change=lambda x: indexed(x, 0, 0, 0, 90, 90, 90, 255, 255, 255)), None, None,
                       None),
    "a palette of classes.txt": (dict(values=LABELS, classes="a 9 9 9\nb 90 9 9\nc 9 90 9\n", change=lambda x: indexed(
        x, 9, 9, 9, 90, 9, 9, 9, 90, 9)), None, None, None),
    "void has a grey value": (dict(values=LABELS, classes="a 1 1 1\nb 2 2 2\nc 9 9 9\nvoid 0 0 0"), None,
                              "value 0.*as void.*prepare.py import", None),
    "labels as images": (dict(values=LABELS), replace_images, "has the pixels of its image", None),
    "a black image": (dict(values=LABELS), blacken, None, None),
    "EXIF, label as stored": (dict(values=LABELS, suffix="jpg", exif=orientation(6)), None, "EXIF.*exiftool", None),
    "EXIF, label upright": (dict(values=LABELS, suffix="jpg", exif=orientation(6), change=lambda x: x.transpose(
        Image.Transpose.ROTATE_270)), None, None, None),
    "EXIF, label unclear": (dict(values=LABELS, suffix="jpg", exif=orientation(3)), None, None, "EXIF orientation"),
    "EXIF, square": (dict(values=LABELS, suffix="jpg", exif=orientation(6)), crop, None, "EXIF orientation"),
    "EXIF in PNG": (dict(values=LABELS, exif=orientation(3)), None, None, "EXIF orientation"),
    "objects": (dict(values=[*range(1, 12)], change=lambda x: x.resize((12, 8))), None, "instance mask", None),
    "16 bits": (dict(values=LABELS, change=lambda x: x.convert("I;16")), None, "instance", None),
    "grey levels": (dict(values=[0, 0, 127, 254]), None, "127.*prepare.py import", None),
    "one bit": (dict(values=[0, 0, 0, 1], change=lambda x: x.point(lambda v: 255 * v).convert("1")), None,
                "index image.*prepare.py import", None),
    "scribbles": (dict(values=[0, 1, 2, 255, 255, 255, 255, 255], change=lambda x: x.resize((12, 8), 0)), None, None,
                  "255.*scribbles"),
    "a class is never shown": (dict(values=[0, 0, 1, 1]), None, None, "shows car"),
    "labels without images": (dict(values=LABELS), lambda root: (root / "images/2.png").unlink(), None,
                              "1 labels.*labels/2.png"),
    "no classes.txt": (dict(values=LABELS, classes=None), None, None, "no classes.txt"),
    "another kind of image": (dict(values=LABELS, suffix="tif"), None, None, None),
}


@pytest.mark.parametrize("case", INSPECTED)
def test_labels_are_inspected(tmp_path, capsys, case):
    """What cannot be meant is an error with its remedy, what may be wrong a warning, and nothing else is said."""
    arguments, change, error, warning = INSPECTED[case]
    write_labels(tmp_path, **arguments)
    if change:
        change(tmp_path)
    dataset = layouts.open_dataset(str(tmp_path))
    samples = dataset.samples(sorted(dataset.images))
    if error:
        with pytest.raises(console.InputError, match=error):
            data.inspect_labels(samples, dataset, 0)
        return
    pixels = data.inspect_labels(samples, dataset, 0)
    printed = capsys.readouterr().out
    assert re.search(f"^warning: .*{warning}", printed, re.M) if warning else not printed
    ids = torch.stack([torch.from_numpy(data.read_label(x.label, data.read_image(x.image).size)) for x in samples])
    assert pixels.tolist() == [(ids == k).sum() for k in range(len(dataset.classes))]


def test_a_palette_that_differs_between_files_is_an_error(voc):
    """In VOC's layout one palette in all files is only a warning: converters write their own."""
    dataset = layouts.open_dataset(str(voc))
    files = sorted((voc / "SegmentationClassAug").iterdir())
    for n in (0, 1):
        for file in files[:2]:
            indexed(Image.open(file), *np.random.RandomState(n * files.index(file)).randint(0, 256, 768)).save(file)
        inspections = [data.inspect_label(sample) for sample in dataset.samples(sorted(dataset.images))]
        problems = data.find_problems(dataset.samples(sorted(dataset.images)), inspections, dataset)
        assert [any("palette" in text for text in texts) for texts in problems] == [n == 1, n == 0]


def test_a_list_of_background_and_void_is_no_binary_mask(tmp_path):
    """If other labels of the data set show classes, 0 and 255 are what they seem."""
    write_labels(tmp_path, [0, 0, 0, 255])
    Image.fromarray(np.full((8, 12), 1, np.uint8)).save(tmp_path / "labels/3.png")
    dataset = layouts.open_dataset(str(tmp_path))
    assert data.inspect_labels(dataset.samples(["0", "1"]), dataset, 0).tolist() == [144, 0, 0]


def test_many_labels_are_sampled(tmp_path, monkeypatch, capsys):
    write_labels(tmp_path, LABELS)
    dataset = layouts.open_dataset(str(tmp_path))
    monkeypatch.setattr(data, "INSPECTED", 2)
    monkeypatch.setattr(data.time, "monotonic", iter([0, 2.5]).__next__)
    assert data.inspect_labels(dataset.samples(sorted(dataset.images)), dataset, 0).tolist() == [96, 48, 48]
    assert capsys.readouterr().out == "inspected 2 labels in 2.5 s\n"


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
    Image.fromarray(np.full((80, 96), 40000, np.uint16)).save(tmp_path / "p.png")
    with pytest.raises(console.InputError, match="p.png: .*8 bits"):
        data.read_image(tmp_path / "p.png")


def test_damaged_images_and_labels(tmp_path):
    """Each is read, or refused in one line that names the file; 2,000 of them: tests/stress/survive.py."""
    survive.make_data(tmp_path)
    outcomes = [survive.images(tmp_path, random.Random(n), n) for n in range(400)]
    assert 40 < outcomes.count("survived") < 360


def test_an_item_depends_on_seed_and_name(voc):
    items = [train_dataset(voc, name=name, seed=seed)[5] for name, seed in (
        ("labelled", 0), ("labelled", 0), ("unlabelled", 0), ("labelled", 1))]
    assert [torch.equal(items[0][0], image) for image, _ in items] == [True, True, False, False]


def test_an_epoch_shows_every_image_once(tmp_path):
    for n in range(8):
        Image.new("RGB", (65, 65), (n, n, n)).save(tmp_path / f"{n}.png")
    samples = [layouts.Sample(str(n), str(tmp_path / f"{n}.png"), None) for n in range(8)]
    dataset = data.TrainDataset(samples, "unlabelled", 0, 65, (1, 1))
    orders = [[dataset[8 * epoch + n][0][0, 0, 0].item() for n in range(8)] for epoch in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders) and orders[0] != orders[1] != orders[2]


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
    for (x, _), (y, _), (whole, _) in zip(*on_each_rank(monkeypatch, 2, lambda _: take(0, 0)), want, strict=True):
        assert torch.equal(torch.cat([x, y]), whole)


def test_unlabelled_images_come_with_the_mask_of_their_pixels(voc):
    dataset, padded = train_dataset(voc, labelled=False, name="unlabelled", scale=(0.3, 0.9)), 0
    for n in range(20):
        image, valid = dataset[n]
        is_padding = (image == torch.tensor(data.PADDING, dtype=torch.uint8)).all(2)
        assert valid.dtype == torch.bool and is_padding[~valid].all() and not is_padding[valid].any()
        padded += (~valid).sum()
    assert padded > 0


def test_input_scale_shrinks_what_the_network_sees(voc):
    a, b = train_dataset(voc, scale=(0.4, 0.5)), train_dataset(voc, scale=(0.8, 1.0), input_scale=0.5)
    assert all(torch.equal(x, y) for x, y in zip(a[3], b[3]))


def test_evaluation_pads_right_and_below(voc):
    dataset = layouts.open_dataset(str(voc))
    image, target = data.EvalDataset(dataset.samples(["val0"]), 16)[0]
    assert image.shape == (3, 81, 97) and target.shape == (81, 97)
    assert (target[80:] == 255).all() and (target[:, 96:] == 255).all() and (target[40:80, :96] != 255).all()
    assert (target[:80, :96].numpy() == np.asarray(Image.open(voc / "SegmentationClassAug/val0.png"))).all()


def test_evaluation_shrinks_as_training_does(voc, tmp_path):
    """An image that needs no padding is shrunk as a crop of all of it is, at the scale of --input-scale."""
    pixels = np.random.RandomState(0).randint(0, 255, (129, 193, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    shown, size = data.pad_to_stride(data.read_image(tmp_path / "p.png"), 8, 0.5)
    assert shown.shape == (3, 65, 97) and size == (129, 193)
    crop = data.place_image(Image.fromarray(pixels), ((0, 0, 193, 129), (97, 65), False), torch.zeros(65, 97, 3))
    assert torch.equal(crop.permute(2, 0, 1), shown)


def test_strong_views_depend_on_seed_and_step(monkeypatch):
    """Not on the number of ranks; sizes and places stay."""
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
    halves = on_each_rank(monkeypatch, 2, lambda rank: data.strong_view(images[8 * rank:8 * rank + 8], 0, 2))
    assert torch.equal(torch.cat(halves), views)


def test_strong_views_are_torchvisions():
    """Of each image alone with the same draws; roundings may change a value by 2 levels, few values by any."""
    images = torch.randint(0, 256, (20, 3, 33, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:4] = images[:4, :1]  # grey ones
    expected = []
    for view, rng in zip(images, data.batch_generators("5/strong", 3, 20)):
        if rng.random() < 0.8:
            for adjust in (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation):
                view = adjust(view, rng.uniform(0.5, 1.5))
            view = TF.adjust_hue(view, rng.uniform(-0.25, 0.25))
        view = TF.rgb_to_grayscale(view, 3) if rng.random() < 0.2 else view
        expected.append(TF.gaussian_blur(view, [9, 9], [rng.uniform(0.1, 2)]) if rng.random() < 0.5 else view)
    difference = (data.strong_view(images, 5, 3).int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.003


@pytest.mark.parametrize("height, width", [(33, 33), (65, 17), (9, 40)])
def test_cut_mix_takes_boxes_of_the_neighbour(monkeypatch, height, width):
    """In half of the images, the same box in all tensors, for any number of ranks."""
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
    halves = on_each_rank(monkeypatch, 2, lambda rank: data.cut_mix(
        [x[32 * rank:32 * rank + 32] for x in maps], 0.5, 0, 2)[0])
    assert torch.equal(torch.cat(halves), one)
