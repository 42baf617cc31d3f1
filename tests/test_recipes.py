"""The recipes say what their rows say, the flags that they need do what they say, and the files of others load."""
import importlib
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, SMALL, log
from PIL import Image

import cli
import common
import data
import eval as evaluation
import model
import train_adv
import train_base
import train_semi

RECIPES = sorted((ROOT / "recipes").glob("*.txt"))
RUN = "base101", "adv101", "final_semi_2", "paper_cityscapes_base"  # the other recipes take the same paths


def about(recipe):
    return dict(line[2:].split(": ", 1) for line in recipe.read_text().splitlines() if line.startswith("# "))


def script_of(recipe):
    return importlib.import_module(about(recipe)["script"].removesuffix(".py"))


def settings(*words, script=train_base):
    return script.flags().parse_args([str(w) for w in words])


def settled(*words, script=train_base, defaults=data.VOC_DEFAULTS):
    args = settings(*words, script=script)
    common.settle(args, types.SimpleNamespace(defaults=defaults, own=False), ["id"] * 8)
    return args


# ---- recipes ----

PAPER = dict(split=0.125, init="imagenet", backbone="resnet101", crop=321, bn="train", batch_size=10, iters=20000,
             lr=2.5e-4, head_lr=1, nesterov=True, weight_decay=1e-4, lam_adv=0.01, d_optim="adam", d_lr=1e-4,
             d_betas=[0.9, 0.999], d_smooth=0, lam_adv_u=0, lam_semi=0.1, threshold=0.2, semi_start=5000)
FIRST = PAPER | dict(split=1, init="coco", norm="imagenet", bn="no-grad", drop_last=True, d_smooth=0.1, lam_semi=0.2)
PIXELS, BN, SMOOTH, LARGE = dict(norm="none"), dict(bn="train"), dict(d_smooth=0.25), dict(batch_size=21)
SGD, STREET = (dict(d_optim="sgd", d_momentum=0.5, d_decay=1e-4),
               dict(crop=513, scale=[1, 1], input_scale=0.5, batch_size=2, iters=40000))
ANIMALS = PAPER | dict(backbone="efficientnet_lite0", crop=161, batch_size=8, iters=1200, lr=2e-3, head_lr=10,
                       d_input="soft", d_target="right", d_smooth=None, lam_adv_u=0, lam_semi=1, trust=0.7,
                       strong=True, threshold=None, semi_start=200, ema=0.99, confidence=0.8, lam_u=2,
                       u_start=150, cutmix=0)
ROWS = {  # what a row has beside PAPER, ANIMALS or FIRST; all other flags have the scripts' defaults
    "base101": PIXELS | dict(decay_every=10, upsample="learned"), "base102": PIXELS | dict(decay_every=0),
    "base103": PIXELS | dict(decay_every=10), "base104": PIXELS, "base105": {}, "base110": BN | dict(init="imagenet"),
    "base111": BN | dict(init="imagenet", head_lr=10), "adv101": SGD | dict(d_smooth=0), "adv102": SGD | SMOOTH,
    "adv103": SMOOTH, "adv104": SGD | SMOOTH | PIXELS, "adv105": SMOOTH | PIXELS, "adv105-cuda": SGD | SMOOTH | LARGE,
    "adv106": SMOOTH | PIXELS | LARGE, "adv201": SMOOTH, "adv202": {}, "adv203": {}, "adv204": dict(d_lr=1e-5),
    "final_base_full": BN, "final_adv_full": BN,
    **{f"final_{kind}_{n}": BN | dict(split=1 / n) for kind in ("base", "adv", "semi") for n in (2, 4, 8)},
    **{f"paper_{at}_{kind}": STREET if at == "cityscapes" else {} for at in ("voc", "cityscapes")
       for kind in ("base", "adv", "semi")},
    **{f"animals_{kind}_{n}": dict(split=1 / n) for n in (8, 32)
       for kind in ("base", "adv", "semi", "match")},
}


@pytest.mark.quick
def test_all_rows_are_there_and_in_the_readme(capsys):
    assert {f.stem for f in RECIPES} == ROWS.keys()
    rows = (ROOT / "recipes/README.md").read_text().splitlines()
    with pytest.raises(SystemExit):
        settings("--recipes")
    said = capsys.readouterr().out
    for recipe in RECIPES:
        command, published = f"python {about(recipe)['script']} @recipes/{recipe.name}", about(recipe)["published"]
        assert command in said and f"published {published}" in said
        row, = [r for r in rows if r.startswith(f"| `{command} ")]
        number = r"[\d.]{5}|\d\d\.\d"
        assert re.findall(number, row.split("|", 2)[2]) == re.findall(number, published), row


@pytest.mark.quick
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_recipes_say_what_their_rows_say(recipe):
    script = script_of(recipe)
    got, default = (vars(settings(*words, script=script)) for words in ([f"@{recipe}"], []))
    row = {"paper": PAPER, "animals": ANIMALS}.get(recipe.stem.split("_")[0], FIRST) | ROWS[recipe.stem]
    assert got == default | {k: v for k, v in row.items() if k in default}
    # other data fill in what a recipe leaves open and nothing else; start weights are not at hand
    after = vars(settled(f"@{recipe}", "--init", "none", script=script, defaults=data.SHAPES_DEFAULTS))
    assert {k for k, v in got.items() if v is not None and after[k] != v} == {"init"}


@pytest.mark.quick
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_a_recipe_says_only_what_changes(recipe):
    lines = [line.split("#")[0].split() for line in recipe.read_text().splitlines() if not line.startswith("#")]
    inherited = [f"@{recipe.parent / line[0][1:]}" for line in lines if line[0].startswith("@")]
    assert len(inherited) <= 1 and lines[0][0].startswith("@") == bool(inherited) and len(lines) <= 11
    parser, silent = script_of(recipe).flags(), object()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([])), silent))

    def said(words):
        return {k: v for k, v in vars(parser.parse_args(words)).items() if v is not silent}
    known = said(inherited)
    for line in lines[len(inherited):]:
        (name, value), = said(line).items()  # one flag a line
        assert known.get(name, silent) != value, f"{' '.join(line)}: said before"
        known[name] = value


@pytest.mark.quick
def test_a_file_of_flags_is_found_beside_the_one_that_names_it(tmp_path, monkeypatch, fails):
    for folder, lr in (("mine", 0.5), ("elsewhere", 0.25)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "root.txt").write_text(f"--lr {lr}  # first\n--iters 7\n")
    (tmp_path / "mine/leaf.txt").write_text("# what: @nothing\n@root.txt # and\n--iters 8 --no-nesterov\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = settings("@../mine/leaf.txt", "--nesterov")
    assert (args.lr, args.iters, args.nesterov) == (0.5, 8, True)
    (tmp_path / "mine/root.txt").write_text("--lr 1\n@leaf.txt\n")
    assert "@leaf.txt: ../mine/root.txt leads back to it" in fails("train_base", "@../mine/leaf.txt")
    (tmp_path / "mine/root.txt").write_text("@gone.txt\n")
    assert "../mine/gone.txt cannot be read (No such file or directory)" in fails("train_base", "@../mine/leaf.txt")


@pytest.mark.parametrize("recipe", [pytest.param(f, id=f.stem, marks=[] if f.stem in RUN else pytest.mark.slow)
                                    for f in RECIPES])
def test_two_steps(recipe, train):
    early = ["--semi-start", 0] if "semi" in recipe.stem else []
    rows = log(train(script_of(recipe).__name__, f"@{recipe}", *SMALL, "--batch-size", 1, "--iters", 2, *early))
    assert [r["step"] for r in rows] == [1, 2] and "miou" in rows[-1] and rows[-1].get("loss_semi", 1) > 0


# ---- flags that recipes need ----

@pytest.mark.quick
def test_rates_decay_every_k_steps_or_never():
    for every, want in ((1, [(1 - done / 40) ** 0.9 for done in range(40)]), (0, [1.0] * 40),
                        (10, [(1 - done // 10 / 4) ** 0.9 for done in range(40)])):
        sgd, rates = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 10.0)]), []
        for done in range(40):
            common.poly_lr(sgd, done, types.SimpleNamespace(iters=40, decay_every=every))
            rates.append([group["lr"] for group in sgd.param_groups])
        assert rates == [pytest.approx([lr, 10 * lr]) for lr in want]


@pytest.mark.parametrize("stride", [8, 16])
def test_learned_upsampling_starts_as_bilinear(stride):
    logits = torch.randn(2, 5, 9, 12)
    want = F.interpolate(logits, (8 * stride + 1, 11 * stride + 1), mode="bilinear", align_corners=True)
    torch.testing.assert_close(model.bilinear_deconvolution(5, stride)(logits), want, rtol=0, atol=1e-5)


def test_flags_of_the_optimisers():
    seg = model.DeepLabV2("resnet18", 5, 8, "none", branches=2, upsample="learned")
    sgd = model.seg_optimizer(seg, settings("--lr", 1e-3, "--head-lr", 4, "--no-nesterov", "--weight-decay", 5e-4))
    assert len(seg.head) == 2 and [g["lr"] for g in sgd.param_groups] == [1e-3, 4e-3]
    assert any(p is seg.up.weight for p in sgd.param_groups[1]["params"]) and seg.up.weight.requires_grad
    assert all(not g["nesterov"] and g["weight_decay"] == 5e-4 and g["momentum"] == 0.9 for g in sgd.param_groups)
    disc = model.Discriminator(5)
    adam, sgd = (model.disc_optimizer(disc, settings(*words.split(), script=train_adv)).defaults for words in (
        "--d-lr 1e-4 --d-betas 0.9 0.99 --d-decay 0.1", "--d-lr 1 --d-optim sgd --d-momentum 0.9"))
    assert adam["betas"] == (0.9, 0.99) and adam["weight_decay"] == 0.1
    assert sgd["momentum"] == 0.9 and sgd["weight_decay"] == 1e-4


def test_drop_last(voc):
    for n in range(8):  # a picture is told by its grey
        Image.new("RGB", (96, 80), (n, n, n)).save(voc / f"JPEGImages/train{n}.png")
    dataset = data.open_data(str(voc))

    def drawn(*flags):
        args = settled("--crop", 65, "--batch-size", 3, "--scale", 1, 1, "--init", "none", *flags)
        stream = data.Stream(dataset.samples(dataset.train_ids()), args, "labelled")
        return [int(stream[n][0][0, 0, 0]) for n in range(16)]
    whole, cut = drawn(), drawn("--drop-last")
    assert sorted(whole[:8]) == sorted(whole[8:]) == list(range(8)) and whole[:8] != whole[8:]
    assert cut[:6] == whole[:6] and cut[6:12] == whole[8:14]  # each epoch less its last two
    with pytest.raises(cli.InputError, match="--drop-last: 8 labelled pictures are no batch of 9"):
        drawn("--drop-last", "--batch-size", 9)


def test_semi_from_an_epoch_on():  # of 8 pictures in batches of 3
    for flags, steps in (([], 4), (["--drop-last"], 3)):
        args = settled("--init", "none", "--batch-size", 3, "--semi-start-epoch", 1.5, *flags, script=train_semi)
        assert args.semi_start == steps


# ---- the files of others ----

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
    """start(contents of a file, or what --init says, *flags) -> (new segmenter, settled flags)."""
    def run(init, *words, backbone="resnet50", num_classes=4):
        if not isinstance(init, str):
            torch.save(init, tmp_path / "start.pth")
            init = tmp_path / "start.pth"
        args = settled("--init", init, "--backbone", backbone, *words)
        return model.new_segmenter(args, num_classes), args
    return run


@pytest.mark.parametrize("origin, branches, norm, blocks", [
    ("authors", 2, "caffe", 6), ("authors, two branches", 2, "caffe", 6), ("first implementation", 4, "imagenet", 6),
    ("coco", 4, "caffe", 23)])
def test_forward_parity(start, tmp_path, origin, branches, norm, blocks):
    """eval.py's and a training's net compute what theirs does; pooling in ceil mode shows at even sizes."""
    theirs, x = CaffeNet((3, 4, blocks, 3)), torch.randn(1, 3, 64, 90, dtype=torch.float64)
    new, args = start(FILES[origin](theirs.weights()), "--aspp-branches", branches,
                      backbone="resnet50" if blocks == 6 else "resnet101")
    trained = model.load_segmenter(tmp_path / "start.pth")
    assert not trained.training and len(trained.head) == branches and trained.norm == new.norm == args.norm == norm
    with torch.inference_mode():
        want = theirs.double()(x, branches)
        for seg in (trained, new.eval()):
            torch.testing.assert_close(seg.double()(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", ["coco", "authors"])  # with Scale. before them or not
def test_start_from_coco(weights, start, tmp_path, capsys, monkeypatch, names):
    monkeypatch.setattr(model, "COCO_FILE", tmp_path / "coco.pth")
    with pytest.raises(cli.InputError, match="coco.pth is not there"):
        start("coco")
    torch.save(FILES[names](weights), model.COCO_FILE)
    seg, args = start("coco", "--aspp-branches", 2)
    assert args.caffe and len(seg.head) == 2 and "2 of its 4 branches" in capsys.readouterr().out
    picture = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    want = [30 - 104.00699, 20 - 116.66877, 10 - 122.67892]
    assert seg.normalise(picture).flatten().tolist() == pytest.approx(want, abs=1e-4)
    seg, args = start("coco", "--norm", "none", num_classes=5)
    assert "starts anew" in capsys.readouterr().out and seg.head[0].weight.shape[0] == 5
    assert seg.normalise(picture).flatten().tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255])
    assert torch.equal(seg.backbone[8].conv1.weight, weights["layer3.0.conv1.weight"])


def test_start_from_the_authors(weights, start, capsys):
    start(FILES["first implementation"](weights))
    assert "--aspp-branches" not in capsys.readouterr().out
    assert len(start(weights)[0].head) == 4 and "give --aspp-branches 2" in capsys.readouterr().out
    seg, _ = start(two := FILES["authors, two branches"](weights), "--aspp-branches", 2, "--upsample", "learned")
    assert seg(torch.zeros(1, 3, 65, 65)).shape == (1, 4, 65, 65)
    with pytest.raises(cli.InputError, match="missing: head.2.bias, head.2.weight, head.3.bias, head.3.weight;"):
        start(two)


def test_keys_that_do_not_fit_are_listed(weights, start, tmp_path):
    odd = {"layer1": torch.zeros(1), "layer5.other": torch.zeros(1), "conv1.weight": torch.zeros(64, 3, 5, 5)}
    gone = "layer3.5.bn2.bias", "layer5.conv2d_list.0.bias"
    broken = {k: w for k, w in (weights | odd).items() if k not in gone}
    for load in (lambda: start(FILES["coco"](broken)), lambda: model.load_segmenter(tmp_path / "start.pth")):
        with pytest.raises(cli.InputError, match="missing: backbone.13.bn2.bias, head.0.bias; left over: backbone.0."
                           "layer1, backbone.0.layer5.other; of another shape: backbone.0.conv1.weight;"):
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
    for name in ("nesterov", "norm", "head_lr", "caffe", "aspp_branches", "upsample", "decay_every", "weight_decay"):
        del checkpoint["args"][name]
    torch.save(checkpoint, file)
    train("train_base", "--iters", 2, "--resume")
    assert torch.load(file, weights_only=True)["step"] == 2


def test_torchvision_file(start, tmp_path):
    for name in ("resnet18", "resnet50"):
        net = torchvision.models.get_model(name)
        seg, args = start(net.state_dict(), backbone=name, num_classes=5)
        assert not args.caffe and args.norm == "imagenet"
        assert torch.equal(seg.backbone[1].conv1.weight, net.layer1[0].conv1.weight)
        assert torch.equal(seg.backbone[-1].conv2.weight, net.layer4[-1].conv2.weight)
    with pytest.raises(cli.InputError, match="without a classifier"):
        model.load_segmenter(tmp_path / "start.pth")


def test_origin_is_recorded_and_comes_back(theirs, weights, train, voc, tmp_path, capsys):
    """eval.py reads a file of others, and a training from it writes one that is read as Caffe's net again."""
    file, out = tmp_path / "coco.pth", tmp_path / "pictures"
    torch.save(FILES["coco"](weights), file)
    words = "--ckpt", file, "--data", voc, "--gpu", -1, "--workers", 0, "--out", out
    evaluation.main(settings(*words, script=evaluation))
    assert "\nmIoU " in capsys.readouterr().out and (out / "val0.png").exists()
    flags = "--backbone", "resnet50", "--init", file, "--iters", 1, "--lr", 0, "--bn", "frozen", "--no-amp"
    seg, x = model.load_segmenter(train("train_base", *flags) / "last.pt"), torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        torch.testing.assert_close(seg(x), want := theirs(x), rtol=0, atol=1e-4 * float(want.abs().max()))
    assert seg.norm == "caffe"
