"""What a user does to the scripts: a copy with a network, a loss, a flag and a log column of its own; other selection
rules; more scores. No other file is changed."""
import importlib
import json
import os
import signal
import sys

import pytest
import torch
from conftest import ROOT, SMALL, call, log

import model
from common.layouts import open_dataset
from eval import evaluate

PROTO = [  # (text of train_base.py, what a second network needs instead)
    ("import data\n", "import torch\n\nimport data\n"),
    ("    return shared_flags(__doc__, out=\"out/base\")\n", """\
    p = shared_flags(__doc__, out="out/proto")
    p.add_argument("--proto-start", type=int, help="steps before the loss on prototypes (default --iters / 4)")
    return p
"""),
    ("    run = Run(__file__, args, dataset, labelled, ops.describe)\n", """\
    args.proto_start = args.iters // 4 if args.proto_start is None else args.proto_start
    run = Run(__file__, args, dataset, labelled, ops.describe, {"loss_proto": HealthyRange(0, 1e-9, "lower it")})
"""),
    ("from common.run import Run\n", "from common.run import HealthyRange, Run\n"),
    ("    run.resume(seg=seg_raw, opt_seg=opt_seg)\n", """\
    proto = torch.nn.Conv2d(len(dataset.classes), 8, 1).to(run.device)
    opt_proto = torch.optim.Adam(proto.parameters(), 1e-3)
    run.resume(seg=seg_raw, opt_seg=opt_seg, proto=proto, opt_proto=opt_proto)
"""),
    ("        loss_ce = model.cross_entropy(logits, target)\n", """\
        loss_ce = model.cross_entropy(logits, target)
        loss_proto = proto(logits.float()).square().mean()
"""),
    ("        opt_seg.zero_grad()\n        loss_ce.backward()\n        opt_seg.step()\n", """\
        opt_seg.zero_grad()
        opt_proto.zero_grad()
        (loss_ce + (loss_proto if step > args.proto_start else 0)).backward()
        opt_seg.step()
        opt_proto.step()
"""),
    ("loss_ce=loss_ce, lr=", "loss_ce=loss_ce, loss_proto=loss_proto, lr=")]


def copy_script(source, name, changes, folder, monkeypatch):
    """Write a changed copy of a script to `folder` and make it importable."""
    text = (ROOT / f"{source}.py").read_text()
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def read(out):
    return torch.load(out / "last.pt", weights_only=True)


def is_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(is_equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_a_script_with_a_network_of_its_own(voc, train, tmp_path, monkeypatch, fails, capsys):
    """It stops and resumes to the bit, warns, is scored and has its column on the page of report.py."""
    copy_script("train_base", "train_proto", PROTO, tmp_path, monkeypatch)
    words = "--iters", 12, "--eval-every", 100
    straight = train("train_proto", *words, out="straight")
    assert "warning: loss_proto" in capsys.readouterr().out
    poly_lr = model.poly_lr
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(model, "poly_lr", lambda step, *more: poly_lr(step, *more) or step == 5 and os.kill(
            os.getpid(), signal.SIGTERM))
        train("train_proto", *words, out="stopped")
    stopped = tmp_path / "stopped"
    assert read(stopped)["step"] == 5
    error = fails("train_base", "--data", voc, *SMALL, *words, "--out", stopped, "--resume")
    assert "proto" in error and "opt_proto" in error
    train("train_proto", *words, "--resume", out="stopped")
    assert (stopped / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    one, two = read(straight), read(stopped)
    assert all(is_equal(one[part], two[part]) for part in ("seg", "opt_seg", "proto", "opt_proto"))
    assert one["args"]["proto_start"] == 3 and {"loss_proto", "miou"} <= log(straight)[-1].keys()
    call("report", straight, "--out", tmp_path / "page.html", "--gpu", -1, "--workers", 0)
    assert "loss_proto" in (tmp_path / "page.html").read_text()


def test_another_selection_rule(voc, train, tmp_path, monkeypatch):
    """One function: the loop follows it, and so does what report.py shows."""
    rule = "    return ops.select_labels(classes, d_logits, valid=valid, threshold=threshold)\n"
    copy_script("train_semi", "train_rule", [(rule, "    return classes.masked_fill(classes != 1, 255)\n")], tmp_path,
                monkeypatch)
    words = "--iters", 1, "--threshold", 1
    none, ones = log(train("train_semi", *words, out="none")), log(out := train("train_rule", *words, out="ones"))
    assert none[0]["kept"] == 0 < ones[0]["kept"]
    logits = torch.zeros(1, 4, 5, 5)
    logits[:, 1, :2] = 1
    valid = torch.ones(1, 65, 65, dtype=torch.bool)
    for script, shown in (("train_semi", {255}), ("train_rule", {1, 255})):
        maps = importlib.import_module(script).report_images(read(out), None, logits, valid)
        assert set(maps["pseudo-labels"].unique().tolist()) == shown
        confidence = maps["discriminator's confidence"]
        assert confidence.shape == (65, 65) and 0 <= confidence.min() <= confidence.max() <= 1


@pytest.mark.quick
def test_more_scores(trained, voc):
    """Numerators and denominators are summed over all samples."""
    seg, dataset = model.load_segmenter(trained["train_base"] / "last.pt"), open_dataset(str(voc))
    calls = []

    def share(logits, target):
        calls.append(target)
        return torch.tensor(len(calls)), torch.tensor(10)
    result = evaluate(seg, dataset.samples(dataset.train_ids()), 0, extra={"share": share})
    assert len(calls) == 8 and result.scores["share"] == pytest.approx(100 * 36 / 80) and "miou" in result.scores


def test_what_a_resumed_run_records(train):
    out = train("train_base", "--iters", 2)
    before = json.loads((out / "run.json").read_text())
    minutes = read(out)["minutes"]
    train("train_base", "--iters", 3, "--resume")
    facts = json.loads((out / "run.json").read_text())
    resumed, = facts.pop("resumed")
    assert resumed["step"] == 2 and resumed["changed"]["iters"] == [2, 3] and before.pop("resumed") == []
    assert facts == before and read(out)["minutes"] > minutes


def test_older_checkpoints(train, tmp_path, voc, fails, capsys):
    """Of 2d4c1d6: parts that a script lacked were None, and flags that are gone are among `args`."""
    out = train("train_base")
    old = read(out) | {"disc": None, "opt_disc": None}
    old["args"] |= {"d_input": "soft", "recipes": None}
    del old["minutes"]
    words = "--data", voc, *SMALL, "--out", out, "--resume", "--iters", 4
    torch.save(old, out / "last.pt")
    call("eval", "--ckpt", out / "last.pt", "--gpu", -1, "--workers", 0)
    assert "mIoU" in capsys.readouterr().out
    call("predict", "--ckpt", out / "last.pt", "--gpu", -1, voc / "JPEGImages/val0.png", "--out", tmp_path / "p")
    train("train_base", "--init", out / "last.pt", "--iters", 1, out="again")
    assert "--d-input" in fails("train_base", *words)
    old["args"]["d_input"] = None
    torch.save(old | {"disc": {"x": torch.zeros(1)}}, out / "last.pt")
    assert "disc" in fails("train_base", *words)
