"""Reading and loading checkpoint files: ours, older ones, and the published ones."""
import numpy as np
import pytest
import torch
import torchvision
from conftest import SMALL, call

import model
from common import checkpoint as checkpoint_files
from common import console


class CaffeNet(torchvision.models.ResNet):
    """DeepLabv2 as both public implementations have it, with their names and random weights: stride in the first 1x1 of
    a bottleneck, ceil-mode pooling, dilation in every block of stages 3 and 4."""

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
def theirs():
    return CaffeNet()


@pytest.fixture(scope="module")
def weights(theirs):
    return theirs.weights()


FILES = {  # of those weights
    "authors": dict,
    "authors, two branches": lambda w: {k: v for k, v in w.items() if "list.2" not in k and "list.3" not in k},
    "first implementation": lambda w: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in w.items()},
                                       "miou": np.float64(0.69)},
    "coco": lambda w: {f"Scale.{k}": v for k, v in w.items()},
}


@pytest.fixture
def start(tmp_path):
    """start(contents of a file, or a value of --init, ...) -> (network, {"caffe", "norm"} of the file)."""
    def run(init, backbone="resnet50", num_classes=4, branches=4, norm=None):
        if not isinstance(init, str):
            torch.save(init, tmp_path / "start.pth")
            init = str(tmp_path / "start.pth")
        expected = model.start_format(init)
        classes = [f"class {n}" for n in range(num_classes)]
        return model.create_segmenter(classes, [], backbone, init, 8, "train", norm or expected["norm"], branches,
                                      1), expected
    return run


@pytest.mark.parametrize("origin, branches, norm, blocks", [
    ("authors", 2, "caffe", 6), ("authors, two branches", 2, "caffe", 6), ("first implementation", 4, "imagenet", 6),
    ("coco", 4, "caffe", 23)])
def test_forward_parity(start, tmp_path, origin, branches, norm, blocks):
    """eval.py's and a training's net compute what theirs does; pooling in ceil mode shows at even sizes."""
    theirs, x = CaffeNet((3, 4, blocks, 3)), torch.randn(1, 3, 64, 90, dtype=torch.float64)
    new, _ = start(FILES[origin](theirs.weights()), "resnet50" if blocks == 6 else "resnet101",
                   branches=branches)
    trained = model.load_segmenter(tmp_path / "start.pth")
    assert not trained.training and len(trained.head) == branches and trained.norm == new.norm == norm
    with torch.inference_mode():
        want = theirs.double()(x, branches)
        for seg in (trained, new.eval()):
            torch.testing.assert_close(seg.double()(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", ["coco", "authors"])  # with Scale. before them or not
def test_start_from_coco(weights, start, tmp_path, capsys, monkeypatch, names):
    monkeypatch.setattr(checkpoint_files, "COCO_FILE", tmp_path / "coco.pth")
    with pytest.raises(console.InputError, match="coco.pth"):
        start("coco")
    torch.save(FILES[names](weights), checkpoint_files.COCO_FILE)
    seg, expected = start("coco", branches=2)
    assert expected["caffe"] and len(seg.head) == 2 and "2 of its 4 branches" in capsys.readouterr().out
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    want = [30 - 104.00699, 20 - 116.66877, 10 - 122.67892]
    assert seg.normalise(image).flatten().tolist() == pytest.approx(want, abs=1e-4)
    seg, _ = start("coco", norm="none", num_classes=5)
    said = capsys.readouterr().out
    assert "initialised randomly" in said and "--aspp-branches" not in said and seg.head[0].weight.shape[0] == 5
    assert seg.normalise(image).flatten().tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255])
    assert torch.equal(seg.backbone[8].conv1.weight, weights["layer3.0.conv1.weight"])


def test_start_from_the_authors(weights, start, capsys):
    start(FILES["first implementation"](weights))
    assert "--aspp-branches" not in capsys.readouterr().out
    assert len(start(weights)[0].head) == 4 and "--aspp-branches 2" in capsys.readouterr().out
    seg, _ = start(two := FILES["authors, two branches"](weights), branches=2)
    assert len(seg.head) == 2
    with pytest.raises(console.InputError, match="Missing.*head.2.weight"):
        start(two)


def test_keys_that_do_not_fit_are_listed(weights, start, tmp_path):
    odd = {"layer1": torch.zeros(1), "layer5.other": torch.zeros(1), "conv1.weight": torch.zeros(64, 3, 5, 5)}
    gone = "layer3.5.bn2.bias", "layer5.conv2d_list.0.bias"
    broken = {k: w for k, w in (weights | odd).items() if k not in gone}
    for load in (lambda: start(FILES["coco"](broken)), lambda: model.load_segmenter(tmp_path / "start.pth")):
        with pytest.raises(console.InputError, match="start.pth: .*backbone.13.bn2.bias.*head.0.bias.*Unexpected"
                           ".*layer5.other.*size mismatch for backbone.0.conv1.weight"):
            load()


@pytest.mark.parametrize("broken", [
    {0: torch.zeros(1)}, [torch.zeros(1)], {}, {"conv1.weight": 1}, {"epoch": 1, "state_dict": None, "miou": 0.5},
    {"seg": {}, "args": [], "classes": ["a"], "step": 0}, {"seg": [], "args": {}, "classes": ["a"], "step": 0},
    {"seg": {}, "args": {}, "classes": torch.zeros(2), "step": 0},
    {"seg": {}, "args": {"norm": "odd", "backbone": "resnet50"}, "classes": ["a"], "step": 0}])
def test_files_that_are_no_net(voc, tmp_path, fails, broken):
    torch.save(broken, tmp_path / "broken.pth")
    assert "broken.pth: " in fails("eval", "--ckpt", tmp_path / "broken.pth")
    assert "broken.pth: " in fails("train_base", "--data", voc, *SMALL, "--init", tmp_path / "broken.pth")


def test_an_older_checkpoint_resumes(train):
    file = train("train_base", "--iters", 1) / "last.pt"
    checkpoint = torch.load(file, weights_only=True)
    for name in ("nesterov", "norm", "head_lr", "caffe", "aspp_branches", "decay_every", "weight_decay"):
        del checkpoint["args"][name]
    torch.save(checkpoint | {"disc": None}, file)  # a part that the script does not have
    train("train_base", "--iters", 2, "--resume")
    assert torch.load(file, weights_only=True)["step"] == 2


def test_torchvision_file(start, tmp_path, capsys):
    for name in ("resnet18", "resnet50"):
        net = torchvision.models.get_model(name)
        seg, expected = start(net.state_dict(), backbone=name, num_classes=5)
        assert expected == {"caffe": False, "norm": "imagenet"} and "--aspp-branches" not in capsys.readouterr().out
        assert torch.equal(seg.backbone[1].conv1.weight, net.layer1[0].conv1.weight)
        assert torch.equal(seg.backbone[-1].conv2.weight, net.layer4[-1].conv2.weight)
    with pytest.raises(console.InputError, match="start.pth: an ImageNet classifier"):
        model.load_segmenter(tmp_path / "start.pth")


def test_origin_is_recorded_and_comes_back(theirs, weights, train, voc, tmp_path, capsys):
    """eval.py reads a file of others, and a training from it writes one that is read as Caffe's net again."""
    file, out = tmp_path / "coco.pth", tmp_path / "predictions"
    torch.save(FILES["coco"](weights), file)
    call("eval", "--ckpt", file, "--data", voc, "--gpu", -1, "--workers", 0, "--out", out)
    assert "\nmIoU " in capsys.readouterr().out and (out / "val0.png").exists()
    flags = "--backbone", "resnet50", "--init", file, "--iters", 1, "--lr", 0, "--bn", "frozen", "--no-amp"
    seg, x = model.load_segmenter(train("train_base", *flags) / "last.pt"), torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        torch.testing.assert_close(seg(x), want := theirs(x), rtol=0, atol=1e-4 * float(want.abs().max()))
    assert seg.norm == "caffe"
