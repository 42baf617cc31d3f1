"""predict.py --rank: the order of images, its table and its page."""
import csv
import math
import re
import shutil
from pathlib import Path

from common import ranking

import pytest
import torch
from conftest import call
from PIL import Image

import data
import model


@pytest.mark.quick
def test_the_next_image_raises_the_coverage_most():
    """Against the definition, computed anew for each set, with and without labelled images."""
    torch.manual_seed(0)
    for labelled in (torch.randn(3, 5).double(), torch.empty(0, 5).double()):
        uncertainty, features = torch.rand(12).double(), torch.randn(12, 5).double()
        mean = torch.cat([features, labelled]).mean(0)

        def coverage(known):
            similarity = [max([0, *(torch.cosine_similarity(x - mean, y - mean, 0).item() for y in known)])
                          for x in features]
            return sum(u * s for u, s in zip(uncertainty.tolist(), similarity)) / uncertainty.sum().item()
        known, left = [*labelled], {*range(12)}
        indices, scores = ranking.choose_order(uncertainty, features, labelled)
        for i, score in zip(indices, scores, strict=True):
            gains = {j: coverage([*known, features[j]]) - coverage(known) for j in left}
            assert gains[i] == pytest.approx(max(gains.values()), abs=1e-6) == score
            left.remove(i)
            known.append(features[i])
        assert not left and scores[0] > 0.1 and scores[5] > 1e-3


@pytest.mark.quick
def test_the_order_of_more_images_than_are_computed_at_once():
    torch.manual_seed(1)
    uncertainty, features, labelled = torch.rand(600).double(), torch.randn(600, 4), torch.randn(300, 4)
    features[:20] = features[0]  # the gain of these is 0 after the first of them
    mean = torch.cat([features, labelled]).mean(0)
    x, y = (torch.nn.functional.normalize((z - mean).double()) for z in (features, labelled))
    similarity, covered = x @ x.T, (x @ y.T).amax(1)
    for i, score in zip(*(found[:400] for found in ranking.choose_order(uncertainty, features, labelled))):
        gains = uncertainty @ (similarity - covered[:, None]).clamp_min(0) / uncertainty.sum()
        assert gains[i].item() == pytest.approx(gains.max().item(), abs=1e-6) == score
        covered = covered.maximum(similarity[i])


@pytest.mark.quick
def test_images_that_cover_nothing_more_follow_by_uncertainty(monkeypatch):
    uncertainty, labelled = torch.tensor([0.1, 0.5, 0.0, 0.4, 0.3, 0.2]).double(), torch.empty(0, 6)
    monkeypatch.setattr(ranking, "GREEDY", 3)
    assert ranking.choose_order(uncertainty, torch.eye(6), labelled) == (
        [1, 3, 4, 5, 0, 2], [pytest.approx(x / 1.5) for x in (0.5, 0.4, 0.3)] + [0.0] * 3)
    assert ranking.choose_order(uncertainty, torch.ones(6, 2), labelled[:, :2]) == ([1, 3, 4, 5, 0, 2], [0.0] * 6)


@pytest.mark.quick
def test_entropy_is_relative_to_the_largest():
    p = torch.tensor([[1 / 3, 1, 0.1], [1 / 3, 0, 0.2], [1 / 3, 0, 0.7]])[:, None]  # (K,1,3)
    want = -sum(x * math.log(x) for x in (0.1, 0.2, 0.7)) / math.log(3)
    assert ranking.entropy(p)[0].tolist() == pytest.approx([1, 0, want], abs=1e-6)


@pytest.mark.quick
def test_the_uncertainty_is_a_mean_over_classes():
    p = torch.zeros(4, 2, 3).index_put((torch.tensor([0, 0, 0, 0, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 1]),
                                             torch.tensor([0, 1, 2, 0, 1, 2])), torch.tensor(1.0))
    values = torch.tensor([[0.1, 0.1, 0.3], [0.3, 0.5, 0.8]])
    assert ranking.mean_over_classes(values, p) == pytest.approx((0.2 + 0.5 + 0.8) / 3)


def test_a_ranking(trained, blocks, tmp_path, capsys):
    """The table has all images, best first, measured without their padding; the page needs no other files."""
    ckpt, out = trained["train_base"] / "last.pt", tmp_path / "out"
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(70, 90), (96, 80), (130, 65)]):
        Image.effect_noise(size, 20 + 40 * i).convert("RGB").save(tmp_path / f"photos/{i}.png")
    shutil.copy(blocks / f"JPEGImages/{(ckpt.parent / 'labelled.txt').read_text().split()[0]}.png", tmp_path / "photos")
    call("predict", "--ckpt", ckpt, tmp_path / "photos", "--out", out, "--gpu", -1, "--rank")
    rows = list(csv.DictReader((out / "ranking.csv").open()))
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 4 and scores == sorted(scores, reverse=True) and scores[2] > 1e-3
    assert "train" in rows[3]["image"] and scores[3] < 1e-6  # it is labelled
    seg = model.load_segmenter(ckpt)
    for row in rows:
        image = data.read_image(row["image"])
        pixels, _ = data.pad_to_stride(image, 16, 1)
        h, w = ((n + 15) // 16 for n in (image.height, image.width))
        with torch.no_grad():
            p = seg(pixels[None])[0, :, :h, :w].double().softmax(0)
        means = [ranking.entropy(p)[p.argmax(0) == k].mean() for k in p.argmax(0).unique()]
        want = {"confidence": p.amax(0).mean(), "uncertainty": sum(means) / len(means)}
        assert all(float(row[k]) == pytest.approx(x.item(), abs=2e-4) for k, x in want.items())
        with Image.open(out / Path(row["image"]).name) as x:
            counts = x.histogram()
        shares = [float(row[name]) for name in seg.classes]
        assert shares == pytest.approx([counts[k] / sum(counts) for k in range(4)], abs=1e-4)
    page = (out / "ranking.html").read_text()
    assert page.count("<li>") == 4 and page.count("data:image/") == 12 and not re.search(r"(src|href)=\"http", page)
    shutil.copy(ckpt, tmp_path)
    call("predict", "--ckpt", tmp_path / "last.pt", tmp_path / "photos", "--out", out, "--gpu", -1, "--rank")
    assert "labelled.txt" in capsys.readouterr().out
    assert "labelled images" not in (out / "ranking.html").read_text()


def test_ranks_do_not_rank(trained, blocks, tmp_path, monkeypatch, fails):
    monkeypatch.setattr("common.distributed.WORLD_SIZE", 2)
    words = "--ckpt", trained["train_base"] / "last.pt", blocks / "JPEGImages", "--out", tmp_path / "out"
    assert "--rank" in fails("predict", *words, "--gpu", -1, "--rank") and not (tmp_path / "out").exists()


@pytest.fixture
def mine(trained, blocks, tmp_path):
    """A data set in which 5 of 8 images have no label: three in unlabelled/, two beside the labelled ones."""
    root = tmp_path / "mine"
    for name in ("images", "labels", "unlabelled"):
        (root / name).mkdir(parents=True)
    shutil.copy(blocks / "classes.txt", root)
    for n in range(8):
        shutil.copy(blocks / f"JPEGImages/train{n}.png", root / ("unlabelled" if n > 4 else "images"))
        if n < 3:
            shutil.copy(blocks / f"SegmentationClassAug/train{n}.png", root / "labels")
    return root


@pytest.mark.parametrize("kind", ["cvat", "coco", "palette"])
def test_images_to_label_next(trained, mine, tmp_path, kind):
    """They come with their predictions, which can be imported as they are; then others are chosen."""
    words = "--data", mine, "--ckpt", trained["train_base"] / "last.pt", "--gpu", -1, "--format", kind
    call("prepare", "next", *words, "--count", 2, "--out", tmp_path / "next")
    rows = [Path(row["image"]) for row in csv.DictReader((tmp_path / "next/ranking.csv").open())]
    chosen = sorted(file.name for file in (tmp_path / "next/images").iterdir())
    assert len(rows) == 5 and chosen == sorted(path.name for path in rows[:2])
    files = {"cvat": ["predictions.zip"], "coco": ["predictions.json"], "palette": ["labels"]}[kind]
    assert {f.name for f in (tmp_path / "next").iterdir()} == {"images", "ranking.csv", "ranking.html", *files}
    if kind != "palette":
        call("prepare", "import", tmp_path / "next/images", tmp_path / "next" / files[0], "--add", mine,
             *["--background", "grey"] * (kind == "coco"))
        call("predict", "--ckpt", words[3], tmp_path / "next/images", "--out", tmp_path / "want", "--gpu", -1)
        for name in chosen:
            with Image.open(mine / "labels" / name) as found, Image.open(tmp_path / "want" / name) as want:
                assert found.tobytes() == want.tobytes()
        call("prepare", "next", *words, "--count", 3, "--out", tmp_path / "after")
        assert not {file.name for file in (tmp_path / "after/images").iterdir()} & {*chosen}


def test_wrong_input_of_next(trained, mine, tmp_path, fails):
    words = "next", "--data", mine, "--ckpt", trained["train_base"] / "last.pt", "--gpu", -1
    out = "--out", tmp_path / "next"
    assert "--count 6: " in fails("prepare", *words, *out, "--count", 6)
    assert "3 are labelled already" in fails("prepare", *words, *out, "--unlabelled", mine / "images", "--count", 3)
    assert "--out" in fails("prepare", *words, "--out", mine)
    (mine / "unlabelled/broken.png").write_text("no image")
    assert "broken.png" in fails("prepare", *words, *out, "--count", 2)
    (mine / "classes.txt").write_text("grey\nred\ngreen\npurple\n")
    assert "last.pt: its classes are grey, red" in fails("prepare", *words, *out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine"]
