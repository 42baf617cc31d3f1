"""The training scripts and eval.py as a user runs them: files, losses, resuming, warnings, defaults, wrong input."""
import importlib
import json
import os
import re
import subprocess
import sys

from common import console
from common.args import resolve_args
from common.layouts import open_dataset
from common.run import HealthyRange, range_warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS, SMALL, Killed, call, interrupt, is_equal, load, log, python
from PIL import Image

import data
import model
import train_semi
from csrc import ops
from eval import Evaluation, class_scores

QUICK = pytest.mark.quick

LOSSES = {"train_base": ["loss_ce"], "train_adv": ["loss_ce", "loss_adv", "loss_d"],
          "train_semi": ["loss_ce", "loss_adv", "loss_adv_u", "loss_semi", "kept", "loss_d"],
          "train_match": ["loss_ce", "loss_u", "kept"]}


@QUICK
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_training_writes(trained, capsys, script):
    """Log, facts and checkpoints; eval.py scores the last checkpoint as the training did."""
    out, rows = trained[script], log(trained[script])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all({*LOSSES[script], "lr", "miou"} <= row.keys() and 0 <= row["miou"] <= 100 for row in rows)
    assert len((out / "labelled.txt").read_text().split()) == 4
    facts = json.loads((out / "run.json").read_text())
    assert facts["script"] == f"{script}.py" and facts["ops"] == ops.describe()
    assert facts["args"]["iters"] == 3 and facts["args"]["norm"] == "imagenet"  # given, and a default
    checkpoint = load(out)
    assert checkpoint["step"] == 3 and checkpoint["classes"] == ["grey", "red", "green", "blue"]
    assert checkpoint["miou"] == rows[-1]["miou"]
    assert load(out, "best.pt")["miou"] == max(row["miou"] for row in rows)
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--workers", 0)
    assert capsys.readouterr().out.splitlines()[-1] == f"mIoU {rows[-1]['miou']:.2f}"


def test_as_a_user_runs_it(trained, blocks, tmp_path):
    """From another folder; with workers the log is the same as without."""
    out = tmp_path / "runs/a"
    done = python(ROOT / "train_semi.py", "--data", blocks, *SMALL, "--workers", 1, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert str(blocks) in lines[0] and "cpu" in lines[0] and f"ops {ops.in_use()}" in lines[0]
    assert lines[-1] == f"mIoU {log(out)[-1]['miou']:.2f}" and str(blocks) in lines[-2]
    assert (out / "log.jsonl").read_text() == (trained["train_semi"] / "log.jsonl").read_text()


@QUICK
@pytest.mark.parametrize("given, expected", [({}, "100000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                             ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_waiting_threads_do_not_spin_for_long(given, expected):
    """Every command sets GOMP_SPINCOUNT before it imports torch, which reads it, unless the user chose otherwise."""
    code = """
import importlib, os, sys
sys.modules["torch"], given = None, dict(os.environ)  # None: its import raises an ImportError
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(os.environ.get("GOMP_SPINCOUNT"))
    sys.modules.pop("common", None)
    os.environ.clear()
    os.environ.update(given)
"""
    names = [file.stem for file in ROOT.glob("*.py")]
    chosen = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    env = {name: value for name, value in os.environ.items() if name not in chosen} | given
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [expected] * len(names), done


@pytest.mark.parametrize("script", SCRIPTS)
def test_workers_start_before_the_networks(train, monkeypatch, script):
    """Forked later, each of them would hold a copy."""
    create, workers = model.create_segmenter, torch.multiprocessing.active_children
    monkeypatch.setattr(model, "create_segmenter", lambda *args: workers() and create(*args))
    train(script, "--iters", 1, "--workers", 1)


@QUICK
def test_eval_scores_as_the_devkit_does(train, voc, tmp_path, capsys):
    """The mIoU is that of the PNGs that eval.py writes, counted here over whole images without void."""
    out = train("train_base", "--input-scale", 0.5, "--iters", 1)
    capsys.readouterr()
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--workers", 0, "--out", tmp_path / "p", "--json",
         tmp_path / "scores.json")
    lines, scores = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "scores.json").read_text())
    matrix = np.zeros((4, 4))
    for i in ("val0", "val1"):
        files = voc / f"SegmentationClassAug/{i}.png", tmp_path / f"p/{i}.png"
        truth, guess = (np.asarray(Image.open(file)) for file in files)
        np.add.at(matrix, (truth[truth != 255], guess[truth != 255]), 1)
    with np.errstate(invalid="ignore"):
        iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert lines[-1] == f"mIoU {100 * np.nanmean(iou):.2f}"
    assert Image.open(tmp_path / "p/overview.jpg").width == 3 * 240
    for k, name in enumerate(["grey", "red", "green", "blue"]):
        true, missed, wrong = matrix[k, k], matrix[k].sum() - matrix[k, k], matrix[:, k].sum() - matrix[k, k]
        want = 100 * np.array([iou[k], true / max(true + wrong, 1), true / (true + missed),
                               2 * true / (2 * true + missed + wrong)])
        assert [scores[score][name] for score in ("per_class", "precision", "recall", "f1")] == pytest.approx(want)
        assert next(line for line in lines if line.startswith(name)).split()[1:] == [f"{x:.2f}" for x in want]
    assert scores["pixel_accuracy"] == pytest.approx(100 * np.trace(matrix) / matrix.sum())
    constant = 100 * matrix.sum(1).max() / matrix.sum() / 4
    assert any(line.endswith(f"everywhere scores a mean IoU of {constant:.2f}") for line in lines)


@QUICK
def test_scores_of_classes_that_are_absent_or_missed():
    """Class 1 is never predicted, class 2 is only predicted, class 3 is neither."""
    matrix = torch.tensor([[6, 0, 2, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = class_scores(matrix)
    want = {"iou": [0.6, 0, 0], "precision": [0.75, 0, 0], "recall": [0.75, 0, 0], "f1": [0.75, 0, 0]}
    assert all(scores[name].tolist()[:3] == pytest.approx(want[name]) and scores[name][3].isnan() for name in want)
    assert torch.equal(scores["iou"][:3], ops.mean_iou(matrix)[1][:3])
    best = Evaluation({}, scores["iou"], matrix, None).best_constant()
    constant = torch.zeros(4, 4, dtype=torch.int64)
    constant[:, best[0]] = matrix.sum(1)
    assert best == (0, pytest.approx(100 * ops.mean_iou(constant)[0]))


def test_eval_refuses_binary_masks(voc, trained, fails):
    for file in (voc / "SegmentationClassAug").iterdir():
        Image.fromarray(np.where(np.array(Image.open(file)) > 1, 255, 0).astype(np.uint8)).save(file)
    words = "--ckpt", trained["train_base"] / "last.pt", "--data", voc, "--gpu", -1, "--workers", 0
    assert "only 0 and 255" in fails("eval", *words)


def test_scribbles_are_labels(voc, train, capsys):
    """Two lines of pixels an image, the rest 255: the loss is the mean over them, and a warning says what was found."""
    for file in (voc / "SegmentationClassAug").glob("train*"):
        label = np.array(Image.open(file))
        label[[n for n in range(len(label)) if n not in (40, 70)]] = 255
        Image.fromarray(label).save(file)
    _, seg, (image, target), _ = first_step(voc, "train_base")
    assert 0 < (target != 255).float().mean() < 0.1
    expected = F.cross_entropy(upsample(seg(image)), target.long(), ignore_index=255)
    assert log(train("train_base", "--iters", 1))[0]["loss_ce"] == pytest.approx(expected.item(), rel=1e-5)
    assert re.search("^warning: .*255.*scribbles", capsys.readouterr().out, re.M)


def test_an_evaluation_says_what_it_scores(train, voc, capsys):
    """The worst classes, a warning for a class that is never right after half of the steps, the constant prediction."""
    (voc / "classes.txt").write_text("grey\nred\ngreen\nblue\nblack\n")
    for file in (voc / "SegmentationClassAug").glob("val*"):
        label = np.array(Image.open(file))
        label[-1] = 4
        Image.fromarray(label).save(file)
    out = train("train_base", "--iters", 4, "--eval-every", 1)
    printed = capsys.readouterr().out
    assert "shows black" in printed  # before the first step
    assert printed.count("everywhere scores a mean IoU of") == 1
    before_scores = printed.split("\nlowest IoU: ")[:-1]
    assert ["warning: IoU is still 0" in text for text in before_scores] == [False, True, True, True]
    for row in log(out):
        ranked = sorted((iou, name) for name, iou in row["per_class"].items() if iou is not None)
        assert len(row["per_class"]) == 5 and ranked[0] == (0, "black")
        assert "lowest IoU: " + ", ".join(f"{name} {iou:.1f}" for iou, name in ranked) in printed
        assert row["miou"] == pytest.approx(np.mean([iou for iou, _ in ranked]))


def columns(out, names):
    return [[row[name] for name in names] for row in log(out)]


@QUICK
def test_a_loss_at_weight_0_gives_the_simpler_script(train, trained):
    """train_adv and train_match become train_base, train_semi (at threshold 1 too) becomes train_adv, to the bit."""
    base, adv, semi = (trained[script] for script in SCRIPTS[:3])  # semi uses its loss from step 1 there
    adv0 = train("train_adv", "--lam-adv", 0, "--eval-every", 9, out="train_adv")
    semi0, semi1 = (train("train_semi", *words, "--lam-adv-u", 0, "--eval-every", 9, out=f"semi{words[0]}")
                    for words in (("--lam-semi", 0), ("--threshold", 1)))
    match0, match = (train("train_match", "--confidence", 0, "--lam-u", weight, "--eval-every", 9, out=f"match{weight}")
                     for weight in (0, 2))
    for simpler, without, with_loss in ((base, adv0, adv), (adv, semi0, semi), (adv, semi1, semi),
                                        (base, match0, match)):
        names = LOSSES[simpler.name]
        assert columns(without, names) == columns(simpler, names) != columns(with_loss, names)
        assert is_equal(load(without)["opt_seg"], load(simpler)["opt_seg"])  # the momentum of every weight


@pytest.mark.parametrize("script, start", [("train_semi", "--semi-start"), ("train_match", "--u-start")])
def test_the_unlabelled_loss_starts_when_told(train, script, start):
    words = "--iters", 4, "--threshold" if script == "train_semi" else "--confidence", 0, "--eval-every", 9
    late, never = (columns(train(script, *words, start, n, out=f"start{n}"), ["loss_ce"]) for n in (2, 4))
    assert late[:3] == never[:3] and late[3] != never[3]


def first_step(voc, script, *words):
    """Return what a script has at its first step: flags, initial network, labelled and unlabelled batch."""
    args = importlib.import_module(script).flags().parse_args(["--data", str(voc), *SMALL, *map(str, words)])
    dataset = open_dataset(args.data)
    labelled, unlabelled, _ = dataset.split(args.split, args.split_seed)
    resolve_args(args, dataset, model.network_defaults)
    flags = {name: getattr(args, name) for name in ("seed", "batch_size", "iters", "crop", "scale", "input_scale")}
    flags |= {"workers": 0, "start": 0, "device": torch.device("cpu")}
    batch, batch_u = next(data.batches(labelled, "labelled", **flags)), next(
        data.batches(unlabelled, "unlabelled", **flags))
    torch.manual_seed(args.seed)
    seg = model.create_segmenter(dataset.classes, dataset.palette, args.backbone, args.init, args.stride, args.bn,
                                 args.norm, args.aspp_branches, args.input_scale)
    return args, seg, batch, batch_u


def upsample(logits):
    return F.interpolate(logits.double(), (65, 65), mode="bilinear", align_corners=True)


WORDS = "--iters", 1, "--scale", 0.4, 0.6, "--no-amp"  # a scale at which every crop has padding


@torch.no_grad()
def test_losses_of_train_semi_are_the_papers_over_valid_pixels(voc, train):
    """The first step again in plain PyTorch: void and padding are 0 in D's inputs and in no loss."""
    words = *WORDS, "--d-smooth", 0.25, "--d-unlabelled"
    _, seg, (image, target), (image_u, valid_u) = first_step(voc, "train_semi", *words)
    disc, valid = model.Discriminator(4), target != 255
    assert not valid.all() and not valid_u.all() and not torch.equal(valid, valid_u)
    logits, logits_u = upsample(seg(image)), upsample(seg(image_u))
    real = F.one_hot(target.clamp(max=4).long(), 5)[..., :4].permute(0, 3, 1, 2)
    d_fake, d_fake_u, d_real = (upsample(disc(x.float()))[:, 0] for x in (
        logits.softmax(1) * valid[:, None], logits_u.softmax(1) * valid_u[:, None], real))

    def bce(d_logits, real, mask):
        return F.binary_cross_entropy_with_logits(d_logits[mask], torch.full_like(d_logits[mask], real))
    confidence = d_fake_u.sigmoid()
    threshold = confidence[valid_u].median().item()
    selected = valid_u & (confidence > threshold)
    fake = (bce(d_fake, 0, valid) + bce(d_fake_u, 0, valid_u)) / 2
    expected = {"loss_ce": F.cross_entropy(logits, target.long(), ignore_index=255),
                "loss_adv": bce(d_fake, 1, valid), "loss_adv_u": bce(d_fake_u, 1, valid_u),
                "loss_d": (fake + bce(d_real, 0.75, valid)) / 2,
                "loss_semi": -logits_u.log_softmax(1).max(1).values[selected].mean(),
                "kept": selected.sum() / valid_u.sum()}
    with torch.enable_grad():
        row = log(train("train_semi", *words, "--threshold", threshold))[0]
    for name, value in expected.items():  # pixels at the threshold may be selected or not
        assert row[name] == pytest.approx(value.item(), rel=1e-3 if name in ("loss_semi", "kept") else 1e-5), name
    assert 0.4 < row["kept"] < 0.6


def test_the_student_of_train_match_learns_what_its_teacher_predicts(voc, train):
    """The first step again in plain PyTorch: labels of the weak view, mixed as the strong view is."""
    args, seg, _, (weak, valid) = first_step(voc, "train_match", *WORDS)
    initial = {name: value.clone() for name, value in seg.named_parameters()}
    with torch.no_grad(), seg.fixed_statistics():
        logits = seg(weak)
        confidence, classes = upsample(logits).softmax(1).max(1)
        confidence /= model.class_confidence(logits, valid)[classes]
        threshold = confidence[valid].median().item()
        pseudo = classes.masked_fill(~valid | (confidence <= threshold), 255)
        strong, pseudo, valid = data.cut_mix((data.strong_view(weak, 0, 1), pseudo, valid), args.cutmix, 0, 1)
        loss_u = F.cross_entropy(upsample(seg(strong)), pseudo, ignore_index=255, reduction="sum") / valid.sum()
    out = train("train_match", *WORDS, "--confidence", threshold, "--ema", 0.75)
    row, checkpoint = log(out)[0], load(out)
    assert row["loss_u"] == pytest.approx(loss_u.item(), rel=1e-3)
    assert row["kept"] == pytest.approx(((pseudo != 255).sum() / valid.sum()).item(), rel=1e-3) and 0 < row["kept"] < 1
    for name, value in initial.items():
        torch.testing.assert_close(checkpoint["seg"][name], 0.75 * value + 0.25 * checkpoint["student"][name])
    statistics = [name for name in checkpoint["seg"] if "running" in name]
    base = load(train("train_base", *WORDS, out="base"))["seg"]  # statistics are those of labelled images only
    assert all(torch.equal(checkpoint[part][name], base[name]) for name in statistics for part in ("seg", "student"))


@QUICK
@pytest.mark.parametrize("script", SCRIPTS)
def test_balanced_weights_are_in_the_loss_on_labels_only(voc, train, trained, script):
    """The first step in plain PyTorch, with the weights 1 / sqrt(frequency) of the labelled images."""
    pixels = np.zeros(256)
    for i in (trained[script] / "labelled.txt").read_text().split():
        pixels += np.bincount(np.asarray(Image.open(voc / f"SegmentationClassAug/{i}.png")).ravel(), minlength=256)
    weight = (pixels[:4] / pixels[:4].sum()) ** -0.5
    _, seg, (image, target), _ = first_step(voc, script)
    expected = F.cross_entropy(upsample(seg(image)), target.long(), torch.from_numpy(weight), ignore_index=255)
    row, before = log(train(script, "--class-weights", "balanced", "--iters", 1))[0], log(trained[script])[0]
    assert row["loss_ce"] == pytest.approx(expected.item(), rel=1e-5) != before["loss_ce"]
    names = LOSSES[script][1:]
    assert [row[name] for name in names] == [before[name] for name in names]


def test_killed_and_resumed_is_straight(train, capsys, fails, voc):
    """Killed after step 3 with a checkpoint of step 2: log and checkpoint end as those of a run without the kill."""
    words = "--iters", 4, "--eval-every", 9, "--save-every", 2
    straight = train("train_semi", *words, "--resume", out="straight")  # nothing there yet: from the start
    with pytest.raises(Killed), interrupt("step 3/", Killed):
        train("train_semi", *words, out="killed")
    killed = straight.parent / "killed"
    assert load(killed)["step"] == 2 and [row["step"] for row in log(killed)] == [1, 2, 3]
    with open(killed / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss')  # a line that was being written
    facts, minutes = json.loads((killed / "run.json").read_text()), load(killed)["minutes"]
    train("train_semi", *words, "--save-every", 3, "--resume", out="killed")
    assert (killed / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    assert is_equal(load(killed), load(straight), ignored=("out", "resume", "minutes", "save_every"))
    resumed_facts = json.loads((killed / "run.json").read_text())
    resumed, = resumed_facts.pop("resumed")
    assert resumed["step"] == 2 and resumed["changed"]["save_every"] == [2, 3] and facts.pop("resumed") == []
    assert resumed_facts == facts and load(killed)["minutes"] > minutes

    command = "--data", voc, *SMALL, *words, "--out", killed, "--resume"
    assert "--lr was 0.002" in fails("train_semi", *command, "--lr", 0.5)
    assert "--class-weights was none" in fails("train_semi", *command, "--class-weights", "balanced")
    assert "--iters 2" in fails("train_semi", *command, "--iters", 2, "--semi-start", 1)
    assert "disc" in fails("train_base", *command)
    before = {file.name: file.read_bytes() for file in killed.iterdir()}
    call("train_semi", *command)  # it had ended: it is scored again and nothing is written
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"mIoU {log(killed)[-1]['miou']:.2f}" and not any(line.startswith("step ") for line in lines)
    assert before == {file.name: file.read_bytes() for file in killed.iterdir()}


def test_a_bad_validation_file_costs_no_step(voc, train, tmp_path, fails):
    """The evaluation that finds it ends the run after a checkpoint; --resume makes up for the score."""
    label = voc / "SegmentationClassAug/val1.png"
    good = label.read_bytes()
    label.write_text("no image")
    words = "--data", voc, *SMALL, "--out", tmp_path / "out", "--eval-every", 2
    assert f"{label}: cannot be read" in fails("train_base", *words)
    checkpoint = load(tmp_path / "out")
    assert checkpoint["step"] == 2 and checkpoint["miou"] is None and not (tmp_path / "out/best.pt").exists()
    label.write_bytes(good)
    call("train_base", *words, "--resume")
    straight = train("train_base", "--eval-every", 2, out="straight")
    assert (tmp_path / "out/log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    assert load(tmp_path / "out", "best.pt")["miou"] == max(row["miou"] for row in log(straight) if "miou" in row)


# ---- files, warnings, defaults ----

def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def broken(f):
        f.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(console.InputError, match="a.txt: .*No space left"):
        console.write_atomically(target, broken)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@QUICK
@pytest.mark.parametrize("name, values, warned", [
    ("loss_d", [0.2] * 30, [10]), ("loss_d", [0.22] * 9 + [0.3] + [0.22] * 9, []), ("loss_d", [0.69] * 30, []),
    ("loss_d", [0.3] * 5 + [0.8] * 10 + [0.3] + [0.2] * 10, [15, 26]), ("kept", [0.02, 0.98] * 15, []),
    ("kept", [1] * 30, [30])])
def test_warnings_of_an_unhealthy_scalar(name, values, warned):
    """Once, at the tenth row in a row; rows alone decide, so that a resumed run warns too. kept: after its start."""
    # under smoothing 0.1 the loss of a discriminator that always wins is 0.163
    healthy = {"loss_d": model.healthy_loss_d(0.1), "kept": HealthyRange(0.01, 0.99, "raise it", "lower it", 20)}
    rows = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    warnings = [(n, line) for n in range(1, len(rows) + 1) for line in range_warnings(rows[:n], healthy)]
    assert [n for n, _ in warnings] == warned and all(name in line for _, line in warnings)


def test_no_checkpoint_of_a_run_that_diverged(train, tmp_path):
    """At steps that are not logged too: --resume would continue from it."""
    with pytest.raises(console.InputError, match="at step 2"):
        train("train_base", "--lr", 1e30, "--iters", 6, "--log-every", 6, "--eval-every", 6, "--save-every", 2)
    assert not (tmp_path / "out/last.pt").exists()


def test_an_earlier_run_is_not_lost(train, tmp_path, capsys):
    first = (train("train_base", "--seed", 1, "--iters", 1) / "log.jsonl").read_text()
    train("train_base", "--seed", 2, "--iters", 1)
    assert (tmp_path / "out/earlier-1/log.jsonl").read_text() == first and "earlier-1" in capsys.readouterr().out
    assert (tmp_path / "out/earlier-1/last.pt").exists() and (tmp_path / "out/log.jsonl").read_text() != first


@QUICK
@pytest.mark.parametrize("size, crop, scale", [((250, 170), 161, 1), ((90, 80), 81, 1), ((500, 375), 161, 0.5),
                                               ((480, 200), 97, 0.5), ((1600, 1200), 161, 0.25), ((40, 30), 65, 1)])
def test_defaults_of_an_own_folder(tmp_path, monkeypatch, size, crop, scale):
    """Without CUDA small ones, named in the first line unless a flag is given; with CUDA the paper's."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for n in range(5):
        for folder, mode in (("images", "RGB"), ("labels", "L")):
            Image.new(mode, size if n % 2 else size[::-1]).save(tmp_path / folder / f"{n}.png")

    def resolve(*words, cuda=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        args, dataset = train_semi.flags().parse_args(words), open_dataset(str(tmp_path))
        resolve_args(args, dataset, model.network_defaults, {"lam_semi": 0.1}, {"lam_semi": 0.5})
        values = [args.backbone, args.crop, args.input_scale, args.iters, args.class_weights, args.lam_semi]
        return values, dataset.note
    found, note = resolve()
    assert found == ["efficientnet_lite0", crop, scale, 1000, "balanced", 0.5] and f"--crop {crop}" in note
    found, note = resolve("--backbone", "vit_small_patch14_dinov2", "--init", "none")
    assert abs(found[1] - crop) < 14 and found[1] % 14 == 1 and f"--crop {found[1]}" in note
    if size == (40, 30):
        with pytest.raises(console.InputError, match="side of 30 pixels.*--stride 32"):
            resolve("--backbone", "resnet18", "--stride", "32")
    found, note = resolve("--crop", "97", "--iters", "7", "--backbone", "resnet18")
    assert found == ["resnet18", 97, scale, 7, "balanced", 0.5] and "--crop" not in note and "--backbone" not in note
    assert resolve("@recipes/paper_voc_semi.txt")[0] == ["resnet101", 321, scale, 20000, "none", 0.1]
    found, note = resolve(cuda=True)
    assert found == ["resnet101", 321, 1, 20000, "none", 0.1] and "small" not in note


@pytest.mark.parametrize("script, flags, named", [
    ("train_base", "--data nowhere", "--data nowhere"), ("train_base", "--split nan", "--split nan"),
    ("train_base", "--split 0.01", "--split 0.01"), ("train_base", "--labelled-ids nowhere.txt", "nowhere.txt"),
    ("train_base", "--crop 49", "nearest is 65"), ("train_base", "--crop 75", "nearest is 81"),
    ("train_base", "--backbone resnet18 --stride 12", "default, 8"),
    ("train_base", "--backbone resnet18x", "--backbone resnet18x"), ("train_base", "--backbone hrnet_w18", "any size"),
    ("train_base", "--backbone vit_small_patch14_dinov2 --crop 97", "nearest is 99"),
    ("train_base", "--backbone vit_small_patch14_dinov2 --stride 16", "default, 14"),
    ("train_base", "--init coco", "--init coco"),
    ("train_base", "--init none --bn frozen", "--bn frozen"),
    ("train_base", "--init nowhere.pt", "--init nowhere.pt"), ("train_base", "--scale 2 1", "--scale 2 1"),
    ("train_base", "--lr nan", "--lr"), ("train_base", "--batch-size 0", "--batch"),
    ("train_semi", "--split 1", "--unlabelled"), ("train_semi", "--unlabelled nowhere", "--unlabelled nowhere"),
    ("train_semi", "--d-smooth 1", "--d-smooth"), ("train_base", "--out file/out", "file/out"),
    ("train_base", "--out=", "--out")])
def test_wrong_flags_are_named_and_nothing_is_written(blocks, tmp_path, monkeypatch, fails, script, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert named in fails(script, "--data", blocks, *SMALL, "--out", "out", *flags.split())
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@QUICK
@pytest.mark.parametrize("script, advice, error", [
    ("train_semi", "lower --batch-size or --crop", torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")),
    ("predict", "lower --window", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    ("eval", "lower --window", None)])
def test_out_of_memory_names_the_flag_to_lower(trained, blocks, monkeypatch, tmp_path, fails, script, advice, error):
    def forward(*_):
        raise error or torch.empty(1 << 50)  # more memory than the CPU has
    words = {"train_semi": ["--data", blocks, *SMALL], "predict": [blocks / "JPEGImages"], "eval": ["--workers", 0]}
    ckpt = [] if script == "train_semi" else ["--ckpt", trained["train_base"] / "last.pt"]
    monkeypatch.setattr(model.DeepLabV2, "forward", forward)
    said = fails(script, *words[script], *ckpt, "--gpu", -1, "--out", tmp_path / "out")
    assert said.startswith(f"{script}: out of memory") and said.endswith(f"; {advice}\n")


def test_a_worker_finds_a_bad_image(voc, tmp_path):
    path = voc / "JPEGImages/train1.png"
    path.write_bytes(path.read_bytes()[:-60])
    done = python("train_base.py", "--data", voc, *SMALL, "--workers", 2, "--split", 1, "--iters", 9, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(path) in done.stderr, done.stderr


def test_own_data_in_colour_and_unlabelled_images_of_any_size(tmp_path, capsys):
    """Two folders and classes.txt without lists: names, colours and number of classes come from there."""
    rng = np.random.RandomState(0)
    colours = np.array([(10, 20, 30), (200, 100, 0), (0, 0, 0)], np.uint8)  # the last is void
    own, more = tmp_path / "own", tmp_path / "more/deep/er"
    for folder in (own / "images", own / "labels", own / "unlabelled", more):
        folder.mkdir(parents=True)
    (own / "classes.txt").write_text("road 10 20 30\nold car 200 100 0\nvoid 0 0 0\n")
    for n in range(10):
        label = rng.randint(0, 3, (5, 6)).repeat(16, 0).repeat(16, 1)
        Image.fromarray(rng.randint(0, 255, (80, 96, 3), np.uint8)).save(own / f"images/{n}.jpg")
        Image.fromarray(colours[label]).save(own / f"labels/{n}.png")
    for n, size in enumerate([(30, 20), (300, 100), (64, 200)]):
        Image.fromarray(rng.randint(0, 255, (*size, 3), np.uint8)).save(more.parents[n % 2] / f"x{n}.jpg")
    out, folder = tmp_path / "out", more.parents[1]
    call("train_semi", "--data", own, *SMALL, "--split=1", "--unlabelled", folder, "--workers=2", "--out", out)
    first = capsys.readouterr().out.splitlines()[0]
    assert "8 labelled images, 2 classes" in first
    assert f"3 unlabelled images in {folder}" in first and str(own / "unlabelled") not in first
    assert load(out)["classes"] == ["road", "old car"]
    call("predict", "--ckpt", out / "last.pt", "--gpu", -1, "--out", tmp_path / "found", own / "images/3.jpg")
    shown = {c for _, c in Image.open(tmp_path / "found/3.png").convert("RGB").getcolors()}
    assert shown and shown <= {(10, 20, 30), (200, 100, 0)}
