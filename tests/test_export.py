"""export.py: the exported model predicts what predict.py predicts."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, call
from PIL import Image

import data
import model
import predict
from csrc import ops

SIZES = [(40, 33), (65, 131), (97, 97), (1, 70), (200, 123)]  # (W,H)


def differing_pixels(exported, ckpt):
    """Return the fraction of pixels that exported(images (N,3,H,W) uint8) predicts differently from predict.py."""
    seg, rng, wrong, seen = model.load_segmenter(ckpt), np.random.RandomState(0), [], set()
    for w, h in SIZES:
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


@pytest.mark.parametrize("words", [
    ("--input-scale", 0.5), ("--backbone", "resnet18", "--init", "none", "--iters", 20, "--lr", 0.02)])
def test_exported(train, tmp_path, words):
    ckpt = train("train_base", "--iters", 1, *words) / "last.pt"
    call("export", "--ckpt", ckpt, "--out", tmp_path / "net.pt2")
    files = {"classes.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=files)
    assert differing_pixels(program.module(), ckpt) < 1e-3  # ties
    assert json.loads(files["classes.json"])["classes"] == ["grey", "red", "green", "blue"]


def test_what_cannot_be_written(trained, blocks, tmp_path, monkeypatch, fails):
    """Other formats, and those whose optional packages are missing."""
    ckpt = trained["train_base"] / "last.pt"
    assert ".pt2 or .onnx" in fails("export", "--ckpt", ckpt, "--out", tmp_path / "net.pt")
    assert "no.pt" in fails("export", "--ckpt", tmp_path / "no.pt", "--out", tmp_path / "net.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install onnx onnxscript" in fails("export", "--ckpt", ckpt, "--out", tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = "--data", blocks, *SMALL, "--out", tmp_path / "out", "--tensorboard"
    assert "pip install tensorboard" in fails("train_base", *words)
    assert not list(tmp_path.iterdir())
