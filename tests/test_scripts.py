"""The scripts as a user runs them: what they write and print, the method's identities, resuming, wrong input."""
import argparse
import ast
import importlib
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, SMALL, call, log, python
from PIL import Image

import cli
import common
import data
import eval as evaluation
import model
from csrc import ops

QUICK, SLOW = pytest.mark.quick, pytest.mark.slow

LOSSES = {"train_base": ["loss_ce"], "train_adv": ["loss_ce", "loss_adv", "loss_d"],
          "train_semi": ["loss_ce", "loss_adv", "loss_adv_u", "loss_semi", "kept", "loss_d"],
          "train_match": ["loss_ce", "loss_u", "kept"]}
AREAS = ["auc", "auc_net", "auc_both"]
SCORES = {"train_base": ["miou"], "train_adv": ["miou", *AREAS], "train_semi": ["miou", *AREAS, "precision"],
          "train_match": ["miou"]}


@QUICK
@pytest.mark.parametrize("script", SCRIPTS)
def test_three_steps(trained, blocks, script):
    """What a training writes, and that the checkpoint is one."""
    out, rows = trained[script], log(trained[script])
    assert [r["step"] for r in rows] == [1, 2, 3]
    for r in rows:
        assert list(r) == ["step", *LOSSES[script], "lr", *SCORES[script]]
        assert all(0 <= r[name] <= 100 for name in SCORES[script])
    files = {p.name for p in out.iterdir()}
    assert files == {".lock", "best.pt", "labelled.txt", "last.pt", "log.jsonl", "run.json"}
    assert len((out / "labelled.txt").read_text().split()) == 4
    facts = json.loads((out / "run.json").read_text())
    assert facts["args"]["iters"] == 3 and facts["args"]["norm"] == "imagenet" and facts["ops"] == ops.in_use()
    assert {"commit", "torch", "python", "device", "data"} <= set(facts)
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    more = {"student"} if script == "train_match" else set()
    assert set(checkpoint) == {"step", "args", "classes", "seg", "disc", "opt_seg", "opt_disc", "rng", "miou"} | more
    backbone, head = checkpoint["opt_seg"]["param_groups"]
    assert (backbone["momentum"], backbone["nesterov"], backbone["weight_decay"]) == (0.9, True, 1e-4)
    assert head["initial_lr"] == 10 * backbone["initial_lr"]
    assert checkpoint["step"] == 3 and checkpoint["classes"] == ["grey", "red", "green", "blue"]
    assert (checkpoint["disc"] is None) == (script in ("train_base", "train_match"))
    assert checkpoint["miou"] == rows[-1]["miou"]
    assert torch.load(out / "best.pt", weights_only=True)["miou"] == max(r["miou"] for r in rows)
    assert model.load_segmenter(out / "last.pt")(torch.randn(1, 3, 65, 81)).shape == (1, 4, 5, 6)


@pytest.mark.parametrize("script", [*(pytest.param(script, marks=SLOW) for script in SCRIPTS if script != "train_semi"),
                                    "train_semi"])
def test_as_a_user_runs_it(trained, blocks, tmp_path, script):
    """With workers, from another folder, then eval.py on what was written; the log is that of a run without workers."""
    out = tmp_path / "runs/a"
    done = python(ROOT / f"{script}.py", "--data", blocks, *SMALL, "--workers", 1, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert str(blocks) in lines[0] and "cpu" in lines[0] and f"ops {ops.in_use()}" in lines[0]
    assert lines[-1] == f"mIoU {log(out)[-1]['miou']:.2f}" and str(blocks) in lines[-2]
    assert (out / "log.jsonl").read_text() == (trained[script] / "log.jsonl").read_text()
    done = python(ROOT / "eval.py", "--ckpt", out / "last.pt", "--out", tmp_path / "p", "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == lines[-1] and str(blocks) in done.stdout.splitlines()[-2]
    assert json.loads((tmp_path / "s.json").read_text())["miou"] == pytest.approx(log(out)[-1]["miou"])
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["overview.jpg", "val0.png", "val1.png"]
    drawn = Image.open(tmp_path / "p/val0.png")
    assert drawn.mode == "P" and drawn.size == (96, 80) and np.asarray(drawn).max() < 4


@QUICK
def test_eval_scores_as_the_devkit_does(train, voc, tmp_path, capsys):
    """The mIoU of eval.py is that of the PNGs it wrote, counted here over whole pictures without void."""
    out = train("train_base", "--input-scale", 0.5, "--iters", 1)
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--workers", 0, "--out", tmp_path / "p")
    matrix = np.zeros((4, 4))
    for i in ("val0", "val1"):
        truth, guess = (np.asarray(Image.open(f / f"{i}.png")) for f in (voc / "SegmentationClassAug", tmp_path / "p"))
        np.add.at(matrix, (truth[truth != 255], guess[truth != 255]), 1)
    with np.errstate(invalid="ignore"):
        iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert capsys.readouterr().out.splitlines()[-1] == f"mIoU {100 * np.nanmean(iou):.2f}"


def test_predicts_any_pictures(trained, tmp_path, fails, capsys):
    ckpt = trained["train_base"] / "last.pt"
    for name, size in (("a.jpg", (50, 70)), ("b.png", (131, 65))):
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / name)
    flags = ["--ckpt", ckpt, "--gpu", -1, "--images", tmp_path / "a.jpg", tmp_path / "b.png"]
    assert "--out" in fails("eval", *flags)
    call("eval", *flags, "--out", tmp_path / "p")
    assert Image.open(tmp_path / "p/a.png").size == (50, 70) and Image.open(tmp_path / "p/b.png").size == (131, 65)
    assert "would overwrite" in fails("eval", *flags, "--out", tmp_path)
    assert "two pictures are named b" in fails("eval", *flags, tmp_path / "x/b.jpg", "--out", tmp_path / "q")
    assert "b.txt" in fails("eval", "--ckpt", ckpt, "--images", tmp_path / "b.txt", "--out", tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_bad_label_leaves_no_half_of_the_predictions(trained, voc, tmp_path, fails):
    ckpt = trained["train_base"] / "last.pt"
    (voc / "SegmentationClassAug/val1.png").write_text("no picture")
    assert "val1.png: cannot be read" in fails("eval", "--ckpt", ckpt, "--data", voc, "--out", tmp_path / "p/q")
    assert not list((tmp_path / "p").iterdir())


def columns(out, names):
    return [[r[n] for n in names] for r in log(out)]


@QUICK
def test_without_its_loss_adv_and_match_are_base_and_semi_is_adv(train, trained):
    base, adv, semi, _ = (trained[script] for script in SCRIPTS)  # semi starts its loss at step 0 there
    adv0 = train("train_adv", "--lam-adv", 0, "--eval-every", 9, out="adv0")
    assert columns(base, LOSSES["train_base"]) == columns(adv0, LOSSES["train_base"])
    semi0 = train("train_semi", "--lam-semi", 0, "--lam-adv-u", 0, "--eval-every", 9, out="semi0")
    assert columns(adv, LOSSES["train_adv"]) == columns(semi0, LOSSES["train_adv"])
    match0 = train("train_match", "--lam-u", 0, "--eval-every", 9, out="match0")
    assert columns(base, LOSSES["train_base"]) == columns(match0, LOSSES["train_base"])
    # and with them they are not: the comparisons above can fail
    with_u = train("train_match", "--lam-u", 50, "--confidence", 0.1, "--eval-every", 9, out="match")
    assert columns(base, LOSSES["train_base"]) != columns(with_u, LOSSES["train_base"])
    assert columns(base, LOSSES["train_base"]) != columns(adv, LOSSES["train_base"])
    assert columns(adv, LOSSES["train_adv"]) != columns(semi, LOSSES["train_adv"])


def test_threshold_one_trains_as_no_semi_loss(train):
    def run(out, *flags):
        out = train("train_semi", "--semi-start", 0, "--eval-every", 9, *flags, out=out)
        names = ["loss_ce", "loss_adv", "loss_adv_u", "loss_d"]
        return columns(out, names), torch.load(out / "last.pt", weights_only=True)
    (one, a), (none, b), (all_, c) = run("one", "--threshold=1"), run("no", "--lam-semi=0"), run("all", "--threshold=0")
    assert one == none and all(torch.equal(a["seg"][k], b["seg"][k]) for k in a["seg"])
    assert all(torch.equal(a["disc"][k], b["disc"][k]) for k in a["disc"])
    assert one != all_ and not all(torch.equal(a["seg"][k], c["seg"][k]) for k in a["seg"])


@pytest.mark.parametrize("script, start", [("train_semi", "--semi-start"), ("train_match", "--u-start")])
def test_unlabelled_loss_starts_when_told(train, script, start):
    words = "--iters", 4, "--threshold" if script == "train_semi" else "--confidence", 0, "--eval-every", 9
    late, never = (train(script, *words, start, n, out=f"{start}{n}") for n in (2, 4))
    late, never = (columns(out, ["loss_ce"]) for out in (late, never))
    assert late[:3] == never[:3] and late[3] != never[3]


def test_d_sees_unlabelled_predictions_where_told(train, trained):
    a, b = log(trained["train_semi"])[0], log(train("train_semi", "--d-unlabelled", "--iters", 1))[0]
    assert a["loss_ce"] == b["loss_ce"] and a["loss_d"] != b["loss_d"]
    assert b["loss_d"] == pytest.approx(a["loss_d"], rel=0.05)  # a mean: at the first step D says 0.69 to everything


def test_holes_tell_the_discriminator_nothing(train, monkeypatch):
    """D's maps are 0 on void and padding and sum to 1 elsewhere, the fake ones exactly where the real one is."""
    forward, holes = model.Discriminator.forward, []

    def watch(self, x):
        if not torch.is_grad_enabled():  # an evaluation
            return forward(self, x)
        total = x.sum(1)
        assert ((total == 0) | ((total - 1).abs() < 0.02)).all()
        holes.append(total == 0)
        return forward(self, x)
    monkeypatch.setattr(model.Discriminator, "forward", watch)
    train("train_semi", "--scale", 0.4, 0.6)
    assert len(holes) == 9
    for maps in zip(holes[::3], holes[1::3], holes[2::3]):
        assert all(m.any() and not m.all() for m in maps)
        same = [sum(torch.equal(one, other) for other in maps) for one in maps]
        assert sorted(same) == [1, 2, 2]  # the unlabelled pictures' holes are their own


def test_d_is_taught_what_is_right(train, monkeypatch):
    """Of labelled predictions, pixel by pixel; no label map is shown to it."""
    answers, bce, forward, seen = [], model.bce, model.Discriminator.forward, []
    losses, cross_entropy = [], ops.masked_cross_entropy
    monkeypatch.setattr(ops, "masked_cross_entropy", lambda *a, **k: losses.append(a) or cross_entropy(*a, **k))
    monkeypatch.setattr(model, "bce", lambda d, real, valid: answers.append((real, valid)) or bce(d, real, valid))
    monkeypatch.setattr(model.Discriminator, "forward", lambda self, x: seen.append(x) or forward(self, x))
    rows = log(train("train_semi", "--scale", 0.4, 0.6, "--iters", 1, "--no-amp", "--d-target", "right",
                     "--trust", 0.4))
    (right, valid), = [(real, valid) for real, valid in answers if isinstance(real, torch.Tensor)]
    target = losses[0][1]
    assert torch.equal(right[valid], (seen[0].argmax(1) == target)[valid]) and torch.equal(valid, target != 255)
    assert right[valid].any() and not right[valid].all() and len(answers) == 3
    assert 0 < rows[0]["kept"] < 0.6 and len(seen) == 2 + 2  # and two of the evaluation


def test_a_strong_view_is_taught_what_the_weak_one_says(train, monkeypatch):
    seen, losses, cross_entropy = [], [], ops.masked_cross_entropy
    normalise = model.DeepLabV2.normalise
    monkeypatch.setattr(model.DeepLabV2, "normalise", lambda self, x: seen.append(x) or normalise(self, x))
    monkeypatch.setattr(ops, "masked_cross_entropy", lambda *a, **k: losses.append(a) or cross_entropy(*a, **k))
    train("train_semi", "--iters", 1, "--strong", "--trust", 0.5)
    _, weak, strong = seen[:3]
    views = data.strong_view(weak, argparse.Namespace(seed=0, batch_size=len(weak)), 1)
    assert torch.equal(strong, views) and not torch.equal(strong, weak)
    logits, taught, d_fake = losses[-1]
    assert logits.requires_grad and (taught != ops.upsample_argmax(logits, taught.shape[1:])).any() and len(d_fake) == 2


def test_a_student_is_taught_what_its_teacher_says(train, monkeypatch):
    """The weak view's classes, mixed as the strong view is; the teacher is what is saved as `seg` and evaluated."""
    seen, taught, losses = [], [], []
    normalise, pseudo_labels, cross_entropy = (
        model.DeepLabV2.normalise, ops.pseudo_labels, ops.masked_cross_entropy)
    monkeypatch.setattr(model.DeepLabV2, "normalise", lambda self, x: seen.append((self, x)) or normalise(self, x))
    monkeypatch.setattr(ops, "pseudo_labels", lambda *a: taught.append((a, pseudo_labels(*a))) or taught[-1][1])
    monkeypatch.setattr(ops, "masked_cross_entropy", lambda *a, **k: losses.append(a) or cross_entropy(*a, **k))
    out = train("train_match", "--iters", 1, "--scale", 0.4, 0.6, "--confidence", 0.2)
    (student, _), (teacher, weak), (other, strong) = seen[:3]
    assert student is other and student is not teacher
    assert len(seen) > 3 and all(net is teacher for net, _ in seen[3:])
    (logits, size, limits, valid), labels = taught[0]
    assert not logits.requires_grad and torch.equal(limits, 0.2 * model.class_confidence(logits, valid))
    args = argparse.Namespace(seed=0, batch_size=2, cutmix=0.5)
    views, mixed, valid_mixed = data.cut_mix((data.strong_view(weak, args, 1), labels, valid), args, 1)
    assert torch.equal(strong, views) and torch.equal(losses[1][1], mixed) and losses[1][0].requires_grad
    kept, valid_sum = (mixed != data.IGNORE).sum(), valid_mixed.sum()
    assert log(out)[0]["kept"] == pytest.approx((kept / valid_sum).item()) and kept > 0
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    for name, net in (("seg", teacher), ("student", student)):
        assert all(torch.equal(checkpoint[name][k], v) for k, v in net.state_dict().items())
    first = model.new_segmenter(argparse.Namespace(**checkpoint["args"]), 4)  # of another draw: names only
    moved = [k for k, _ in first.named_parameters() if not torch.equal(checkpoint["seg"][k], checkpoint["student"][k])]
    assert len(moved) > 100
    base = torch.load(train("train_base", "--iters", 1, "--scale", 0.4, 0.6, out="base") / "last.pt", weights_only=True)
    for k in (k for k in base["seg"] if "running" in k):  # statistics are of labelled pictures, for both
        assert all(torch.equal(checkpoint[name][k], base["seg"][k]) for name in ("student", "seg"))
    out = train("train_match", "--ema", 0, "--confidence", 0.5, out="ema0")
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert all(torch.equal(checkpoint["seg"][k], checkpoint["student"][k]) for k, _ in first.named_parameters())


def test_areas_under_the_curve():
    """Against all pairs of a right and a wrong pixel, in float64."""
    torch.manual_seed(0)
    disc, logits = model.Discriminator(3), torch.randn(2, 3, 9, 9)
    target = torch.randint(0, 3, (2, 65, 65), dtype=torch.uint8)
    target[:, :9] = 255
    args = argparse.Namespace(amp=False, d_input="soft", threshold=0.5)
    with torch.no_grad():
        disc.layers[-1].weight *= 40  # answers above and below 0.5
        scores = evaluation.trust_scores(evaluation.judge(disc, logits, target, args))
        soft = F.interpolate(logits, (65, 65), mode="bilinear", align_corners=True).softmax(1)
        net, ids = soft.double().max(1)
        answer = disc(soft * (target != 255)[:, None]).double()
        answer = F.interpolate(answer, (65, 65), mode="bilinear", align_corners=True)[:, 0].sigmoid()
    right, wrong = (target != 255) & (ids == target), (target != 255) & (ids != target)
    for name, sure in (("auc", answer), ("auc_net", net), ("auc_both", answer * net)):
        a, b = sure[right][:, None], sure[wrong]
        assert scores[name] == pytest.approx(100 * ((a > b).double() + (a == b) / 2).mean().item(), abs=0.2)
    kept = answer > 0.5
    assert 0.1 < kept[target != 255].double().mean() < 0.9
    assert scores["precision"] == pytest.approx(
        100 * ((kept & right).sum() / (kept & (right | wrong)).sum()).item(), abs=0.2)


def test_losses_count_valid_pixels_only(train, monkeypatch):
    """Every loss of a step gets the mask of its own pictures."""
    masks, bce, semi = [], model.bce, []
    cross_entropy = ops.masked_cross_entropy
    monkeypatch.setattr(model, "bce", lambda d, real, valid: masks.append((real, valid)) or bce(d, real, valid))
    monkeypatch.setattr(ops, "masked_cross_entropy", lambda *a, **k: semi.append((a, k)) or cross_entropy(*a, **k))
    train("train_semi", "--scale", 0.4, 0.6, "--iters", 1, "--d-smooth", 0.25)
    (_, target), unlabelled = semi[0][0], next(k["valid"] for a, k in semi if len(a) == 3)
    labelled = target != data.IGNORE
    assert not labelled.all() and not unlabelled.all() and not torch.equal(unlabelled, labelled)
    found = {"labelled": [real for real, mask in masks if torch.equal(mask, labelled)],
             "unlabelled": [real for real, mask in masks if torch.equal(mask, unlabelled)]}
    assert sorted(found["labelled"]) == [0, 0.75, 1] and found["unlabelled"] == [1] and len(masks) == 4


def test_a_picture_is_unlabelled_once(train, voc, monkeypatch):
    """--unlabelled may name a folder that holds the data set's own pictures: none comes twice, none of train or val."""
    seen, stream = {}, data.Stream
    monkeypatch.setattr(data, "Stream", lambda samples, args, name: stream(seen.setdefault(name, samples), args, name))
    Image.new("RGB", (96, 80)).save(voc / "JPEGImages/more.png")
    train("train_semi", "--unlabelled", voc / "JPEGImages", "--iters", 1)
    labelled, unlabelled = ([path for path, _ in seen[name]] for name in ("labelled", "unlabelled"))
    assert len(labelled) == 4 and len(unlabelled) == len(set(unlabelled)) == 5 and not set(labelled) & set(unlabelled)


class Killed(Exception):
    """In place of kill -9: nothing in the scripts catches it."""


def killing(module, name, when):
    """The function `name` of a module or class, but raising Killed after the call for which when(*args) is true."""
    function = getattr(module, name)

    def dying(*args, **kw):
        result = function(*args, **kw)
        if when(*args):
            raise Killed
        return result
    return dying


def test_resume(train, monkeypatch, capsys):
    """Killed behind step 3 with a checkpoint of step 2: the log's later lines go, the rest is as in one go."""
    words = "--iters", 4, "--eval-every", 9, "--save-every", 2
    whole = train("train_semi", *words, "--resume", out="whole")  # nothing there: from the start
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(common.Run, "log", killing(common.Run, "log", lambda run, step: step == 3))
        train("train_semi", *words, out="killed")
    killed = whole.parent / "killed"
    assert [r["step"] for r in log(killed)] == [1, 2, 3]
    with open(killed / "log.jsonl", "a") as f:
        f.write('{"step": 4, "loss')  # a line that was being written
    train("train_semi", *words, "--resume", out="killed")
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()

    with pytest.raises(cli.InputError, match="--lr was 0.002 .* is now 0.5"):
        train("train_semi", *words, "--resume", "--lr", 0.5, out="killed")
    with pytest.raises(cli.InputError, match="--iters 2: .* is at step 4 already"):
        train("train_semi", *words, "--iters", 2, "--semi-start", 1, "--resume", out="killed")
    capsys.readouterr()
    train("train_semi", *words, "--resume", out="killed")  # it had ended
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"mIoU {log(killed)[-1]['miou']:.2f}" and not any(s.startswith("step ") for s in said)
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def test_a_run_that_ended_is_left_as_it_is(trained, blocks, tmp_path, monkeypatch, fails):
    """--resume scores it again and writes nothing, also where a signal comes; another script does not take it over."""
    out = shutil.copytree(trained["train_semi"], tmp_path / "ended")
    before = {f.name: f.read_bytes() for f in out.glob("*.pt")}
    words = "--data", blocks, *SMALL, "--out", out, "--resume"
    call("train_semi", *words)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(data, "for_net", lambda *args, f=data.for_net: os.kill(os.getpid(), signal.SIGTERM) or f(*args))
        call("train_semi", *words)
    assert "last.pt is of another script" in fails("train_base", *words)
    assert before == {f.name: f.read_bytes() for f in out.glob("*.pt")}
    assert log(out) == log(trained["train_semi"])


@pytest.mark.parametrize("script", ["train_base", "train_match"])
def test_a_bad_file_of_val_costs_no_step(voc, tmp_path, fails, script):
    """The evaluation that finds it ends the run behind a checkpoint; --resume makes up for the score."""
    (voc / "SegmentationClassAug/val1.png").write_text("no picture")
    words = "--data", voc, *SMALL, "--out", tmp_path / "out", "--eval-every", 2
    assert "val1.png: cannot be read" in fails(script, *words)
    checkpoint = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert checkpoint["step"] == 2 and checkpoint["miou"] is None
    shutil.copy(voc / "SegmentationClassAug/val0.png", voc / "SegmentationClassAug/val1.png")
    call(script, *words, "--resume")
    assert [r["step"] for r in log(tmp_path / "out") if "miou" in r] == [2, 3]


def test_resume_makes_up_for_a_score(train, monkeypatch):
    """Killed when a score's checkpoint is written and the log has not got it yet: it scores again, best.pt is there."""
    words = "train_base", "--iters", 4, "--eval-every", 2, "--save-every", 9, "--log-every", 9
    whole = train(*words, out="whole")
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(common.Run, "score", lambda *_: (_ for _ in ()).throw(Killed))
        train(*words, out="killed")
    killed = whole.parent / "killed"
    assert torch.load(killed / "last.pt", weights_only=True)["step"] == 2 and not (killed / "best.pt").exists()
    train(*words, "--resume", out="killed")
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text() and (killed / "best.pt").exists()


def test_a_score_of_a_step_that_was_not_logged(train, tmp_path, monkeypatch):
    """--eval-every may change on the way: the score stands with its step. A checkpoint alone makes no row."""
    words = "train_base", "--iters", 4, "--log-every", 100, "--save-every", 2
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(common.Run, "save", killing(common.Run, "save", lambda run, step, scores: step == 2))
        train(*words, "--eval-every", 100)
    assert [row["step"] for row in log(tmp_path / "out")] == [1]
    out = train(*words, "--eval-every", 2, "--resume")
    assert [(row["step"], "miou" in row) for row in log(out)] == [(1, False), (2, True), (4, True)]


@pytest.mark.parametrize("flags,say", [
    (["--data", "nowhere"], "--data nowhere: no data there"), (["--split", 0], "--split 0.0: "),
    (["--split", 1.5], "--split 1.5: "), (["--split", "nan"], "--split nan"), (["--stride", 12], "--stride: "),
    (["--split", 0.01], "leaves none of 8 pictures labelled"), (["--batch-size", 0], "--batch-size: 0 is out"),
    (["--crop", 66], "--crop 66: it must be 16*k+1 and at least 65; the nearest is 65"), (["--seed", -1], "--seed: -1"),
    (["--crop", 49], "the nearest is 65"), (["--crop", 75], "the nearest is 81"), (["--nonsense"], "--nonsense"),
    (["--backbone", "resnet18", "--stride", 16], "--stride 16"), (["--backbone", "vgg"], "--backbone"),
    (["--iters", 0], "--iters: 0 is out of range: it must be at "), (["--workers", -1], "--workers: -1"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"), (["--init", "coco"], "--init coco"),
    (["--eval-every", 0], "--eval-every: 0"), (["--scale", 2, 1], "--scale 2 1"), (["--lr", "nan"], "--lr: nan"),
    (["--scale", 1, "inf"], "--scale: inf"), (["--input-scale", 0.3], "--input-scale: "), (["--lr", -1], "--lr: -1"),
    (["--init", "nowhere.pt"], "--init nowhere.pt: No such file"), (["--labelled-ids", "nowhere.txt"], "nowhere.txt"),
])
def test_bad_flags_are_named_and_nothing_is_written(blocks, tmp_path, fails, flags, say):
    """The scripts share these flags and their checks: see test_each_script_adds_one_idea."""
    out = tmp_path / "out"
    assert say in fails("train_base", "--data", blocks, *SMALL, "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize("flags,say", [
    (["--split", 1], "leave no picture unlabelled"), (["--unlabelled", "nowhere"], "--unlabelled nowhere"),
    (["--d-smooth", 1], "--d-smooth: 1 is out of range: it must be at least 0 and below 1"),
    (["--threshold", "nan"], "--threshold"), (["--d-betas", 0.9, 1], "--d-betas: 1"),
    (["--semi-start", -1], "--semi-start: -1"), (["--trust", 0], "--trust 0: it is a share above 0"),
    (["--trust", 1.01], "--trust 1.01: it is a share"), (["--trust", 0.5, "--threshold", 0.2], "replaces --threshold"),
    (["--d-target", "right", "--d-unlabelled"], "drop --d-target right"),
])
def test_bad_flags_of_semi(blocks, tmp_path, fails, flags, say):
    assert say in fails("train_semi", "--data", blocks, *SMALL, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_bad_out(blocks, tmp_path, fails):
    (tmp_path / "file").write_text("")
    assert "that is a file" in fails("train_base", "--data", blocks, *SMALL, "--out", tmp_path / "file")
    assert "--out" in fails("train_base", "--data", blocks, *SMALL, "--out", tmp_path / "file/below")


def test_a_worker_finds_a_bad_picture(voc, tmp_path):
    path = voc / "JPEGImages/train1.png"
    path.write_bytes(path.read_bytes()[:-60])
    done = python("train_base.py", "--data", voc, *SMALL, "--workers", 2, "--split", 1, "--iters", 9, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stdout, done.stderr
    assert f"{path}: cannot be read (" in done.stderr and "replace or remove it" in done.stderr


def test_bad_checkpoints(trained, voc, tmp_path, fails):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "words.pt").write_text("torch==2.14.1\n")
    torch.save({"seg": {}, "args": {}, "classes": ["a", "b"]}, tmp_path / "empty.pt")
    for name in ("text.pt", "words.pt", "other.pt", "missing.pt", "empty.pt"):
        assert f"{name}: " in fails("eval", "--ckpt", tmp_path / name)
    ckpt = trained["train_base"] / "last.pt"
    assert "--workers: -1" in fails("eval", "--ckpt", ckpt, "--workers", -1)
    assert "--json" in fails("eval", "--ckpt", ckpt, "--json", tmp_path / "no/x.json")
    assert "no list test.txt" in fails("eval", "--ckpt", ckpt, "--list", "test")
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:100000])
    assert "cut.pt: " in fails("eval", "--ckpt", tmp_path / "cut.pt")
    (voc / "classes.txt").write_text("grey\nred\ngreen\nblue\nextra\n")
    assert "has 4 classes" in fails("eval", "--ckpt", ckpt, "--data", voc)
    assert "--resume" in fails("train_base", "--data", voc, *SMALL, "--out", ckpt.parent, "--resume")


def flags_of(script):
    actions = importlib.import_module(script).flags()._actions
    return {a.dest if a.dest != argparse.SUPPRESS else "recipes": a for a in actions}


@pytest.mark.parametrize("script", [*SCRIPTS, "eval"])
def test_every_flag_is_read(script):
    read = set()
    for file in (script, "common", "data", "model", "parallel") if script != "eval" else (script,):
        tree = ast.parse((ROOT / f"{file}.py").read_text())
        tree.body = [node for node in tree.body if getattr(node, "name", "") != "settle"]  # checking is not using
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                read |= {node.attr} if ast.unparse(node.value) in ("args", "self.args") else set()
    # these two print and stop; settle() turns this one into semi_start
    assert set(flags_of(script)) - {"help", "recipes", "semi_start_epoch"} <= read


@QUICK
def test_each_script_adds_one_idea():
    """Lines of each script, and lines that change from one to the next, within what design and README promise."""
    for script, most in zip(SCRIPTS, (65, 85, 105, 95)):
        assert len((ROOT / f"{script}.py").read_text().splitlines()) <= most
    for one, two, most in (("train_base", "train_adv", 40), ("train_adv", "train_semi", 35),
                           ("train_base", "train_match", 52)):
        diff = subprocess.run(["diff", f"{one}.py", f"{two}.py"], cwd=ROOT, capture_output=True, text=True).stdout
        assert len([line for line in diff.splitlines() if line[0] in "<>"]) <= most, diff


RANKS = dict(cli=0, flags=1, parallel=1, shapes=2, data=3, csrc=4, model=5, predict=6,
             watch=7, common=8, eval=9, train=10, report=10, export=10)
MAY_IMPORT = {"shapes": set(), "csrc": {"cli", "csrc"}, "prepare": {"data", "shapes", "cli"}}


@QUICK
def test_imports_go_one_way():
    """As RANKS says: cli first, scripts last; shapes imports none, csrc cli at most."""
    rooms = {f.stem for f in ROOT.glob("*.py")} | {"csrc"}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("csrc/*.py")]:
        room = "csrc" if file.parent.name == "csrc" else file.stem
        tree = ast.walk(ast.parse(file.read_text()))
        names = {name for node in tree if isinstance(node, ast.Import | ast.ImportFrom) for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
        ours = {name.split(".")[0] for name in names} & rooms - ({"prepare"} if room == "data" else set())
        if room in MAY_IMPORT:
            assert ours <= MAY_IMPORT[room], (file, ours)
        else:
            rank = RANKS[room.split("_")[0]]
            assert all(RANKS[name] < rank for name in ours), (file, ours)


def test_own_data_in_colour_and_unlabelled_pictures_of_any_size(tmp_path, capsys):
    """Two folders and classes.txt, no lists: names, colours and number of classes come from there."""
    rng = np.random.RandomState(0)
    colours = np.array([(10, 20, 30), (200, 100, 0), (0, 0, 0)], np.uint8)  # the last is void
    own, more = tmp_path / "own", tmp_path / "more/deep/er"
    for folder in (own / "images", own / "labels", more):
        folder.mkdir(parents=True)
    (own / "classes.txt").write_text("road 10 20 30\nold car 200 100 0\nvoid 0 0 0\n")
    for n in range(10):
        label = rng.randint(0, 3, (5, 6)).repeat(16, 0).repeat(16, 1)
        Image.fromarray(rng.randint(0, 255, (80, 96, 3), np.uint8)).save(own / f"images/{n}.jpg")
        Image.fromarray(colours[label]).save(own / f"labels/{n}.png")
    for n, size in enumerate([(30, 20), (300, 100), (64, 200)]):
        Image.fromarray(rng.randint(0, 255, (*size, 3), np.uint8)).save(more.parents[n % 2] / f"x{n}.jpg")
    out = tmp_path / "out"
    call("train_semi", "--data", own, *SMALL, "--split=1", "--unlabelled", more.parents[1], "--workers=2", "--out", out)
    said = capsys.readouterr().out
    assert "own has no lists: 8 of its labelled pictures train, 2 are val; data " in said
    assert "8 labelled pictures, 2 classes" in said
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["classes"] + checkpoint["args"]["palette"][:6] == ["road", "old car", 10, 20, 30, 200, 100, 0]
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--out", tmp_path / "pictures")
    assert "\nold car " in capsys.readouterr().out
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--out", tmp_path / "found", "--images", own / "images/3.jpg")
    shown = {c for _, c in Image.open(tmp_path / "found/3.png").convert("RGB").getcolors()}
    assert shown and shown <= {(10, 20, 30), (200, 100, 0)}


@QUICK
def test_file_maps_are_what_git_has():
    """The one in README.md, and that of csrc in its own."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    block = "".join((ROOT / page).read_text().split("<!-- files -->")[1] for page in ("README.md", "csrc/README.md"))
    rows = [line.split("|")[1] for line in block.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in row.split("`")[1::2]]
    # recipes have a table of their own, see test_recipes.py; one line stands for the tests
    rest = [f for f in files if f != "README.md" and not f.startswith(("recipes/", "tests/", "docs/"))]
    assert set(named) == {*rest, "recipes/", "tests/", "docs/"}


@QUICK
def test_readme_shows_the_losses_as_they_are():
    lines = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0].splitlines()
    script = [line.strip() for line in (ROOT / "train_semi.py").read_text().splitlines()]
    assert len(lines) == 3 and all(line.strip() in script for line in lines)
