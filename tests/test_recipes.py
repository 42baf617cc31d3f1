"""The recipes: they parse, their rows are documented, the paper's have its values; and the flags that they need."""
import importlib
import re

import pytest
import torch
from conftest import ROOT, SMALL, log

import model
import train_base
from common import layouts
from common.args import resolve_args

RECIPES = sorted((ROOT / "recipes").glob("*.txt"))
RUN = "base101", "adv101", "final_semi_2", "paper_cityscapes_base"  # the other recipes take the same paths


def about(recipe):
    return dict(line[2:].split(": ", 1) for line in recipe.read_text().splitlines() if line.startswith("# "))


def script_of(recipe):
    return importlib.import_module(about(recipe)["script"].removesuffix(".py"))


def settings(*words, script=train_base):
    return script.flags().parse_args([str(w) for w in words])


PAPER = dict(split=0.125, init="imagenet", backbone="resnet101", crop=321, bn="train", batch_size=10, iters=20000,
             lr=2.5e-4, nesterov=True, weight_decay=1e-4, lam_adv=0.01, d_optim="adam", d_lr=1e-4,
             d_betas=[0.9, 0.999], d_smooth=0, lam_adv_u=0, lam_semi=0.1, threshold=0.2, semi_start=5000)
STREET = PAPER | dict(crop=513, scale=[1, 1], input_scale=0.5, batch_size=2, iters=40000)
VALUES = {"paper_voc_base": PAPER, "paper_voc_adv": PAPER, "paper_voc_semi": PAPER, "paper_cityscapes_semi": STREET,
          "animals_adv_8": dict(lam_adv=0.01, d_lr=1e-4, d_smooth=0),
          "animals_semi_32": dict(lam_adv=0.01, lam_adv_u=0, lam_semi=0.1, threshold=0.2, d_lr=1e-4, d_smooth=0,
                                  semi_start=300, iters=1200),
          "base101": dict(norm="none", decay_every=10, init="coco", split=1, bn="no-grad"),
          "adv204": dict(d_lr=1e-5, d_smooth=0.1, d_optim="adam"), "adv101": dict(d_optim="sgd", d_smooth=0)}


@pytest.mark.quick
def test_all_rows_are_in_the_readme():
    rows = (ROOT / "recipes/README.md").read_text().splitlines()
    for recipe in RECIPES:
        command, published = f"python {about(recipe)['script']} @recipes/{recipe.name}", about(recipe)["published"]
        number = r"[\d.]{5}|\d\d\.\d"
        row, = [r for r in rows if r.startswith(f"| `{command} ")]
        assert re.findall(number, row.split("|", 2)[2]) == re.findall(number, published), row


@pytest.mark.quick
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_recipes_parse_and_win_over_the_data(recipe, monkeypatch):
    script, dataset = script_of(recipe), layouts.Dataset("", "", "shapes", *[None] * 8)
    args = settings(f"@{recipe}", script=script)
    given = {k: v for k, v in vars(args).items() if v is not None} | {"init": "none"}
    for name, value in VALUES.get(recipe.stem, {}).items():
        assert getattr(args, name, value) == value, name
    args.init = "none"  # the initial weights are not at hand
    resolve_args(args, dataset, model.start_format)
    assert {k: getattr(args, k) for k in given} == given and args.backbone


@pytest.mark.quick
@pytest.mark.parametrize("recipe", [f for f in RECIPES if "_" in f.stem], ids=lambda f: f.stem)
def test_methods_are_compared_on_equal_terms(recipe):
    """A recipe NAME_METHOD_N trains on 1/N of the labels, with the flags of NAME_base_N but for the method's own."""
    args = vars(settings(f"@{recipe}", script=script_of(recipe)))
    base = vars(settings(f"@{recipe.with_stem(re.sub('adv|semi|match', 'base', recipe.stem))}"))
    assert {k: args[k] for k in base if k != "out"} == {k: base[k] for k in base if k != "out"}
    if labelled := re.search(r"_(\d+|full)$", recipe.stem):
        assert args["split"] == 1 / int(labelled[1].replace("full", "1"))


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
    (tmp_path / "mine/root.txt").write_text("@gone.txt\n")
    assert "../mine/gone.txt" in fails("train_base", "@../mine/leaf.txt")


@pytest.mark.parametrize("recipe", [pytest.param(f, id=f.stem, marks=[] if f.stem in RUN else pytest.mark.slow)
                                    for f in RECIPES])
def test_two_steps(recipe, train):
    words = "--split", 0.5, "--batch-size", 1, "--iters", 2, *(["--semi-start", 0] if "semi" in recipe.stem else [])
    rows = log(train(script_of(recipe).__name__, f"@{recipe}", *SMALL, *words))
    assert [r["step"] for r in rows] == [1, 2] and "miou" in rows[-1] and rows[-1].get("loss_semi", 1) > 0


# ---- flags that recipes need ----

@pytest.mark.quick
def test_rates_decay_every_k_steps_or_never():
    for every, want in ((1, [(1 - done / 40) ** 0.9 for done in range(40)]), (0, [1.0] * 40),
                        (10, [(1 - done // 10 / 4) ** 0.9 for done in range(40)])):
        sgd, rates = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 10.0)]), []
        for done in range(40):
            model.poly_lr(done + 1, 40, every, sgd)
            rates.append([group["lr"] for group in sgd.param_groups])
        assert rates == [pytest.approx([lr, 10 * lr]) for lr in want]


def test_flags_of_the_optimisers():
    seg = model.DeepLabV2("resnet18", 5, 8, "none", branches=2)
    sgd = model.seg_optimizer(seg, 1e-3, head_lr=4, nesterov=False, weight_decay=5e-4)
    assert len(seg.head) == 2 and [g["lr"] for g in sgd.param_groups] == [1e-3, 4e-3]
    assert all(not g["nesterov"] and g["weight_decay"] == 5e-4 and g["momentum"] == 0.9 for g in sgd.param_groups)
    disc = model.Discriminator(5)
    adam = model.disc_optimizer(disc, 1e-4, betas=(0.9, 0.99), weight_decay=0.1).defaults
    sgd = model.disc_optimizer(disc, 1, "sgd", momentum=0.9).defaults
    assert adam["betas"] == (0.9, 0.99) and adam["weight_decay"] == 0.1
    assert sgd["momentum"] == 0.9 and sgd["weight_decay"] == 1e-4
