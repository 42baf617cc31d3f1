"""export.py: the exported net says of every pixel what eval.py says of it."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, call, python
from PIL import Image

import data
import model
import predict
from csrc import ops

SIZES = [(40, 33), (65, 131), (97, 97), (1, 70), (200, 123)]  # (W,H)


def differing(net, ckpt):
    """The share of pixels of images of SIZES for which net(images (N,3,H,W) uint8) is not what predict.py predicts."""
    seg, rng, wrong, seen = model.load_segmenter(ckpt), np.random.RandomState(0), [], set()
    for w, h in SIZES:
        squares = rng.randint(0, 255, (h // 16 + 1, w // 16 + 1, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        image = Image.fromarray(squares[:h, :w])
        pixels, size = data.pad_to_stride(image, seg.stride, seg.input_scale)
        with torch.no_grad():
            ids = ops.upsample_argmax(predict.predict_logits(seg, pixels[None], amp=False), size)[0, :h, :w]
        twice = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
        got = net(twice)
        assert got.dtype == torch.uint8 and got.shape == (2, h, w) and torch.equal(got[0], got[1])
        seen |= set(ids.unique().tolist())
        wrong.append((got[0] != ids).float().mean().item())
    assert len(seen) > 1  # a net that says the same of all could be exported wrong
    return max(wrong)


@pytest.mark.parametrize("words", [
    ("--init", "imagenet"), ("--init", "imagenet", "--input-scale", 0.5),
    ("--backbone", "resnet18", "--iters", 20, "--lr", 0.02)])
def test_exported(train, tmp_path, words):
    ckpt = train("train_base", "--iters", 1, *words) / "last.pt"
    call("export", "--ckpt", ckpt, "--out", tmp_path / "net.pt2")
    files = {"classes.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=files)
    assert differing(program.module(), ckpt) < 1e-3  # ties
    assert json.loads(files["classes.json"])["classes"] == ["grey", "red", "green", "blue"]


def test_onnx(seeing, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    call("export", "--ckpt", seeing["train_base"] / "last.pt", "--out", tmp_path / "net.onnx")
    net = runtime.InferenceSession(tmp_path / "net.onnx")
    run = lambda x: torch.from_numpy(net.run(None, {"images": x.numpy()})[0])  # noqa: E731
    assert differing(run, seeing["train_base"] / "last.pt") < 1e-3
    assert "red" in net.get_modelmeta().custom_metadata_map["classes.json"]


def test_what_cannot_be_exported(seeing, tmp_path, fails):
    ckpt = seeing["train_base"] / "last.pt"
    for out in ("net", "net.pt"):
        assert "must end in .pt2 or .onnx" in fails("export", "--ckpt", ckpt, "--out", tmp_path / out)
    assert "no.pt" in fails("export", "--ckpt", tmp_path / "no.pt", "--out", tmp_path / "net.pt2")
    code = f"import sys; sys.modules['onnxscript'] = None; sys.path.insert(0, {str(ROOT)!r}); "
    code += "import export; from common import console; "
    code += "console.launch(export.main, export.flags)"
    done = python("-c", code, "--ckpt", ckpt, "--out", tmp_path / "net.onnx")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "onnxscript is not installed; pip install onnx onnxscript" in done.stderr
    assert not list(tmp_path.iterdir())
