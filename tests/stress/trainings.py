"""Trainings that take minutes: on two ranks, stopped, killed and resumed, compiled; every recipe.

    python -m pytest tests/stress/trainings.py
"""
import contextlib
import json
import os
import re
import signal
import subprocess

from common.layouts import IGNORE

import pytest
import test_distributed
import torch
from conftest import ROOT, SCRIPTS, SMALL, call, load, log
from test_distributed import STARTS, run_ranks, start, torchrun, wait_until
from test_recipes import RECIPES, run_two_steps

import model
from csrc import ops


@pytest.mark.parametrize("script", ["train_base", "train_adv", "train_semi"])
def test_other_scripts_on_two_ranks_and_resumed(voc, train, tmp_path, script):
    if script != "train_semi":
        test_distributed.test_two_ranks_train_as_one(voc, train, tmp_path, script)
    test_distributed.test_stopped_and_resumed_is_straight(train, tmp_path, script)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_runs(recipe, train):
    run_two_steps(recipe, train)


@pytest.mark.parametrize("script", STARTS)
def test_two_ranks_stop_and_resume(voc, tmp_path, script):
    """SIGTERM to torchrun and its ranks, then --resume: the log of a straight run."""
    words = ["--data", voc, *SMALL, "--iters", 30, "--eval-every", 100, "--workers", 1, "--batch-size", 4,
             *STARTS[script]]
    file = tmp_path / "stopped/log.jsonl"
    with start(*torchrun(2), ROOT / f"{script}.py", *words, "--out", tmp_path / "stopped") as run:
        wait_until(lambda: file.exists() and file.read_text().count("\n") > 3)
        os.killpg(run.pid, signal.SIGTERM)
        printed, error = run.communicate(timeout=60)
    step = log(tmp_path / "stopped")[-1]["step"]
    assert f"after step {step};" in printed and 3 < step < 30, error
    assert load(tmp_path / "stopped")["step"] == step
    run_ranks(2, ROOT / f"{script}.py", *words, "--out", tmp_path / "stopped", "--resume")
    run_ranks(2, ROOT / f"{script}.py", *words, "--out", tmp_path / "straight")
    assert file.read_text() == (tmp_path / "straight/log.jsonl").read_text()


@pytest.mark.parametrize("script, networks", [("train_semi", ["DeepLabV2", "Discriminator"]),
                                              ("train_match", ["DeepLabV2", "DeepLabV2"])])
def test_compiled_training(train, monkeypatch, script, networks):
    """Without the code that inductor makes of it, which takes minutes more. Evaluations are not compiled."""
    compile, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(type(network).__name__) or compile(
        network, backend="aot_eager", fullgraph=True))
    out = train(script, "--compile", "--iters", 2)
    assert compiled == networks
    assert set(load(out)["seg"]) == set(model.DeepLabV2("efficientnet_lite0", 4, 16, "none").state_dict())


@pytest.mark.parametrize("script", SCRIPTS)
def test_workers_change_nothing(train, script):
    """The log with workers is that without."""
    one, two = (train(script, "--workers", workers, out=f"workers{workers}") for workers in (0, 2))
    assert (one / "log.jsonl").read_text() == (two / "log.jsonl").read_text()


def test_a_rank_without_a_validation_image(voc, tmp_path):
    """It takes part in the sums of a script's own scores; both ranks end. What was scored is what was saved."""
    (voc / "ImageSets/Segmentation/val.txt").write_text("val0")
    words = "--data", voc, *SMALL, "--iters", 2, "--eval-every", 9, "--out", tmp_path / "two"
    with start(*torchrun(2), ROOT / "train_semi.py", *words) as run:
        printed, error = run.communicate(timeout=180)
    assert run.returncode == 0 and printed.count("mIoU") == 1, error
    row = log(tmp_path / "two")[-1]
    assert 0 <= row["precision"] <= 100
    call("eval", "--ckpt", tmp_path / "two/last.pt", "--gpu", -1, "--workers", 0, "--json", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["miou"] == pytest.approx(row["miou"])


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_is_killed(voc, tmp_path, killed):
    """The other rank ends within a minute and says so in a line before all tracebacks; --resume continues."""
    words = "--data", voc, *SMALL, "--iters", 10**5, "--save-every", 1, "--out", tmp_path / "out"
    with start(*torchrun(2), ROOT / "train_base.py", *words) as run:
        wait_until(lambda: (tmp_path / "out/last.pt").exists() or run.poll() is not None)
        ranks = subprocess.check_output(["pgrep", "-P", str(run.pid), "-f", "train_base.py"], text=True).split()
        os.kill(int(ranks[killed]), signal.SIGKILL)
        error = run.communicate(timeout=60)[1]
    assert error.count("another rank failed") == 1 and "[rank" not in error, error
    assert "Traceback" not in error.split("another rank failed")[0], error
    step = load(tmp_path / "out")["step"]
    with contextlib.redirect_stdout(None):
        call("train_base", *words, "--iters", step + 1, "--eval-every", 10**5, "--resume")
    assert log(tmp_path / "out")[-1]["step"] == step + 1


def test_a_rank_meets_a_bad_image(voc, tmp_path):
    """The line that names the image comes first, and no traceback before it."""
    path = voc / "JPEGImages/train1.png"
    path.write_bytes(path.read_bytes()[:-60])  # its header is whole, so that it is found when it is loaded
    words = "--data", voc, *SMALL, "--split", 1, "--iters", 9, "--out", tmp_path / "out"
    with start(*torchrun(2), ROOT / "train_base.py", *words) as run:
        error = run.communicate(timeout=120)[1]
    first, *more = re.findall(r"^train_base.py: .*", error, re.M)
    assert run.returncode and str(path) in first
    assert len(more) <= 1 and all("another rank failed" in line for line in more), error
    assert "Traceback" not in error.split(first)[0] and "[rank" not in error, error


def test_two_runs_start_at_once(voc, train, tmp_path, fails):
    """With one --out: one trains, the other is refused and writes nothing. The first is killed: no lock is left."""
    out = tmp_path / "out"
    words = "--data", voc, *SMALL, "--iters", 10**5, "--save-every", 1, "--out", out
    with start(ROOT / "train_base.py", *words) as one, start(ROOT / "train_base.py", *words) as two:
        wait_until(lambda: (one.poll() or two.poll()) and (out / "last.pt").exists())
        refused, training = (one, two) if one.poll() else (two, one)
        assert (refused.poll(), training.poll()) == (2, None) and f"--out {out}" in refused.communicate()[1]
        training.send_signal(signal.SIGSTOP)
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        assert f"--out {out}" in fails("train_base", *words, "--resume", "--log-every", 10**5)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    train("train_base", "--iters", load(out)["step"] + 1, "--eval-every", 10**5, "--resume")
    assert not list(out.glob("earlier-*"))


def test_networks_and_losses_compile_whole():
    """No graph break from the pixels to the losses of train_semi, and the same numbers as without torch.compile."""
    torch.manual_seed(0)
    seg, disc = model.DeepLabV2("resnet18", 4, 8, "none", bn="frozen").train(), model.Discriminator(4)

    def losses(image, target):
        logits = seg(image)
        valid = target != IGNORE
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            d_fake = disc(ops.upsample_softmax(logits, valid=valid))
            d_real = disc(model.one_hot(target, 4))
        semi, kept = ops.masked_cross_entropy(logits, confidence=d_fake, valid=valid, threshold=0.4)
        loss_ce, _ = ops.masked_cross_entropy(logits, target)
        return loss_ce, model.bce(d_fake, 1, valid), model.bce(d_real, 0.9, valid), semi, kept
    image = torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8)
    target = torch.randint(0, 4, (2, 65, 65), dtype=torch.uint8)
    target[:, :5] = 255
    want = losses(image, target)
    got = torch.compile(losses, fullgraph=True, backend="aot_eager")(image, target)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)
    weights = [p for p in seg.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(sum(loss[:4]), weights) for loss in (want, got))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
