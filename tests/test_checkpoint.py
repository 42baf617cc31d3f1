"""Reading and loading checkpoint files: ours, older, published and broken ones."""
import random
import shutil

from common import console

import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL, call, load
from stress import survive

import model


class CaffeNet(torchvision.models.ResNet):
    """DeepLabv2 as both public implementations have it, with random weights: stride in the first 1x1 convolution of a
    bottleneck, ceil-mode pooling, dilation in every block of stages 3 and 4."""

    def __init__(self, depths=(3, 4, 6, 3), classes=4):
        super().__init__(torchvision.models.resnet.Bottleneck, depths)
        self.maxpool.ceil_mode, self.fc = True, torch.nn.Identity()
        for layer, stride, dilation in ((self.layer2, 2, 1), (self.layer3, 1, 2), (self.layer4, 1, 4)):
            for block in layer:
                block.conv2.stride, block.conv2.dilation, block.conv2.padding = 1, dilation, dilation
            layer[0].conv1.stride = layer[0].downsample[0].stride = stride
        self.layer5 = torch.nn.Module()
        self.layer5.conv2d_list = torch.nn.ModuleList(
            torch.nn.Conv2d(2048, classes, 3, padding=rate, dilation=rate) for rate in (6, 12, 18, 24))
        for x in self.eval().state_dict().values():
            if x.dim() == 1:
                x.uniform_(0.5, 1.5)

    def forward(self, x, branches=4):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        x = self.layer4(self.layer3(self.layer2(x)))
        return sum(conv(x) for conv in self.layer5.conv2d_list[:branches])

    def weights(self):
        return {k: w for k, w in self.state_dict().items() if "num_batches" not in k}  # PyTorch had none in 2017


@pytest.fixture(scope="module")
def weights():
    return CaffeNet().weights()


FILES = {  # function weights -> contents of the published file
    "authors, two branches": lambda w: {k: v for k, v in w.items() if "list.2" not in k and "list.3" not in k},
    "first implementation": lambda w: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in w.items()},
                                       "miou": np.float64(0.69)},
    "coco": lambda w: {f"Scale.{k}": v for k, v in w.items()},
}


@pytest.fixture
def start(tmp_path):
    """start(contents of a file, or a value of --init) -> (network, the file's {"caffe": ..., "norm": ...})."""
    def run(init, backbone="resnet50", num_classes=4, branches=4, norm=None):
        if not isinstance(init, str):
            torch.save(init, tmp_path / "start.pth")
            init = str(tmp_path / "start.pth")
        expected = model.network_defaults(init, backbone, 8)
        classes = [f"class {n}" for n in range(num_classes)]
        norm = norm or expected["norm"]
        return model.create_segmenter(classes, [], backbone, init, 8, "train", norm, branches, 1), expected
    return run


@pytest.mark.parametrize("origin, branches, norm, blocks", [
    ("authors, two branches", 2, "caffe", 6), ("first implementation", 4, "imagenet", 6), ("coco", 4, "caffe", 23)])
def test_published_weights_give_the_published_logits(start, tmp_path, origin, branches, norm, blocks):
    """In eval.py and at the start of a training; at even sizes pooling in ceil mode makes a difference."""
    theirs, x = CaffeNet((3, 4, blocks, 3)), torch.randn(1, 3, 64, 90, dtype=torch.float64)
    new, _ = start(FILES[origin](theirs.weights()), "resnet50" if blocks == 6 else "resnet101", branches=branches)
    loaded = model.load_segmenter(tmp_path / "start.pth")
    assert not loaded.training and len(loaded.head) == branches and loaded.norm == new.norm == norm
    with torch.inference_mode():
        want = theirs.double()(x, branches)
        for seg in (loaded, new.eval()):
            torch.testing.assert_close(seg.double()(x), want, rtol=0, atol=1e-5)


def test_start_from_coco(weights, start, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(console.InputError, match="--init coco: .*MS_DeepLab_resnet_pretrained_COCO_init.pth"):
        start("coco")
    (tmp_path / "data").mkdir()
    torch.save(FILES["coco"](weights), tmp_path / "data/MS_DeepLab_resnet_pretrained_COCO_init.pth")
    seg, expected = start("coco", branches=2)
    assert expected["caffe"] and len(seg.head) == 2 and "2 of its 4 branches" in capsys.readouterr().out
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    want = [30 - 104.00699, 20 - 116.66877, 10 - 122.67892]
    assert seg.normalise(image).flatten().tolist() == pytest.approx(want, abs=1e-4)
    seg, _ = start("coco", norm="none", num_classes=5)
    assert len(seg.head[0].weight) == 5 and "initialised randomly" in capsys.readouterr().out
    assert seg.normalise(image).flatten().tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255])
    assert torch.equal(seg.backbone.layer3[0].conv1.weight, weights["layer3.0.conv1.weight"])


def test_start_from_the_authors(weights, start, capsys):
    assert len(start(weights)[0].head) == 4 and "--aspp-branches 2" in capsys.readouterr().out
    with pytest.raises(console.InputError, match="head.2.weight"):
        start(FILES["authors, two branches"](weights))


def test_keys_that_do_not_fit_are_listed(weights, start):
    odd = {"layer5.other": torch.zeros(1), "conv1.weight": torch.zeros(64, 3, 5, 5)}
    broken = {k: w for k, w in (weights | odd).items() if k != "layer3.5.bn2.bias"}
    with pytest.raises(console.InputError, match="start.pth: .*layer3.5.bn2.bias.*layer5.other.*backbone.conv1"):
        start(FILES["coco"](broken))


class Payload:
    def __reduce__(self):  # what unpickling runs
        return exec, ("raise SystemExit('the file ran code')",)


@pytest.mark.parametrize("contents", [
    b"no checkpoint", {"seg": Payload()}, None, {0: torch.zeros(1)}, [torch.zeros(1)], {}, {"conv1.weight": 1},
    {"epoch": 1, "state_dict": None, "miou": 0.5},
    *({"seg": {}, "args": {}, "classes": ["a"], "step": 0} | part for part in (
        {"args": []}, {"seg": []}, {"classes": torch.zeros(2)}, {"step": None}, {"args": {"norm": "odd"}}))])
def test_broken_checkpoints_are_refused(trained, blocks, tmp_path, fails, contents):
    file = tmp_path / "last.pt"
    if contents is None:
        file.write_bytes((trained["train_base"] / "last.pt").read_bytes()[:100000])
    elif isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        torch.save(contents, file)
    assert str(file) in fails("eval", "--ckpt", file)
    for words in (["--init", file], ["--resume"]):
        assert str(file) in fails("train_base", "--data", blocks, *SMALL, "--out", tmp_path, *words)


def test_damaged_checkpoints(trained, tmp_path):
    """Each is loaded, or refused in one line; 300 of them, resumed too: tests/stress/survive.py."""
    shutil.copytree(trained["train_base"], tmp_path / "start")
    outcomes = [survive.checkpoints(tmp_path, random.Random(n), 0) for n in range(20)]
    assert {*outcomes} == {"refused", "survived"}


def test_a_checkpoint_and_data_that_do_not_fit(trained, voc, fails):
    ckpt = trained["train_base"] / "last.pt"
    assert "test.txt" in fails("eval", "--ckpt", ckpt, "--list", "test")
    (voc / "classes.txt").write_text("grey\nred\ngreen\nblue\nextra\n")
    assert f"{ckpt}: 4 classes" in fails("eval", "--ckpt", ckpt, "--data", voc)
    assert "--resume" in fails("train_base", "--data", voc, *SMALL, "--out", ckpt.parent, "--resume")


def test_older_checkpoints(train, voc, fails):
    """Of 2d4c1d6: parts that a script lacked were None, flags were fewer, and one of them is gone."""
    out = train("train_base", "--iters", 1)
    old = load(out) | {"disc": None, "opt_disc": None}
    del old["minutes"]
    for name in ("nesterov", "norm", "head_lr", "caffe", "aspp_branches", "decay_every", "weight_decay", "palette"):
        del old["args"][name]
    old["args"] |= {"d_input": "soft", "recipes": None}
    torch.save(old, out / "last.pt")
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--workers", 0)
    train("train_base", "--init", out / "last.pt", "--iters", 1, out="again")
    command = "--data", voc, *SMALL, "--out", out, "--resume", "--iters", 2
    assert "--d-input" in fails("train_base", *command)
    old["args"]["d_input"] = None
    torch.save(old, out / "last.pt")
    call("train_base", *command)
    assert load(out)["step"] == 2


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_a_checkpoint_with_older_names(train, tmp_path, name):
    """Of 41a173e: the backbone's layers have the same order, but numbers for names."""
    out = train("train_base", "--backbone", name, "--init", "none", "--crop", 65, "--iters", 1)
    old, seg, x = load(out), model.load_segmenter(out / "last.pt"), torch.randn(1, 3, 65, 65)
    names = [k for k in old["seg"] if k.startswith("backbone.")]
    renamed = {f"backbone.{n}.layers.{k.rpartition('.')[2]}": old["seg"].pop(k) for n, k in enumerate(names)}
    for missing in ((), ("head.3.weight", "head.3.bias")):
        old["seg"] = renamed | {k: w for k, w in old["seg"].items() if k not in missing}
        torch.save(old, out / "last.pt")
        if not missing:
            assert torch.equal(model.load_segmenter(out / "last.pt")(x), seg(x))
            train("train_base", "--backbone", name, "--init", "none", "--crop", 65, "--iters", 2, "--resume")
            continue
        with pytest.raises(console.InputError, match="head.3.weight"):
            model.load_segmenter(out / "last.pt")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_torchvision_file(start, tmp_path, name):
    theirs = torchvision.models.get_model(name)
    seg, expected = start(theirs.state_dict(), backbone=name, num_classes=5)
    assert expected == {"caffe": False, "norm": "imagenet", "stride": 8}
    assert torch.equal(seg.backbone.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight)
    assert torch.equal(seg.backbone.layer4[-1].conv2.weight, theirs.layer4[-1].conv2.weight)
    with pytest.raises(console.InputError, match="start.pth: an ImageNet classifier"):
        model.load_segmenter(tmp_path / "start.pth")


def test_a_training_from_a_published_file(weights, train, tmp_path):
    """It writes a checkpoint that is read as Caffe's network again."""
    file = tmp_path / "coco.pth"
    torch.save(FILES["coco"](weights), file)
    flags = "--backbone", "resnet50", "--init", file, "--iters", 1, "--lr", 0, "--bn", "frozen", "--no-amp"
    seg, x = model.load_segmenter(train("train_base", *flags) / "last.pt"), torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        torch.testing.assert_close(seg(x), model.load_segmenter(file)(x))
