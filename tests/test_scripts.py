"""The scripts as a user runs them: what they write and print, the method's identities, resuming, wrong input."""
import ast
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, call, log, python
from PIL import Image

import data
import model
from common import console
from common import run as common_run
from common.layouts import IGNORE
from csrc import ops

QUICK, SLOW = pytest.mark.quick, pytest.mark.slow

LOSSES = {"train_base": ["loss_ce"], "train_adv": ["loss_ce", "loss_adv", "loss_d"],
          "train_semi": ["loss_ce", "loss_adv", "loss_adv_u", "loss_semi", "kept", "loss_d"],
          "train_match": ["loss_ce", "loss_u", "kept"]}
PARTS = {"train_base": {"seg", "opt_seg"}, "train_match": {"seg", "opt_seg", "student"}}


@QUICK
@pytest.mark.parametrize("script", SCRIPTS)
def test_three_steps(trained, blocks, script):
    """What a training writes, and that the checkpoint is one."""
    out, rows = trained[script], log(trained[script])
    assert [r["step"] for r in rows] == [1, 2, 3]
    for r in rows:
        assert {"step", *LOSSES[script], "lr", "miou"} <= r.keys() and 0 <= r["miou"] <= 100
    assert len((out / "labelled.txt").read_text().split()) == 4
    facts = json.loads((out / "run.json").read_text())
    assert facts["args"]["iters"] == 3 and facts["args"]["norm"] == "imagenet" and facts["ops"] == ops.describe()
    assert facts["script"] == f"{script}.py" and {"commit", "torch", "python", "device", "data"} <= set(facts)
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    parts = PARTS.get(script, {"seg", "opt_seg", "disc", "opt_disc"})
    assert {name for name, part in checkpoint.items() if isinstance(part, dict)} == parts | {"args"}
    backbone, head = checkpoint["opt_seg"]["param_groups"]
    assert (backbone["momentum"], backbone["nesterov"], backbone["weight_decay"]) == (0.9, True, 1e-4)
    assert head["initial_lr"] == 10 * backbone["initial_lr"]
    assert checkpoint["step"] == 3 and checkpoint["classes"] == ["grey", "red", "green", "blue"]
    assert checkpoint["miou"] == rows[-1]["miou"] and checkpoint["minutes"] > 0
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


def test_predicts_any_images(trained, tmp_path, fails):
    ckpt = trained["train_base"] / "last.pt"
    for name, size in (("a.jpg", (50, 70)), ("b.png", (131, 65))):
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / name)
    flags = ["--ckpt", ckpt, "--gpu", -1, tmp_path / "a.jpg", tmp_path / "b.png"]
    assert "--out" in fails("predict", *flags)
    call("predict", *flags, "--out", tmp_path / "p")
    assert Image.open(tmp_path / "p/a.png").size == (50, 70) and Image.open(tmp_path / "p/b.png").size == (131, 65)
    assert "b.png" in fails("predict", *flags, "--out", tmp_path)
    assert "q/b.png" in fails("predict", *flags, tmp_path / "x/b.jpg", "--out", tmp_path / "q")
    assert "b.txt" in fails("predict", "--ckpt", ckpt, tmp_path / "b.txt", "--out", tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_bad_label_ends_the_evaluation(trained, voc, tmp_path, fails):
    ckpt = trained["train_base"] / "last.pt"
    (voc / "SegmentationClassAug/val1.png").write_text("no picture")
    assert "val1.png: cannot be read" in fails("eval", "--ckpt", ckpt, "--data", voc, "--out", tmp_path / "p/q")
    assert {f.suffix for f in (tmp_path / "p/q").iterdir()} <= {".png"}  # no overview, nothing half-written


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


def test_a_student_learns_what_its_teacher_predicts(train, monkeypatch):
    """The weak view's classes, mixed as the strong view is; the teacher is what is saved as `seg` and evaluated."""
    seen, taught, losses = [], [], []
    forward, pseudo_labels, cross_entropy = model.DeepLabV2.forward, ops.pseudo_labels, ops.masked_cross_entropy
    monkeypatch.setattr(model.DeepLabV2, "forward", lambda self, x: seen.append((self, x)) or forward(self, x))
    monkeypatch.setattr(ops, "pseudo_labels", lambda *a: taught.append((a, pseudo_labels(*a))) or taught[-1][1])
    monkeypatch.setattr(ops, "masked_cross_entropy", lambda *a, **k: losses.append(a) or cross_entropy(*a, **k))
    out = train("train_match", "--iters", 1, "--scale", 0.4, 0.6, "--confidence", 0.2)
    (student, _), (teacher, weak), (other, strong) = seen[:3]
    assert student is other and student is not teacher
    assert len(seen) > 3 and all(net is teacher for net, _ in seen[3:])
    (logits, size, limits, valid), labels = taught[0]
    assert not logits.requires_grad and torch.equal(limits, 0.2 * model.class_confidence(logits, valid))
    views, mixed, valid_mixed = data.cut_mix((data.strong_view(weak, 0, 1), labels, valid), 0.5, 0, 1)
    assert torch.equal(strong, views) and torch.equal(losses[1][1], mixed) and losses[1][0].requires_grad
    kept, valid_sum = (mixed != IGNORE).sum(), valid_mixed.sum()
    assert log(out)[0]["kept"] == pytest.approx((kept / valid_sum).item()) and kept > 0
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    for name, net in (("seg", teacher), ("student", student)):
        assert all(torch.equal(checkpoint[name][k], v) for k, v in net.state_dict().items())
    first = model.load_segmenter(out / "last.pt")
    moved = [k for k, _ in first.named_parameters() if not torch.equal(checkpoint["seg"][k], checkpoint["student"][k])]
    assert len(moved) > 100
    base = torch.load(train("train_base", "--iters", 1, "--scale", 0.4, 0.6, out="base") / "last.pt", weights_only=True)
    for k in (k for k in base["seg"] if "running" in k):  # statistics are of labelled pictures, for both
        assert all(torch.equal(checkpoint[name][k], base["seg"][k]) for name in ("student", "seg"))
    out = train("train_match", "--ema", 0, "--confidence", 0.5, out="ema0")
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert all(torch.equal(checkpoint["seg"][k], checkpoint["student"][k]) for k, _ in first.named_parameters())


def test_losses_count_valid_pixels_only(train, monkeypatch):
    """Every loss of a step gets the mask of its own pictures."""
    masks, bce, losses = [], model.bce, {}

    def keep(name, function):
        return lambda *a, **k: losses.setdefault(name, a) and function(*a, **k)
    monkeypatch.setattr(model, "bce", lambda d, real, valid: masks.append((real, valid)) or bce(d, real, valid))
    for name in ("cross_entropy", "pseudo_label_loss"):
        monkeypatch.setattr(model, name, keep(name, getattr(model, name)))
    train("train_semi", "--scale", 0.4, 0.6, "--iters", 1, "--d-smooth", 0.25)
    unlabelled, labelled = losses["pseudo_label_loss"][2], losses["cross_entropy"][1] != IGNORE
    assert (losses["pseudo_label_loss"][1][~unlabelled] == IGNORE).all()
    assert not labelled.all() and not unlabelled.all() and not torch.equal(unlabelled, labelled)
    found = {"labelled": [real for real, mask in masks if torch.equal(mask, labelled)],
             "unlabelled": [real for real, mask in masks if torch.equal(mask, unlabelled)]}
    assert sorted(found["labelled"]) == [0, 0.75, 1] and found["unlabelled"] == [1] and len(masks) == 4


def test_a_picture_is_unlabelled_once(train, voc, monkeypatch):
    """--unlabelled may name a folder that holds the data set's own pictures: none comes twice, none of train or val.

    It replaces ROOT/unlabelled.
    """
    seen, stream = {}, data.TrainDataset
    monkeypatch.setattr(data, "TrainDataset", lambda samples, name, *more: stream(seen.setdefault(name, samples), name,
                                                                                  *more))
    (voc / "unlabelled").mkdir()
    for name in ("JPEGImages/more.png", "unlabelled/other.png"):
        Image.new("RGB", (96, 80)).save(voc / name)
    train("train_semi", "--unlabelled", voc / "JPEGImages", "--iters", 1)
    labelled, unlabelled = ([sample.image for sample in seen[name]] for name in ("labelled", "unlabelled"))
    assert str(voc / "JPEGImages/more.png") in unlabelled
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
        m.setattr(common_run.Run, "log", killing(common_run.Run, "log", lambda run, step: step == 3))
        train("train_semi", *words, out="killed")
    killed = whole.parent / "killed"
    assert [r["step"] for r in log(killed)] == [1, 2, 3]
    with open(killed / "log.jsonl", "a") as f:
        f.write('{"step": 4, "loss')  # a line that was being written
    train("train_semi", *words, "--resume", out="killed")
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()

    with pytest.raises(console.InputError, match="--lr was 0.002"):
        train("train_semi", *words, "--resume", "--lr", 0.5, out="killed")
    with pytest.raises(console.InputError, match="--iters 2: "):
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
        pad = data.pad_to_stride
        m.setattr(data, "pad_to_stride", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or pad(*args))
        call("train_semi", *words)
    assert "disc" in fails("train_base", *words)
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
        m.setattr(common_run.Run, "score", lambda *_: (_ for _ in ()).throw(Killed))
        train(*words, out="killed")
    killed = whole.parent / "killed"
    assert torch.load(killed / "last.pt", weights_only=True)["step"] == 2 and not (killed / "best.pt").exists()
    train(*words, "--resume", out="killed")
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text() and (killed / "best.pt").exists()


def test_a_score_of_a_step_that_was_not_logged(train, tmp_path, monkeypatch):
    """--eval-every may change on the way: the score stands with its step. A checkpoint alone makes no row."""
    words = "train_base", "--iters", 4, "--log-every", 100, "--save-every", 2
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(common_run.Run, "save", killing(common_run.Run, "save", lambda run, step, *_: step == 2))
        train(*words, "--eval-every", 100)
    assert [row["step"] for row in log(tmp_path / "out")] == [1]
    out = train(*words, "--eval-every", 2, "--resume")
    assert [(row["step"], "miou" in row) for row in log(out)] == [(1, False), (2, True), (4, True)]


@pytest.mark.parametrize("flags,say", [
    (["--data", "nowhere"], "--data nowhere"), (["--split", 0], "--split 0.0: "),
    (["--split", 1.5], "--split 1.5: "), (["--split", "nan"], "--split nan"), (["--stride", 12], "--stride: "),
    (["--split", 0.01], "--split 0.01"), (["--batch-size", 0], "--batch-size: 0 is out"),
    (["--crop", 66], "nearest is 65"), (["--seed", -1], "--seed: -1"),
    (["--crop", 49], "the nearest is 65"), (["--crop", 75], "the nearest is 81"), (["--nonsense"], "--nonsense"),
    (["--backbone", "resnet18", "--stride", 16], "--stride 16"), (["--backbone", "vgg"], "--backbone"),
    (["--iters", 0], "--iters: 0"), (["--workers", -1], "--workers: -1"),
    (["--lr", "fast"], "--lr: "), (["--init", "coco"], "--init coco"),
    (["--eval-every", 0], "--eval-every: 0"), (["--scale", 2, 1], "--scale 2 1"), (["--lr", "nan"], "--lr: nan"),
    (["--scale", 1, "inf"], "--scale: inf"), (["--input-scale", 0.3], "--input-scale: "), (["--lr", -1], "--lr: -1"),
    (["--init", "nowhere.pt"], "--init nowhere.pt"), (["--labelled-ids", "nowhere.txt"], "nowhere.txt"),
])
def test_bad_flags_are_named_and_nothing_is_written(blocks, tmp_path, fails, flags, say):
    out = tmp_path / "out"
    assert say in fails("train_base", "--data", blocks, *SMALL, "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize("flags,say", [
    (["--split", 1], "--unlabelled"), (["--unlabelled", "nowhere"], "--unlabelled nowhere"),
    (["--d-smooth", 1], "--d-smooth: 1"),
    (["--threshold", "nan"], "--threshold"), (["--d-betas", 0.9, 1], "--d-betas: 1"),
    (["--semi-start", -1], "--semi-start: -1"),
])
def test_bad_flags_of_semi(blocks, tmp_path, fails, flags, say):
    assert say in fails("train_semi", "--data", blocks, *SMALL, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_bad_out(blocks, tmp_path, fails):
    (tmp_path / "file").write_text("")
    for out in ("", tmp_path / "file"):
        assert f"--out {out}" in fails("train_base", "--data", blocks, *SMALL, "--out", out)
    assert "--out" in fails("train_base", "--data", blocks, *SMALL, "--out", tmp_path / "file/below")


def test_a_worker_finds_a_bad_picture(voc, tmp_path):
    path = voc / "JPEGImages/train1.png"
    path.write_bytes(path.read_bytes()[:-60])
    done = python("train_base.py", "--data", voc, *SMALL, "--workers", 2, "--split", 1, "--iters", 9, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stdout, done.stderr
    assert str(path) in done.stderr


def test_bad_checkpoints(trained, voc, tmp_path, fails):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "words.pt").write_text("torch==2.14.1\n")
    torch.save({"seg": {}, "args": {}, "classes": ["a", "b"]}, tmp_path / "empty.pt")
    for name in ("text.pt", "words.pt", "other.pt", "missing.pt", "empty.pt"):
        assert f"{name}: " in fails("eval", "--ckpt", tmp_path / name)
    ckpt = trained["train_base"] / "last.pt"
    assert "--workers: -1" in fails("eval", "--ckpt", ckpt, "--workers", -1)
    assert "test.txt" in fails("eval", "--ckpt", ckpt, "--list", "test")
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:100000])
    assert "cut.pt: " in fails("eval", "--ckpt", tmp_path / "cut.pt")
    (voc / "classes.txt").write_text("grey\nred\ngreen\nblue\nextra\n")
    assert "4 classes" in fails("eval", "--ckpt", ckpt, "--data", voc)
    assert "--resume" in fails("train_base", "--data", voc, *SMALL, "--out", ckpt.parent, "--resume")


@QUICK
def test_shared_code_imports_no_script():
    """common/ imports nothing of ours outside common, csrc nothing but common.console."""
    for folder, allowed in (("common", "common"), ("csrc", ("csrc", "common.console"))):
        for file in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [
                    f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
                tops = {name: ROOT / name.split(".")[0] for name in names}
                ours = [name for name, top in tops.items() if top.is_dir() or top.with_suffix(".py").exists()]
                assert all(name.startswith(allowed) for name in ours), (file, ours)


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
    assert "own has no lists: 8 of its labelled images" in said
    assert "8 labelled images, 2 classes" in said
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["classes"] + checkpoint["args"]["palette"][:6] == ["road", "old car", 10, 20, 30, 200, 100, 0]
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--out", tmp_path / "predictions")
    assert "\nold car " in capsys.readouterr().out
    call("predict", "--ckpt", out / "last.pt", "--gpu", -1, "--out", tmp_path / "found", own / "images/3.jpg")
    shown = {c for _, c in Image.open(tmp_path / "found/3.png").convert("RGB").getcolors()}
    assert shown and shown <= {(10, 20, 30), (200, 100, 0)}
