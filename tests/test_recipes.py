"""The recipes: all parse, the paper's have its values, methods are compared on equal terms; the README's commands."""
import importlib
import re
import shutil
from pathlib import Path

from common import exporters, layouts
from common.args import resolve_args

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, call, log
from test_predict import differing_pixels

import model
import prepare
import train_base

RECIPES = sorted((ROOT / "recipes").glob("*.txt"))
PAPER = dict(split=0.125, init="imagenet", backbone="resnet101", crop=321, bn="train", batch_size=10, iters=20000,
             lr=2.5e-4, nesterov=True, weight_decay=1e-4, lam_adv=0.01, d_optim="adam", d_lr=1e-4,
             d_betas=[0.9, 0.999], d_smooth=0, lam_adv_u=0, lam_semi=0.1, threshold=0.2, semi_start=5000,
             class_weights="none")
CITYSCAPES = PAPER | dict(crop=513, scale=[1, 1], input_scale=0.5, batch_size=2, iters=40000)
VALUES = {"paper_voc_base": PAPER, "paper_voc_adv": PAPER, "paper_voc_semi": PAPER, "paper_cityscapes_semi": CITYSCAPES,
          "base101": dict(norm="none", decay_every=10, init="coco", split=1, bn="no-grad"),
          "adv101": dict(d_optim="sgd", d_smooth=0)}


def about(recipe):
    return dict(line[2:].split(": ", 1) for line in recipe.read_text().splitlines() if line.startswith("# "))


def parse(recipe):
    script = importlib.import_module(about(recipe)["script"].removesuffix(".py"))
    return script.flags().parse_args([f"@{recipe}"])


@pytest.mark.quick
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_recipes_parse_and_override_the_data_sets_defaults(recipe):
    args, dataset = parse(recipe), layouts.Dataset("", "", "shapes", *[None] * 8)
    for name, value in VALUES.get(recipe.stem, {}).items():
        assert getattr(args, name, value) == value, name
    args.init = "none"  # the initial weights are not on this machine
    given = {name: value for name, value in vars(args).items() if value is not None}
    resolve_args(args, dataset, model.network_defaults)
    assert {name: getattr(args, name) for name in given} == given and args.backbone


@pytest.mark.quick
@pytest.mark.parametrize("recipe", [f for f in RECIPES if "_" in f.stem], ids=lambda f: f.stem)
def test_methods_are_compared_on_equal_terms(recipe):
    """A recipe NAME_METHOD_N trains on 1/N of the labels, with the flags of NAME_base_N and the method's own."""
    args, base = vars(parse(recipe)), vars(parse(recipe.with_stem(re.sub("adv|semi|match", "base", recipe.stem))))
    assert {k: args[k] for k in base if k != "out"} == {k: base[k] for k in base if k != "out"}
    if labelled := re.search(r"_(\d+|full)$", recipe.stem):
        assert args["split"] == 1 / int(labelled[1].replace("full", "1"))


@pytest.mark.quick
def test_a_file_of_flags_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch, fails):
    for folder, lr in (("mine", 0.5), ("elsewhere", 0.25)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "root.txt").write_text(f"--lr {lr}  # first\n--iters 7\n")
    (tmp_path / "mine/leaf.txt").write_text("# what: @nothing\n@root.txt # and\n--iters 8 --no-nesterov\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = train_base.flags().parse_args(["@../mine/leaf.txt", "--nesterov"])
    assert (args.lr, args.iters, args.nesterov) == (0.5, 8, True)
    (tmp_path / "mine/root.txt").write_text("@gone.txt\n")
    assert "../mine/gone.txt" in fails("train_base", "@../mine/leaf.txt")


def run_two_steps(recipe, train):
    script, start = about(recipe)["script"].removesuffix(".py"), ["--semi-start", 0] if "semi" in recipe.stem else []
    rows = log(train(script, f"@{recipe}", *SMALL, "--split", 0.5, "--batch-size", 1, "--iters", 2, *start))
    assert [row["step"] for row in rows] == [1, 2] and "miou" in rows[-1] and rows[-1].get("loss_semi", 1) > 0


@pytest.mark.parametrize("name", ["adv101", "final_semi_2", "paper_cityscapes_base"])
def test_three_recipes_run(name, train):  # all of them: tests/stress/trainings.py
    run_two_steps(ROOT / f"recipes/{name}.txt", train)


def readme_commands():
    """The words of every python command in README.md's blocks, but for those that install or test."""
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()[1:]]
    found = [part.split() for line in lines for part in line.split(" && ")]
    return [words[1:] for words in found if words[:1] and words[0].endswith("python") and words[1] != "-m"]


def export_from_cvat(blocks, photos, file):
    """Write 24 photos, and the labels of the first four as CVAT exports them without images."""
    labels = sorted((blocks / "SegmentationClassAug").iterdir())[:4]
    photos.mkdir()
    for n in range(24):
        shutil.copy(blocks / f"JPEGImages/{labels[n % 4].name}", photos / (labels[n].name if n < 4 else f"more{n}.png"))
    classes, palette, _ = layouts.read_classes(blocks / "classes.txt")
    exporters.write_cvat(file, [photos / label.name for label in labels], labels, classes, palette)


def test_the_readmes_commands(blocks, shapes, tmp_path, monkeypatch):
    """To the letter, but with small networks and few steps; in a fresh folder, where each uses what others left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(shapes.parent)
    shutil.copytree(blocks, "my_labels")
    for name in ("holiday", "more_images"):
        shutil.copytree(blocks / "JPEGImages", name)
    export_from_cvat(blocks, Path("photos"), Path("first.zip"))
    for script, *words in readme_commands():
        words = [str(blocks) if word in ("ROOT", "shapes") else word for word in words]
        if script == "prepare.py" and words[0] == "check":
            with pytest.raises(SystemExit) as end:
                prepare.main(prepare.flags().parse_args(words))
            assert not end.value.code
        elif script == "prepare.py":
            call("prepare", *words)
            if words[0] == "next":  # and nothing had to be corrected
                shutil.copy("next/predictions.zip", "corrected.zip")
        elif script.startswith("train"):
            call(script[:-3], *words, *SMALL)
        else:
            call(script[:-3], *words, *([] if script == "export.py" else ["--gpu", -1]))
        if script == "export.py":
            assert differing_pixels(torch.export.load("model.pt2").module(), words[1]) < 1e-3  # ties
    scripts = *SCRIPTS, "eval", "predict", "report", "export", "prepare"
    assert {words[0] for words in readme_commands()} >= {f"{name}.py" for name in scripts}
    assert (tmp_path / "page.html").stat().st_size > 100_000 and (tmp_path / "predictions/legend.png").exists()
