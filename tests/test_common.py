import argparse
import json

import pytest
import torch
from conftest import log

import cli
import common
from csrc import ops


def test_poly_lr():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 10.0}])
    rates = []
    for done in range(4):
        common.poly_lr(optimizer, done, argparse.Namespace(iters=4, decay_every=1))
        rates.append([g["lr"] for g in optimizer.param_groups])
    want = [(1 - d / 4) ** 0.9 for d in range(4)]
    assert [r[0] for r in rates] == pytest.approx(want) and [r[1] for r in rates] == pytest.approx([10 * w for w in want])


def test_flags_from_a_file(tmp_path):
    (tmp_path / "r.txt").write_text("# a comment\n--lr 0.5  # another\n\n--steps\n3\n")
    p = cli.Parser("")
    p.add_argument("--lr", type=float)
    p.add_argument("--steps", type=int)
    assert vars(p.parse_args([f"@{tmp_path}/r.txt", "--steps", "4"])) == {"lr": 0.5, "steps": 4}
    with pytest.raises(cli.InputError, match="nowhere.txt"):
        p.parse_args(["@nowhere.txt"])


def test_replace_is_whole_or_nothing(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def broken(f):
        f.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(cli.InputError, match="a.txt: cannot be written .No space left"):
        cli.replace(target, broken)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name,values,warns", [
    ("loss_d", [0.03] * 10, True), ("loss_d", [0.03] * 9 + [0.3] + [0.03] * 9, False), ("loss_d", [0.72] * 10, True),
    ("loss_d", [0.69] * 30, False), ("kept", [0] * 10, True), ("kept", [1] * 10, True), ("kept", [0.02, 0.98] * 10, False),
])
def test_warns_of_a_starved_run(tmp_path, capsys, name, values, warns):
    run = common.Run.__new__(common.Run)
    run.args = argparse.Namespace(iters=99, log_every=1, eval_every=50)
    run.out, run.rows, run.unhealthy, run.written = tmp_path, [], dict.fromkeys(common.HEALTHY, 0), True
    run.first, run.figures, run.ending = True, {}, None
    for step, value in zip(run.steps(0), values):
        for part in (0.25, 0.75):  # a batch in two pieces
            run.add(**{name: part * torch.tensor(value, dtype=torch.float64)})
        run.report(step, lr=0.1)
    assert (f"warning: {name} was outside" in capsys.readouterr().out) == warns
    assert [r[name] for r in log(tmp_path)] == pytest.approx(values)


def test_warnings_know_smoothing_and_the_start(tmp_path, capsys):
    run = common.Run.__new__(common.Run)
    run.args, run.unhealthy = argparse.Namespace(d_smooth=0.1, semi_start=20), dict.fromkeys(common.HEALTHY, 0)
    for step in range(1, 31):  # 0.163 is what a D that always wins keeps under smoothing 0.1
        run.warn({"step": step, "loss_d": 0.2, "kept": 1})
        assert ("warning: kept" in capsys.readouterr().out) == (step == 30)
    assert run.unhealthy["loss_d"] == 30


def test_divergence_stops_with_a_cure(train):
    with pytest.raises(cli.InputError, match="at step 2: the run diverged; lower --lr"):
        train("train_base", "--lr", 1e30, "--iters", 6)


def test_an_earlier_run_is_not_lost(train, tmp_path, capsys):
    first = (train("train_base", "--seed", 1) / "log.jsonl").read_text()
    train("train_base", "--seed", 2)
    assert (tmp_path / "out/earlier-1/log.jsonl").read_text() == first and "earlier-1" in capsys.readouterr().out
    assert (tmp_path / "out/earlier-1/last.pt").exists()
    assert (tmp_path / "out/log.jsonl").read_text() != first


def test_run_json(train):
    facts = json.loads((train("train_semi", "--seed", 3) / "run.json").read_text())
    assert facts["args"]["seed"] == 3 and facts["args"]["semi_start"] == 0 and facts["ops"] == ops.in_use()
    assert {"commit", "torch", "python", "device", "data"} <= set(facts)


