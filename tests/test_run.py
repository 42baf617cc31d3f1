"""A training run's log, warnings, files and flags."""
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import model
import train_adv
import train_base
import train_match
import train_semi
from common import console, layouts
from common import run as common_run
from common.args import resolve_args
from common.run import HealthyRange, unhealthy

QUICK = pytest.mark.quick


def test_replace_is_whole_or_nothing(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def broken(f):
        f.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(console.InputError, match="a.txt: cannot be written .No space left"):
        console.write_atomically(target, broken)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@QUICK
@pytest.mark.parametrize("name,values,warns", [
    ("loss_d", [0.03] * 10, [10]), ("loss_d", [0.03] * 30, [10]), ("loss_d", [0.03] * 9 + [0.3] + [0.03] * 9, []),
    ("loss_d", [0.72] * 10, [10]), ("loss_d", [0.69] * 30, []), ("kept", [0] * 10, [10]), ("kept", [1] * 10, [10]),
    ("kept", [0.02, 0.98] * 10, []), ("loss_d", [0.3] * 5 + [0.03] * 10 + [0.3] + [0.03] * 10, [15, 26]),
])
def test_warns_of_a_starved_run(name, values, warns):
    """Once, at the tenth logged step in a row; the rows alone decide, so that a resumed run warns too."""
    healthy = {"loss_d": HealthyRange(0.05, 0.7, "advice"), "kept": HealthyRange(0.01, 0.99, "advice")}
    rows = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    found = [n for n in range(1, len(rows) + 1) for line in unhealthy(rows[:n], healthy)]
    assert found == warns
    assert not warns or f"warning: {name} " in (line := next(unhealthy(rows[:warns[0]], healthy))) and "advice" in line


def test_warnings_know_smoothing_and_the_start():
    # 0.163 is the loss of a discriminator that always wins, under smoothing 0.1
    healthy = {"loss_d": model.healthy_loss_d(0.1), "kept": HealthyRange(0.01, 0.99, "", 20)}
    rows = [{"step": n, "loss_d": 0.2, "kept": 1} for n in range(1, 31)]
    lines = [(n, line.split()[1]) for n in range(1, 31) for line in unhealthy(rows[:n], healthy)]
    assert lines == [(10, "loss_d"), (30, "kept")]


def test_no_checkpoint_of_a_run_that_diverged(train, tmp_path):
    """Between log lines too: --resume would go on from it."""
    with pytest.raises(console.InputError, match="at step 2: the run diverged"):
        train("train_base", "--lr", 1e30, "--iters", 6, "--log-every", 6, "--eval-every", 6, "--save-every", 2)
    assert not (tmp_path / "out/last.pt").exists()


def test_no_checkpoint_beside_another_run(train, monkeypatch):
    """A resumed run saves before it logs; where another one has --out, nothing of that one's is written over."""
    words = "train_base", "--log-every", 100, "--save-every", 1, "--eval-every", 100
    out = train(*words, "--iters", 2)
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def taken(run):
        raise console.InputError("another run is writing there")
    monkeypatch.setattr(common_run.Run, "lock", taken)
    with pytest.raises(console.InputError, match="another run"):
        train(*words, "--iters", 5, "--resume")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_an_earlier_run_is_not_lost(train, tmp_path, capsys):
    first = (train("train_base", "--seed", 1, "--iters", 1) / "log.jsonl").read_text()
    train("train_base", "--seed", 2, "--iters", 1)
    assert (tmp_path / "out/earlier-1/log.jsonl").read_text() == first and "earlier-1" in capsys.readouterr().out
    assert (tmp_path / "out/earlier-1/last.pt").exists() and (tmp_path / "out/log.jsonl").read_text() != first


def resolved(script, root, *words):
    """Return the flags of a training on the folder `root`, and the data set's note."""
    args, dataset = script.flags().parse_args(["--data", str(root), *words]), layouts.open_dataset(str(root))
    sets = {"train_base": (), "train_match": (), "train_adv": (model.DISC_PAPER, model.DISC_SMALL), "train_semi": (
        model.DISC_PAPER | {"lam_semi": 0.1}, model.DISC_SMALL | {"lam_semi": 0.5})}[script.__name__]
    resolve_args(args, dataset, model.start_format, *sets)
    return args, dataset.note


@QUICK
@pytest.mark.parametrize("size, crop, scale", [((250, 170), 161, 1), ((90, 80), 81, 1), ((500, 375), 161, 0.5),
                                               ((480, 200), 97, 0.5), ((4000, 3000), 161, 0.25), ((40, 30), 65, 1)])
def test_a_laptop_gets_what_it_can_train(blocks, tmp_path, monkeypatch, size, crop, scale):
    """A folder of one's own without CUDA; flags that are given stay, and with CUDA nothing changes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for n in range(5):
        Image.new("RGB", size if n % 2 else size[::-1]).save(tmp_path / f"images/{n}.png")
        Image.new("L", size if n % 2 else size[::-1]).save(tmp_path / f"labels/{n}.png")
    for script in (train_base, train_adv, train_semi, train_match):
        args, note = resolved(script, tmp_path)
        assert (args.backbone, args.crop, args.input_scale, args.batch_size, args.lr, args.iters) == (
            "efficientnet_lite0", crop, scale, 8, 2e-3, 1000)
        assert f"--crop {crop}" in note
    assert resolved(train_semi, tmp_path)[0].lam_semi == 0.5 and resolved(train_adv, tmp_path)[0].d_lr == 3e-5
    args, note = resolved(train_base, tmp_path, "--crop", "97", "--iters", "7", "--backbone", "resnet18")
    assert (args.crop, args.iters, args.backbone) == (97, 7, "resnet18")
    assert not any(word in note for word in ("--crop", "--iters", "--backbone"))
    recipe, note = resolved(train_semi, tmp_path, "@recipes/paper_voc_semi.txt")
    assert (recipe.backbone, recipe.crop, recipe.iters, recipe.lr) == ("resnet101", 321, 20000, 2.5e-4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, note = resolved(train_semi, tmp_path)
    assert (args.backbone, args.crop, args.iters) == ("resnet101", 321, 20000) and "CUDA" not in note
    assert (args.lam_semi, args.d_lr, args.d_smooth) == (0.1, 1e-4, 0)


def test_a_run_says_how_long_it_will_take(train, monkeypatch, capsys):
    seconds = itertools.count(step=60)
    monkeypatch.setattr(common_run.time, "monotonic", lambda: next(seconds))
    train("train_base", "--iters", 30, "--eval-every", 100, "--save-every", 100)
    said = capsys.readouterr().out
    assert said.count(" minutes to the end") == 1
    assert said.index("step 10/30") < said.index(" minutes to the end") < said.index("step 11/30")


def test_tensorboard(train, tmp_path, fails, voc):
    """What log.jsonl has, and pictures; --resume takes back what is of later steps."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    words = "--iters", 6, "--eval-every", 3, "--save-every", 3, "--tensorboard"
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(model, "poly_lr", lambda step, *_: step == 6 and (_ for _ in ()).throw(KeyboardInterrupt))
        train("train_semi", *words)
    rows = train("train_semi", *words, "--resume")
    found = events.EventAccumulator(str(rows / "tensorboard")).Reload()
    logged = [json.loads(line) for line in (rows / "log.jsonl").read_text().splitlines()]
    for name in ("loss_ce", "kept", "miou"):
        want = [(r["step"], r[name]) for r in logged if name in r]
        got = [(e.step, e.value) for e in found.Scalars(name)]
        assert [s for s, _ in got] == [s for s, _ in want] and np.allclose([v for _, v in got], [v for _, v in want])
    strips = found.Images("examples")
    assert [e.step for e in strips] == [3, 6] and strips[0].width == 720
    train("train_base", "--iters", 1)
    assert (tmp_path / "out/earlier-1/tensorboard").is_dir() and not (tmp_path / "out/tensorboard").exists()


@QUICK
def test_without_tensorboard(blocks, tmp_path, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = "--data", blocks, "--gpu", -1, "--out", tmp_path / "out", "--tensorboard"
    assert "--tensorboard" in fails("train_base", *words)
    assert not (tmp_path / "out").exists()
