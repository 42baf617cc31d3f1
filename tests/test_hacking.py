"""What users change: a copy of a script with its own network, loss, flag and log column; another selection rule; more
scores. No other file changes."""
import importlib
import re
import signal
import sys

from common.layouts import open_dataset

import pytest
import torch
from conftest import ROOT, SMALL, call, interrupt, is_equal, load, log

import model
from eval import evaluate

PROTO = [  # (text of train_base.py, its replacement), for a second network
    ("import data\n", "import torch\n\nimport data\n"),
    ("    return shared_flags(__doc__, out=\"out/base\")\n", """\
    p = shared_flags(__doc__, out="out/proto")
    p.add_argument("--proto-start", type=int, help="steps before the loss on prototypes (default --iters / 4)")
    return p
"""),
    ("    run = Run(__file__, args, dataset, labelled, ops.describe)\n", """\
    args.proto_start = args.iters // 4 if args.proto_start is None else args.proto_start
    run = Run(__file__, args, dataset, labelled, ops.describe, {"loss_proto": HealthyRange(0, 1e-9, "raise", "lower")})
"""),
    ("from common.run import Run\n", "from common.run import HealthyRange, Run\n"),
    ("    run.resume(seg=seg_raw, opt_seg=opt_seg)\n", """\
    proto = torch.nn.Conv2d(len(dataset.classes), 8, 1).to(run.device)
    opt_proto = torch.optim.Adam(proto.parameters(), 1e-3)
    run.resume(seg=seg_raw, opt_seg=opt_seg, proto=proto, opt_proto=opt_proto)
"""),
    ("        loss_ce = model.cross_entropy(logits, target, weight)\n", """\
        loss_ce = model.cross_entropy(logits, target, weight)
        loss_proto = proto(torch.nn.functional.dropout(logits.float())).square().mean()
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


def test_a_script_with_its_own_network(voc, train, tmp_path, monkeypatch, fails, capsys):
    """It stops and resumes to the bit, dropout included, warns, is scored, and report.py draws its column."""
    copy_script("train_base", "train_proto", PROTO, tmp_path, monkeypatch)
    words = "--iters", 12, "--eval-every", 100
    straight = train("train_proto", *words, out="straight")
    assert "warning: loss_proto" in capsys.readouterr().out
    with pytest.raises(SystemExit), interrupt("step 5/", signal.SIGTERM):
        train("train_proto", *words, out="stopped")
    stopped = tmp_path / "stopped"
    assert load(stopped)["step"] == 5
    error = fails("train_base", "--data", voc, *SMALL, *words, "--out", stopped, "--resume")
    assert "proto" in error and "opt_proto" in error
    train("train_proto", *words, "--resume", out="stopped")
    assert (stopped / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    checkpoint = load(straight)
    assert is_equal(load(stopped), checkpoint, ignored=("out", "resume", "minutes"))
    assert checkpoint["args"]["proto_start"] == 3 and {"loss_proto", "miou"} <= log(straight)[-1].keys()
    call("report", straight, "--out", tmp_path / "page.html", "--gpu", -1, "--workers", 0)
    assert "loss_proto" in (tmp_path / "page.html").read_text()


def test_another_selection_rule(train, tmp_path, monkeypatch):
    """One function: the training follows it, and so does what report.py shows."""
    rule = "    return ops.select_labels(classes, d_logits, valid=valid, threshold=threshold)\n"
    changed = "    return classes.masked_fill((classes != 1) | ~valid, 255)\n"
    copy_script("train_semi", "train_rule", [(rule, changed)], tmp_path, monkeypatch)
    words = "--iters", 1, "--threshold", 1
    assert log(train("train_semi", *words))[0]["kept"] == 0
    parts, logits = load(train("train_rule", *words)), torch.zeros(1, 4, 5, 5)
    assert log(tmp_path / "out")[0]["kept"] > 0
    logits[:, 1, :2] = 1
    valid = torch.ones(1, 65, 65, dtype=torch.bool)
    for script, shown in (("train_semi", {255}), ("train_rule", {1, 255})):
        maps = importlib.import_module(script).report_images(parts, None, logits, valid)
        assert set(maps["pseudo-labels"].unique().tolist()) == shown
        assert maps["discriminator's confidence"].shape == (65, 65)


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False])
def test_more_scores(trained, voc, training):
    """Numerators and denominators are summed over all samples; the network is left in the mode in which it was."""
    seg, dataset = model.load_segmenter(trained["train_base"] / "last.pt"), open_dataset(str(voc))
    seg.train(training)
    count = 0

    def fraction(logits, target):
        nonlocal count
        count += 1
        assert not seg.training and logits.shape[1] == 4 and target.dtype == torch.uint8
        return torch.tensor(count), torch.tensor(10)
    result = evaluate(seg, dataset.samples(dataset.train_ids()), 0, extra={"fraction": fraction})
    assert count == 8 and result.scores["fraction"] == pytest.approx(100 * 36 / 80) and "miou" in result.scores
    assert all(module.training == training for module in seg.modules())


@pytest.mark.quick
def test_shared_code_imports_nothing_above_it():
    above = {file.stem for file in ROOT.glob("*.py")}
    for file in [*ROOT.glob("common/*.py"), *ROOT.glob("csrc/*.py")]:
        imported = set(re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.M))
        assert not imported & above and not (file.parent.name == "common" and "csrc" in imported), file
