"""The recipes run, the flags that they need do what they say, and the files of others load."""
import argparse
import importlib
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, log

import cli
import common
import data
import model
import train_adv
import train_base

RECIPES = sorted((ROOT / "recipes").glob("*.txt"))
TINY = "--backbone efficientnet_lite0 --init none --crop 65 --batch-size 1 --iters 2 --log-every 1 --workers 0 --gpu -1".split()


def about(recipe):
    return dict(line[2:].split(": ", 1) for line in recipe.read_text().splitlines() if line.startswith("# "))


def settings(*words, script=train_base):
    return script.flags().parse_args([str(w) for w in words])


def flags_in(name):
    recipe = ROOT / f"recipes/{name}.txt"
    return vars(settings(f"@{recipe}", script=importlib.import_module(about(recipe)["script"].removesuffix(".py"))))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_two_steps(recipe, voc, tmp_path):
    script = importlib.import_module(about(recipe)["script"].removesuffix(".py"))
    script.main(script.flags().parse_args([f"@{recipe}", "--data", str(voc), *TINY, "--out", str(tmp_path / "out")]))
    rows = log(tmp_path / "out")
    assert [r["step"] for r in rows] == [1, 2] and "miou" in rows[-1]


def test_all_rows_are_there_and_in_the_readme(capsys):
    names = {f.stem for f in RECIPES}
    assert names >= {f"base{n}" for n in (101, 102, 103, 104, 105, 110, 111)}
    assert names >= {f"adv{n}" for n in (101, 102, 103, 104, 105, "105-cuda", 106, 201, 202, 203, 204)}
    assert len([n for n in names if n.startswith("paper_")]) >= 6 and len([n for n in names if n.startswith("final_")]) == 11
    rows = (ROOT / "README.md").read_text().splitlines()
    with pytest.raises(SystemExit):
        settings("--recipes")
    said = capsys.readouterr().out
    for recipe in RECIPES:
        command = f"python {about(recipe)['script']} @recipes/{recipe.name}"
        assert command in said and f"published {about(recipe)['published']}" in said
        row, = [r for r in rows if r.startswith(f"| `{command} ")]
        published = re.findall(r"[\d.]{5}|\d\d\.\d", about(recipe)["published"])
        assert re.findall(r"[\d.]{5}|\d\d\.\d", row.split("|", 2)[2]) == published, row


BASE, ADV, FINAL = "base104", "adv202", "final_semi_2"
DIFFERS = {  # row by row: from which other one, and in what
    "base101": (BASE, dict(decay_every=10, upsample="learned")), "base102": (BASE, dict(decay_every=0)),
    "base103": (BASE, dict(decay_every=10)), "base105": (BASE, dict(norm="imagenet")),
    "base110": (BASE, dict(norm="imagenet", init="imagenet", bn="train")),
    "base111": (BASE, dict(norm="imagenet", init="imagenet", bn="train", head_lr=10)),
    "adv101": (ADV, dict(d_optim="sgd", d_decay=1e-4, d_smooth=0)),
    "adv102": (ADV, dict(d_optim="sgd", d_decay=1e-4, d_smooth=0.25)),
    "adv103": (ADV, dict(d_smooth=0.25)), "adv104": (ADV, dict(norm="none", d_optim="sgd", d_decay=1e-4, d_smooth=0.25)),
    "adv105": (ADV, dict(norm="none", d_smooth=0.25)), "adv106": (ADV, dict(norm="none", d_smooth=0.25, batch_size=21)),
    "adv105-cuda": (ADV, dict(d_optim="sgd", d_decay=1e-4, d_smooth=0.25, batch_size=21)), "adv201": (ADV, dict(d_smooth=0.25)),
    "adv203": (ADV, {}), "adv204": (ADV, dict(d_lr=1e-5)), "final_adv_full": (ADV, dict(bn="train")),
    "final_semi_8": (FINAL, dict(split=0.125)), "final_semi_4": (FINAL, dict(split=0.25)),
}


def test_recipes_say_what_their_rows_say():
    a, base = flags_in(ADV), flags_in(BASE)
    for name, value in dict(split=1, init="coco", norm="imagenet", bn="no-grad", drop_last=True, head_lr=1, decay_every=1,
                            d_lr=1e-4, d_optim="adam", d_smooth=0.1, lr=2.5e-4, batch_size=10, iters=20000,
                            lam_adv=0.01).items():
        assert a[name] == value and base.get(name, value) == ("none" if name == "norm" else value), name
    for name, (other, changes) in DIFFERS.items():
        other = flags_in(other)
        assert {k: v for k, v in flags_in(name).items() if v != other[k]} == changes, name
    semi = flags_in(FINAL)
    assert [semi[k] for k in ("split", "lam_semi", "threshold", "semi_start", "lam_adv_u")] == [0.5, 0.2, 0.2, 5000, 0]
    semi = flags_in("paper_voc_semi")
    assert [semi[k] for k in ("lam_semi", "threshold", "semi_start", "init")] == [0.1, 0.2, 5000, "imagenet"]


def test_rates_decay_every_k_steps_or_never():
    rates = {}
    for every in (1, 10, 0):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        rates[every] = []
        for done in range(40):
            common.poly_lr(optimizer, done, types.SimpleNamespace(iters=40, decay_every=every))
            rates[every].append(optimizer.param_groups[0]["lr"])
    assert rates[1] == pytest.approx([(1 - d / 40) ** 0.9 for d in range(40)]) and rates[0] == [1.0] * 40
    assert rates[10] == pytest.approx([1.0] * 10 + [0.75 ** 0.9] * 10 + [0.5 ** 0.9] * 10 + [0.25 ** 0.9] * 10)


@pytest.mark.parametrize("stride", [8, 16])
def test_learned_upsampling_starts_as_bilinear(stride):
    logits = torch.randn(2, 5, 9, 12)
    up = model.bilinear_deconvolution(5, stride)
    size = tuple(stride * (n - 1) + 1 for n in logits.shape[2:])
    torch.testing.assert_close(up(logits), F.interpolate(logits, size, mode="bilinear", align_corners=True), rtol=0, atol=1e-5)
    seg = model.DeepLabV2("resnet18", 5, 8, "none", upsample="learned")
    assert seg(torch.randn(1, 3, 65, 73)).shape == (1, 5, 65, 73) and seg.up.weight.requires_grad
    optimizer = model.seg_optimizer(seg, settings("--lr", 1e-3))
    assert any(p is seg.up.weight for p in optimizer.param_groups[1]["params"])


def test_flags_of_the_optimisers():
    seg = model.DeepLabV2("resnet18", 5, 8, "none", branches=2)
    assert len(seg.head) == 2
    optimizer = model.seg_optimizer(seg, settings("--lr", 1e-3, "--head-lr", 1, "--no-nesterov", "--weight-decay", 5e-4))
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3]
    assert all(not g["nesterov"] and g["weight_decay"] == 5e-4 and g["momentum"] == 0.9 for g in optimizer.param_groups)
    disc = model.Discriminator(5)
    adam = model.disc_optimizer(disc, settings("--d-lr", 1e-4, "--d-betas", 0.9, 0.99, "--d-decay", 0.1, script=train_adv))
    assert adam.defaults["betas"] == (0.9, 0.99) and adam.defaults["weight_decay"] == 0.1
    sgd = model.disc_optimizer(disc, settings("--d-lr", 1, "--d-optim", "sgd", "--d-momentum", 0.9, script=train_adv))
    assert sgd.defaults["momentum"] == 0.9 and sgd.defaults["weight_decay"] == 1e-4


def test_pixels():
    picture = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    for norm, want in (("none", [10 / 255, 20 / 255, 30 / 255]), ("caffe", [30 - 104.00699, 20 - 116.66877, 10 - 122.67892])):
        seg = model.DeepLabV2("resnet18", 5, 8, "none", norm=norm)
        assert seg.normalise(picture).flatten().tolist() == pytest.approx(want, abs=1e-4)


def test_drop_last(voc):
    dataset, _ = data.open_data(str(voc))
    samples = dataset.samples(dataset.train_ids())

    def drawn(draws, *flags):  # which pictures
        args = settings("--crop", 65, "--batch-size", 3, *flags)
        args.input_scale, args.scale = 1, (1, 1)
        stream = data.Stream(samples, args, "labelled")
        for n in draws:
            stream[n]
            epoch, position = divmod(n, stream.epoch)
            yield epoch, stream.order[1][position]
    whole, cut = (list(drawn(range(24), *flags)) for flags in ([], ["--drop-last"]))
    assert [e for e, _ in whole] == [n // 8 for n in range(24)] and [e for e, _ in cut] == [n // 6 for n in range(24)]
    assert cut[:6] == whole[:6] and {p for _, p in cut[6:12]} <= set(range(8))
    with pytest.raises(cli.InputError, match="--drop-last: 8 labelled pictures are no batch of 9"):
        list(drawn([0], "--drop-last", "--batch-size", 9))


def test_semi_from_an_epoch_on(train):
    out = train("train_semi", "--iters", 4, "--split", 0.5, "--batch-size", 2, "--semi-start-epoch", 1.5)  # 4 labelled
    assert torch.load(out / "last.pt", weights_only=True)["args"]["semi_start"] == 3


# ---- the files of others ----

def caffe_names(classes=21, depths=(3, 4, 23, 3), branches=4):
    """{key: shape} of DeepLabv2 as both public implementations name it."""
    keys = {}

    def conv(name, *shape):
        keys[name + ".weight"] = shape

    def norm(name, n):
        keys.update({f"{name}.{part}": (n,) for part in ("weight", "bias", "running_mean", "running_var")})
    conv("conv1", 64, 3, 7, 7), norm("bn1", 64)
    width = 64
    for layer, depth in enumerate(depths, 1):
        planes = 32 * 2 ** layer
        for i in range(depth):
            name = f"layer{layer}.{i}"
            for j, shape in enumerate([(planes, width, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)], 1):
                conv(f"{name}.conv{j}", *shape), norm(f"{name}.bn{j}", shape[0])
            if i == 0:
                conv(f"{name}.downsample.0", 4 * planes, width, 1, 1), norm(f"{name}.downsample.1", 4 * planes)
            width = 4 * planes
    for i in range(branches):
        keys[f"layer5.conv2d_list.{i}.weight"], keys[f"layer5.conv2d_list.{i}.bias"] = (classes, 2048, 3, 3), (classes,)
    return keys


def random_weights(keys):
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in keys.items():
        if len(shape) == 4:
            found[name] = torch.randn(shape, generator=g) / math.sqrt(shape[1] * shape[2] * shape[3])
        else:
            found[name] = torch.rand(shape, generator=g) * 0.5 + (0.75 if name.endswith(("running_var", "weight")) else -0.25)
    return found


def caffe_forward(w, x, branches, depths=(3, 4, 23, 3)):
    """DeepLabv2 by hand: stride in the first 1x1 of a bottleneck, ceil-mode pooling, dilation in every block of stages 3, 4."""
    def norm(name, x):
        return F.batch_norm(x, *(w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))
    x = F.max_pool2d(norm("bn1", F.conv2d(x, w["conv1.weight"], stride=2, padding=3)).relu(), 3, 2, 1, ceil_mode=True)
    for layer, depth in enumerate(depths, 1):
        dilation = {3: 2, 4: 4}.get(layer, 1)
        for i in range(depth):
            name, stride = f"layer{layer}.{i}", 2 if layer == 2 and i == 0 else 1
            y = norm(f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride)).relu()
            y = norm(f"{name}.bn2", F.conv2d(y, w[f"{name}.conv2.weight"], padding=dilation, dilation=dilation)).relu()
            y = norm(f"{name}.bn3", F.conv2d(y, w[f"{name}.conv3.weight"]))
            if i == 0:
                x = norm(f"{name}.downsample.1", F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride))
            x = (x + y).relu()
    return sum(F.conv2d(x, w[f"layer5.conv2d_list.{i}.weight"], w[f"layer5.conv2d_list.{i}.bias"], padding=r, dilation=r)
               for i, r in enumerate((6, 12, 18, 24)[:branches]))


@pytest.fixture(scope="module")
def weights():
    return random_weights(caffe_names())


@pytest.mark.parametrize("origin, branches, norm", [("authors", 2, "caffe"), ("authors, two branches", 2, "caffe"),
                                                    ("first implementation", 4, "imagenet"), ("coco", 4, "caffe")])
def test_forward_parity(weights, tmp_path, origin, branches, norm):
    theirs = dict(weights)
    if origin == "authors, two branches":
        theirs = {k: w for k, w in weights.items() if not k.startswith(("layer5.conv2d_list.2", "layer5.conv2d_list.3"))}
    if origin == "first implementation":
        theirs = {"epoch": 3, "state_dict": {f"module.{k}": w for k, w in weights.items()}, "miou": np.float64(0.69)}
    if origin == "coco":
        theirs = {f"Scale.{k}": w for k, w in weights.items()}
    torch.save(theirs, tmp_path / "theirs.pth")
    seg = model.load_segmenter(tmp_path / "theirs.pth")
    assert not seg.training and len(seg.head) == branches and seg.norm == norm
    for size in ((65, 97), (64, 90)):  # pooling in ceil mode shows at even sizes
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.inference_mode():
            ours, want = seg.double()(x), caffe_forward({k: w.double() for k, w in weights.items()}, x, branches)
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["Scale.", ""])
def test_start_from_coco(weights, tmp_path, capsys, monkeypatch, prefix):
    file = tmp_path / "coco.pth"
    torch.save({prefix + k: w for k, w in weights.items()}, file)
    monkeypatch.setattr(model, "COCO_FILE", file)
    args = settings("--init", "coco", "--backbone", "resnet101", "--aspp-branches", 2, "--stride", 8)
    seg = model.new_segmenter(args, 21)
    assert args.caffe and args.norm == "caffe" and len(seg.head) == 2 and "2 of its 4 branches" in capsys.readouterr().out
    assert torch.equal(seg.head[1].weight, weights["layer5.conv2d_list.1.weight"])
    assert torch.equal(seg.backbone[8].conv1.weight, weights["layer3.0.conv1.weight"])
    assert seg.backbone[4].conv1.stride == (2, 2)
    args = settings("--init", file, "--backbone", "resnet101", "--norm", "none", "--stride", 8)
    seg = model.new_segmenter(args, 5)
    assert args.norm == "none" and "starts anew" in capsys.readouterr().out and seg.head[0].weight.shape[0] == 5
    assert torch.equal(seg.backbone[0].bn1.running_mean, weights["bn1.running_mean"])


def test_keys_that_do_not_fit_are_listed(weights, tmp_path):
    file, broken = tmp_path / "a.pth", {f"Scale.{k}": w for k, w in weights.items() if k != "layer3.7.bn2.bias"}
    broken["Scale.layer5.other"] = torch.zeros(1)
    broken["Scale.conv1.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(broken, file)
    for load in (lambda: model.load_segmenter(file),
                 lambda: model.new_segmenter(settings("--init", file, "--backbone", "resnet101", "--stride", 8), 21)):
        with pytest.raises(cli.InputError) as error:
            load()
        for part in ("missing: backbone.15.bn2.bias", "left over: backbone.0.layer5.other", "shape: backbone.0.conv1.weight"):
            assert part in str(error.value)
    with pytest.raises(cli.InputError, match="missing|another shape"):
        model.new_segmenter(settings("--init", file, "--backbone", "resnet50", "--stride", 8), 21)


def test_start_from_the_two_implementations(weights, tmp_path, capsys):
    torch.save(weights, tmp_path / "whole.pth")
    snapshot = {"epoch": 3, "state_dict": {f"module.{k}": w for k, w in weights.items()}, "miou": np.float64(0.69)}
    torch.save(snapshot, tmp_path / "first.pth")
    two = {k: w for k, w in weights.items() if "list.2" not in k and "list.3" not in k}
    torch.save(two, tmp_path / "authors.pth")
    seg = model.new_segmenter(settings("--init", tmp_path / "first.pth", "--backbone", "resnet101", "--stride", 8), 21)
    assert torch.equal(seg.head[3].weight, weights["layer5.conv2d_list.3.weight"])
    flags = "--init", tmp_path / "authors.pth", "--backbone", "resnet101", "--stride", 8
    capsys.readouterr()
    whole = model.new_segmenter(settings("--init", tmp_path / "whole.pth", *flags[2:]), 21)
    assert len(whole.head) == 4 and "give --aspp-branches 2" in capsys.readouterr().out
    seg = model.new_segmenter(settings(*flags, "--aspp-branches", 2, "--upsample", "learned"), 21)
    assert torch.equal(seg.head[1].bias, weights["layer5.conv2d_list.1.bias"])
    assert seg(torch.zeros(1, 3, 65, 65)).shape == (1, 21, 65, 65)
    with pytest.raises(cli.InputError, match="missing: head.2.bias, head.2.weight, head.3.bias, head.3.weight;"):
        model.new_segmenter(settings(*flags), 21)


def test_eval_reads_a_file_of_others(voc, tmp_path, capsys):
    import eval as script
    small = random_weights(caffe_names(4, (3, 4, 6, 3)))
    torch.save(small, tmp_path / "authors.pth")
    words = ["--ckpt", tmp_path / "authors.pth", "--data", voc, "--gpu", -1, "--workers", 0, "--out", tmp_path / "out"]
    script.main(script.flags().parse_args([str(w) for w in words]))
    assert "\nmIoU " in capsys.readouterr().out and (tmp_path / "out/val0.png").exists()


@pytest.mark.parametrize("what, broken", [
    ("numbers for names", {0: torch.zeros(1)}), ("a list", [torch.zeros(1)]), ("nothing", {}),
    ("no tensors", {"conv1.weight": 1}),
    ("args a list", {"seg": {}, "args": [], "classes": ["a", "b"], "step": 0}),
    ("seg a list", {"seg": [], "args": {}, "classes": ["a", "b"], "step": 0}),
    ("odd norm", {"seg": {}, "args": {"norm": "odd", "backbone": "resnet50"}, "classes": ["a"], "step": 0}),
    ("no weights", {"epoch": 1, "state_dict": None, "miou": 0.5})])
def test_files_that_are_no_net(voc, tmp_path, fails, what, broken):
    torch.save(broken, tmp_path / "broken.pth")
    assert "broken.pth: " in fails("eval", "--ckpt", tmp_path / "broken.pth")
    flags = "--init", tmp_path / "broken.pth", "--out", tmp_path / "out"
    assert "broken.pth: " in fails("train_base", "--data", voc, *SMALL, *flags)


def test_a_classifier_that_is_cut_is_an_error(weights, tmp_path):
    keys = dict(weights)
    del keys["layer5.conv2d_list.0.bias"]
    keys |= {"layer1": torch.zeros(1), "layer_norm.weight": torch.zeros(1)}
    torch.save({f"Scale.{k}": w for k, w in keys.items()}, tmp_path / "cut.pth")
    for load in (lambda f: model.load_segmenter(f),
                 lambda f: model.new_segmenter(settings("--init", f, "--backbone", "resnet101", "--stride", 8), 21)):
        with pytest.raises(cli.InputError, match="missing: head.0.bias; left over: backbone.0.layer1, backbone.0.layer_"):
            load(tmp_path / "cut.pth")


def test_an_older_checkpoint_resumes_with_its_flags(train, fails, voc):
    out = train("train_base", "--iters", 2)
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    for name in ("nesterov", "norm", "head_lr", "caffe", "aspp_branches", "upsample", "decay_every", "weight_decay"):
        del checkpoint["args"][name]
    torch.save(checkpoint, out / "last.pt")
    for flags in (["--no-nesterov"], ["--norm", "none"], ["--head-lr", 1]):
        assert "--resume: --" in fails("train_base", "--data", voc, *SMALL, "--out", out, "--resume", "--iters", 4, *flags)
    train("train_base", "--iters", 4, "--resume")


def test_torchvision_file(tmp_path):
    import torchvision
    net = torchvision.models.resnet50(weights=None)
    torch.save(net.state_dict(), tmp_path / "resnet50.pth")
    args = settings("--init", tmp_path / "resnet50.pth", "--backbone", "resnet50", "--stride", 8)
    seg = model.new_segmenter(args, 5)
    assert not args.caffe and args.norm == "imagenet" and torch.equal(seg.backbone[1].conv1.weight, net.layer1[0].conv1.weight)
    with pytest.raises(cli.InputError, match="without a classifier"):
        model.load_segmenter(tmp_path / "resnet50.pth")
    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    seg = model.new_segmenter(settings("--init", tmp_path / "resnet18.pth", "--backbone", "resnet18", "--stride", 8), 5)
    assert torch.equal(seg.backbone[8].conv2.weight, net.layer4[1].conv2.weight)


def test_origin_is_recorded_and_comes_back(weights, voc, tmp_path):
    """A training from Caffe's weights writes a checkpoint that eval.py reads as Caffe's net."""
    small = random_weights(caffe_names(4, (3, 4, 6, 3)))
    torch.save({f"Scale.{k}": w for k, w in small.items()}, tmp_path / "coco50.pth")
    words = ["--data", voc, *SMALL, "--backbone", "resnet50", "--init", tmp_path / "coco50.pth", "--iters", 1, "--lr", 0,
             "--bn", "frozen", "--out", tmp_path / "out", "--no-amp"]
    train_base.main(settings(*words))
    seg, x = model.load_segmenter(tmp_path / "out/last.pt"), torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        torch.testing.assert_close(seg(x), caffe_forward(small, x, 4, (3, 4, 6, 3)), rtol=1e-4, atol=1e-4)
    assert seg.norm == "caffe" and argparse.Namespace(**torch.load(tmp_path / "out/last.pt", weights_only=True)["args"]).caffe
