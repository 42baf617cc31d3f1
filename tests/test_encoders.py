"""Networks of timm as backbones: geometry, names, initial weights, training with a frozen one."""
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common import encoders
from common.console import InputError

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, call, load
from PIL import Image
from safetensors.torch import save, save_file

import model

VIT = "test_vit"  # of timm: 6 layers, patches of 16 pixels


@pytest.mark.quick
def test_features_of_patches_are_brought_to_the_corners():
    """A linear function of the position is exact, also at the border; a single patch is repeated."""
    rows, columns = torch.arange(4.0), torch.arange(3.0)
    centres = 5 * (rows + 0.5)[:, None] - 7 * (columns + 0.5)  # (4,3)
    corners = 5 * torch.arange(5.0)[:, None] - 7 * torch.arange(4.0)
    torch.testing.assert_close(encoders.to_corners(centres[None, None]), corners[None, None])
    assert encoders.to_corners(torch.full((2, 3, 1, 2), 4.0)).eq(4).all()


@pytest.mark.quick
@pytest.mark.parametrize("name, stride, cells", [
    ("resnet18", 8, 8), ("efficientnet_lite0", 16, 16), ("convnext_atto", 16, 16), ("convnext_atto", 8, 8),
    ("convnext_atto", 32, 32), ("mobilenetv3_small_050", 16, 16), (VIT, None, 16)])
def test_features_lie_at_the_corners(name, stride, cells):
    """Within a quarter of a cell, above which the training warns; a map that is moved is off by a half."""
    torch.manual_seed(0)
    seg = model.DeepLabV2(name, 2, stride, "none").eval()
    assert seg.stride == cells and encoders.trace_feature(seg.features, cells)[0] < cells / 4


@pytest.mark.quick
def test_a_network_whose_features_are_shifted(capsys):
    for name, is_shifted in (("resnet14t", True), ("convnext_atto", False)):  # average pooling in the shortcuts
        model.create_segmenter("abc", [], name, "none", None, "train", "imagenet", 4, 1)
        assert ("pixels beside the corners" in capsys.readouterr().out) == is_shifted


@pytest.mark.quick
def test_training_is_repeatable_and_uses_all_that_it_trains():
    """No stochastic depth, which FocalNet has in timm, and no parameters without a gradient, at which DDP fails."""
    for name in ("focalnet_tiny_srf", "convnext_atto"):
        seg = model.create_segmenter("abc", [], name, "none", None, "train", "imagenet", 4, 1)
        x = torch.randn(2, 3, 65, 65)
        one, two = seg(x), seg(x)
        assert torch.equal(one, two)
        one.sum().backward()
        assert all(p.grad is not None for p in seg.parameters() if p.requires_grad)


@pytest.mark.quick
@pytest.mark.parametrize("name, stride, said", [
    ("convnext_tinny", None, "no such network; near are convnext_tiny"), ("DINOv2", None, "vit_base_patch14_dinov2"),
    ("resnet18.mine", None, "Invalid pretrained tag"), (VIT, 8, "--stride 8: .*its default, 16"),
    ("resnet34", 12, "--stride 12: .*its default, 16"), ("mixer_s32_224", None, "images of any size: .*near are mixer"),
    ("hrnet_w18_small", None, "images of any size: .*near are hrnet"), ("crossvit_9_240", None, "; near are crossvit")])
def test_a_backbone_that_cannot_serve(name, stride, said):
    with pytest.raises(InputError, match=said) as error:
        encoders.describe_encoder(name, stride)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name, extra", [("vit_small_patch14_dinov2", {"mask_token": torch.zeros(1, 384)}),
                                         ("convnext_atto", {})])  # DINOv2's publishers have a mask token
def test_start_from_a_file_of_timm_or_dinov2(tmp_path, name, extra):
    torch.manual_seed(0)
    weights = timm.create_model(name).state_dict() | extra
    weights = {k: w.contiguous() for k, w in weights.items()}
    torch.save(weights, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        init = str(tmp_path / file)
        assert model.network_defaults(init, name, None)["norm"] == "imagenet"
        seg = model.create_segmenter("abc", [], name, init, None, "train", "imagenet", 4, 1)
        found = [(w, weights[k]) for k, w in seg.backbone.state_dict().items() if w.is_floating_point()]
        assert len(found) > 50 and all(torch.equal(a, b) for a, b in found)
        assert "state_dict" not in seg.backbone.pretrained_cfg  # it would stay in memory
        with pytest.raises(InputError, match=f"--init .*{file}: does not fit resnet18: "):
            model.create_segmenter("abc", [], "resnet18", init, None, "train", "imagenet", 4, 1)


@pytest.mark.quick
def test_weights_of_a_deeper_network(tmp_path):
    weights = timm.create_model("convnext_atto", depths=(2, 2, 8, 2)).state_dict()
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="a.pth: does not fit convnext_atto"):
        model.create_segmenter("abc", [], "convnext_atto", str(tmp_path / "a.pth"), None, "train", "imagenet", 4, 1)


class Hub(BaseHTTPRequestHandler):
    """As the hub answers: files under /NAME/resolve/main/."""

    def do_GET(self):
        body = self.server.files.get(self.path, b"")
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_weights_from_the_hub(tmp_path):
    """They are downloaded once, then also found without a network; without either, a line names the file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    weights = timm.create_model("convnext_atto").state_dict()
    server.files = {"/timm/convnext_atto.d2_in1k/resolve/main/model.safetensors": save(weights)}
    code = ("from common.console import InputError; import model, sys\n"
            "try: seg = model.DeepLabV2(sys.argv[1], 3, None)\n"
            "except InputError as e: sys.exit(str(e))\n"
            "print(seg.backbone.stem[0].weight[0, 0, 0, 0].item())")

    def run(name, url):
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, env=env, capture_output=True, text=True)
    here, nowhere = f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:9"
    for name, url in ("convnext_atto", here), ("convnext_atto.d2_in1k", nowhere):
        done = run(name, url)
        assert float(done.stdout) == weights["stem.0.weight"][0, 0, 0, 0].item(), done.stderr
    server.shutdown()
    done = run("vit_small_patch14_dinov2", nowhere)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("--init imagenet") and "name the file with --init" in said
    assert f"{nowhere}/timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors" in said


@pytest.mark.parametrize("script", ["train_base", "train_match"])
def test_a_frozen_backbone(train, script):
    """Not trained, not in the optimiser, one for student and teacher; also after --resume."""
    start = model.DeepLabV2("efficientnet_lite0", 4, 16).state_dict()
    for words in ["--iters", 2], ["--iters", 3, "--resume"]:
        found = load(train(script, "--freeze-backbone", "--lr", 0.1, *words))
        assert found["step"] == words[1] and len(found["opt_seg"]["state"]) == 8  # weight and bias of 4 convolutions
        for part in {"seg", "student"} & set(found):
            assert all(torch.equal(w, start[k]) for k, w in found[part].items() if k.startswith("backbone."))
            assert not torch.equal(found[part]["head.0.weight"], start["head.0.weight"])
    if script == "train_match":
        shared = [a.data_ptr() == b.data_ptr() for a, b in zip(found["seg"].values(), found["student"].values())]
        assert sum(shared) == len(shared) - 8


def test_a_transformer(train, voc, tmp_path, capsys):
    """Trained, resumed, evaluated, exported, and on the page of the report."""
    flags = "--backbone", VIT, "--init", "none"
    train("train_match", *flags, "--iters", 1)
    out = train("train_match", *flags, "--iters", 2, "--resume")
    ckpt = "--ckpt", out / "last.pt"
    call("eval", *ckpt, "--gpu", -1, "--workers", 0)
    assert capsys.readouterr().out.split()[-1] == f"{load(out)['miou']:.2f}"
    images = sorted((voc / "JPEGImages").glob("val*"))
    call("predict", *ckpt, *images, "--gpu", -1, "--out", tmp_path / "masks")
    call("export", *ckpt, "--out", tmp_path / "net.pt2")
    exported = torch.export.load(tmp_path / "net.pt2").module()
    for image in images:
        pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None]
        mask = np.array(Image.open(tmp_path / f"masks/{image.stem}.png"))
        assert (exported(pixels)[0].numpy() == mask).mean() > 0.999
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    call("predict", *ckpt, tmp_path / "pixel.png", "--gpu", -1, "--out", tmp_path / "masks")
    call("report", out, "--out", tmp_path / "page.html")
