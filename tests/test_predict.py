"""predict.py: logits of large images and of several views, what it reads and writes; export.py predicts the same."""
import json
import sys

from common import layouts

import numpy as np
import pytest
import torch
from conftest import SMALL, call
from PIL import Image

import data
import eval as evaluation
import model
import predict
from csrc import ops


class Points(torch.nn.Module):
    """A network whose logits are the colours at every 16th pixel."""

    stride = 16

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # which tells the device

    def forward(self, x):
        return x[:, :, ::16, ::16].float() / 50


class Sided(Points):
    """Points, with logits of the first class that rise to the right."""

    def forward(self, x):
        logits = super().forward(x)
        logits[:, 0] += torch.arange(logits.shape[3])
        return logits


@pytest.mark.quick
@pytest.mark.parametrize("size", [(161, 161), (65, 321), (337, 97), (65, 65)])
@pytest.mark.parametrize("window", [65, 70, 97, 2049])
def test_windows_give_the_logits_of_the_whole_image(size, window):
    """If a logit depends on its own place only; no window is larger than asked for."""
    pixels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen, network = [], Points()
    network.register_forward_hook(lambda network, x, y: seen.extend(x[0].shape[2:]))
    got = predict.predict_logits(network, pixels, False, window)
    torch.testing.assert_close(got, predict.predict_logits(Points(), pixels, False))
    assert max(seen) <= max(window, 65)


@pytest.mark.quick
def test_evaluation_in_batches_of_one_size(tmp_path, monkeypatch):
    """Successive images of one size and orientation; the same counts and order as one image at a time."""
    sizes, samples = [(33, 20)] * 10 + [(20, 33), (33, 20), (33, 20)], []
    rng, turned = np.random.default_rng(0), Image.Exif()
    turned[0x0112] = 6  # as (20,33)
    for i, size in enumerate(sizes):
        pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", **({"exif": turned} if i == 12 else {}))
        label = rng.integers(0, 3, size if i == 12 else size[::-1], np.uint8)
        Image.fromarray(label).save(tmp_path / f"label_{i}.png")
        files = (str(tmp_path / f"{kind}{i}.png") for kind in ("", "label_"))
        samples.append(layouts.Sample(str(i), next(files), layouts.Label(next(files), 3, ())))
    assert evaluation.batches_of_one_size(samples) == [[*range(8)], [8, 9], [10], [11], [12]]
    assert evaluation.batches_of_one_size(samples, 3 * 33 * 20)[:4] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    Image.new("L", (999, 999)).save(large := tmp_path / "large.png")
    large.write_bytes(large.read_bytes()[:100])  # pixels of large images are not read here
    assert evaluation.batches_of_one_size([layouts.Sample("large", str(large), None)] * 2) == [[0], [1]]
    seg, found = model.DeepLabV2("efficientnet_lite0", 3, 16, "none"), []
    for batches in (None, [[i] for i in range(13)]):
        if batches:
            monkeypatch.setattr(evaluation, "batches_of_one_size", lambda _, batches=batches: batches)
        order = []
        result = evaluation.evaluate(seg, samples, 0, write=lambda sample, ids, target, order=order: order.append(
            (sample.id, ids.tolist(), target.tolist())))
        found.append((result.matrix.tolist(), order))
    assert found[0] == found[1]


@pytest.mark.quick
def test_views_are_averaged():
    """As probabilities; mirrored images give mirrored logits, and an image of one colour what it gives alone."""
    pixels = torch.randint(0, 256, (1, 3, 129, 193), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    got = predict.predict_logits(Points(), pixels, False, tta=True)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(1, 9, 13))
    assert not torch.allclose(got, predict.predict_logits(Points(), pixels, False).log_softmax(1), atol=0.01)
    one, two = (predict.predict_logits(Sided(), x, False, tta=True) for x in (pixels, pixels.flip(3)))
    torch.testing.assert_close(one, two.flip(3))
    got = predict.predict_logits(Points(), torch.full_like(pixels, 7), False, tta=True)
    torch.testing.assert_close(got, torch.full((1, 3, 9, 13), 1 / 3).log())


def test_what_predict_writes(trained, tmp_path):
    """Of a folder: a label map of each image's size at any depth, a legend, and blends; an EXIF orientation applies."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (9, 14, 3), np.uint8).repeat(10, 0).repeat(10, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    (tmp_path / "in/deep").mkdir(parents=True)
    image.save(tmp_path / "in/deep/turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "in/upright.png")
    image.save(tmp_path / "in/._upright.png")  # as a Mac leaves them
    image.save(tmp_path / "in/[1].jpg")
    (tmp_path / "in/notes.txt").write_text("no image")
    words = "--ckpt", trained["train_base"] / "last.pt", "--gpu", -1, tmp_path / "in"
    call("predict", *words, "--out", tmp_path / "out", "--blend")
    names = [f"{name}{end}" for name in ("[1]", "turned", "upright") for end in (".png", "_blend.jpg")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(["legend.png", *names])
    turned, upright = (np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in ("turned", "upright"))
    assert turned.shape == (140, 90) and (turned == upright).all() and (turned != turned[::-1, ::-1]).any()
    blend, shown, colours = (np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(float) for name in (
        "out/turned_blend.jpg", "in/upright.png", "out/turned.png"))
    assert abs(blend - 0.5 * shown - 0.5 * colours).mean() < 12  # JPEG's losses on noise
    call("predict", *words, "--out", tmp_path / "tta", "--window", 65, "--tta")
    assert Image.open(tmp_path / "tta/[1].png").size == (140, 90)


def test_what_predict_refuses(trained, tmp_path, fails):
    """Unreadable images, and predictions that would overwrite an image or each other."""
    for name in ("a.jpg", "a_blend.jpg", "b.png", "legend.jpg", "broken.jpg"):
        Image.new("RGB", (70, 50), (9, 99, 200)).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "broken.jpg").read_bytes()[:-99])
    (tmp_path / "empty").mkdir()
    words, out = ("predict", "--ckpt", trained["train_base"] / "last.pt", "--gpu", -1), ["--out", tmp_path / "out"]
    assert "--out" in fails(*words, tmp_path / "a.jpg")
    for name in ("broken.jpg", "none*.jpg", "empty", "notes.txt"):
        assert name in fails(*words, tmp_path / name, *out)
    assert "legend.png" in fails(*words, tmp_path / "legend.jpg", *out)
    assert "b.png" in fails(*words, tmp_path / "b.png", tmp_path / "elsewhere/b.jpg", *out)
    assert not (tmp_path / "out").exists()
    assert "b.png" in fails(*words, tmp_path / "b.png", "--out", tmp_path)
    images = tmp_path / "a.jpg", tmp_path / "a_blend.jpg"
    assert "a_blend.jpg" in fails(*words, *images, "--out", tmp_path, "--blend")


# ---- export.py ----

def differing_pixels(exported, ckpt):
    """Return the fraction of pixels that exported(images (N,3,H,W) uint8) predicts differently from predict.py."""
    seg, rng, wrong, seen = model.load_segmenter(ckpt), np.random.RandomState(0), [], set()
    for w, h in ((40, 33), (65, 131), (97, 97), (1, 70), (200, 123)):
        squares = rng.randint(0, 255, (h // 16 + 1, w // 16 + 1, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        image = Image.fromarray(squares[:h, :w])
        pixels, size = data.pad_to_stride(image, seg.stride, seg.input_scale)
        with torch.no_grad():
            ids = ops.upsample_argmax(predict.predict_logits(seg, pixels[None], amp=False), size)[0, :h, :w]
        twice = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
        got = exported(twice)
        assert got.dtype == torch.uint8 and got.shape == (2, h, w) and torch.equal(got[0], got[1])
        seen |= set(ids.unique().tolist())
        wrong.append((got[0] != ids).float().mean().item())
    assert len(seen) > 1  # with one class only, a wrong export would go unnoticed
    return max(wrong)


def test_exported(train, tmp_path):  # another network: test_recipes.py
    words = "--input-scale", 0.5, "--backbone", "resnet18", "--init", "none", "--iters", 20, "--lr", 0.02
    ckpt = train("train_base", *words, "--eval-every", 20) / "last.pt"
    call("export", "--ckpt", ckpt, "--out", tmp_path / "net.pt2")
    files = {"classes.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=files)
    assert differing_pixels(program.module(), ckpt) < 1e-3  # ties
    assert json.loads(files["classes.json"])["classes"] == ["grey", "red", "green", "blue"]


def test_an_exported_model_runs_on_any_device(trained, tmp_path):
    """No operation in the graph has a device of its own: program.module().to("cuda") moves everything."""
    call("export", "--ckpt", trained["train_base"] / "last.pt", "--out", tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert not [node for node in program.graph.nodes if "device" in node.kwargs]
    images = torch.zeros(1, 3, 33, 40, dtype=torch.uint8, device="meta")
    assert program.module().to("meta")(images).shape == (1, 33, 40)


def test_what_cannot_be_written(trained, blocks, tmp_path, monkeypatch, fails):
    """Other formats, and those whose optional packages are missing."""
    ckpt = trained["train_base"] / "last.pt"
    assert ".pt2 or .onnx" in fails("export", "--ckpt", ckpt, "--out", tmp_path / "net.pt")
    assert "no.pt" in fails("export", "--ckpt", tmp_path / "no.pt", "--out", tmp_path / "net.pt2")
    with monkeypatch.context() as patch:  # as for mobilevit_xxs in torch 2.14
        patch.setattr(torch.export, "save", lambda *_, **__: 1 / 0)
        assert "backbone cannot be exported to .pt2 (ZeroDivisionError" in fails(
            "export", "--ckpt", ckpt, "--out", tmp_path / "net.pt2")
        assert not [*tmp_path.glob("net*")]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install onnx onnxscript" in fails("export", "--ckpt", ckpt, "--out", tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = "--data", blocks, *SMALL, "--out", tmp_path / "out", "--tensorboard"
    assert "pip install tensorboard" in fails("train_base", *words)
    assert not list(tmp_path.iterdir())
