import argparse

import pytest

import cli
import common

QUICK = pytest.mark.quick


def test_replace_is_whole_or_nothing(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def broken(f):
        f.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(cli.InputError, match="a.txt: cannot be written .No space left"):
        cli.replace(target, broken)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@QUICK
@pytest.mark.parametrize("name,values,warns", [
    ("loss_d", [0.03] * 10, [10]), ("loss_d", [0.03] * 30, [10]), ("loss_d", [0.03] * 9 + [0.3] + [0.03] * 9, []),
    ("loss_d", [0.72] * 10, [10]), ("loss_d", [0.69] * 30, []), ("kept", [0] * 10, [10]), ("kept", [1] * 10, [10]),
    ("kept", [0.02, 0.98] * 10, []), ("loss_d", [0.3] * 5 + [0.03] * 10 + [0.3] + [0.03] * 10, [15, 26]),
])
def test_warns_of_a_starved_run(name, values, warns):
    """Once, at the tenth logged step in a row; the rows alone decide, so that a resumed run warns too."""
    rows = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    found = [n for n in range(1, len(rows) + 1) for line in common.warnings(rows[:n], argparse.Namespace())]
    assert found == warns
    assert not warns or f"warning: {name} was outside" in next(common.warnings(rows[:warns[0]], argparse.Namespace()))


def test_warnings_know_smoothing_and_the_start():
    # 0.163 is what a D that always wins keeps under smoothing 0.1
    args = argparse.Namespace(d_smooth=0.1, semi_start=20)
    rows = [{"step": n, "loss_d": 0.2, "kept": 1} for n in range(1, 31)]
    lines = [(n, line.split()[1]) for n in range(1, 31) for line in common.warnings(rows[:n], args)]
    assert lines == [(10, "loss_d"), (30, "kept")]


def test_no_checkpoint_of_a_run_that_diverged(train, tmp_path):
    """Between log lines too: --resume would go on from it."""
    with pytest.raises(cli.InputError, match="at step 2: the run diverged; lower --lr"):
        train("train_base", "--lr", 1e30, "--iters", 6, "--log-every", 6, "--eval-every", 6, "--save-every", 2)
    assert not (tmp_path / "out/last.pt").exists()


def test_an_earlier_run_is_not_lost(train, tmp_path, capsys):
    first = (train("train_base", "--seed", 1, "--iters", 1) / "log.jsonl").read_text()
    train("train_base", "--seed", 2, "--iters", 1)
    assert (tmp_path / "out/earlier-1/log.jsonl").read_text() == first and "earlier-1" in capsys.readouterr().out
    assert (tmp_path / "out/earlier-1/last.pt").exists() and (tmp_path / "out/log.jsonl").read_text() != first


@QUICK
def test_flags_are_settled_once(train, monkeypatch):
    """Nothing writes to args after common.settle: what run.json has is what every later line saw."""
    settle = common.settle

    def frozen(args, dataset, labelled):
        settle(args, dataset, labelled)
        args.__class__ = type("Settled", (argparse.Namespace,), {"__setattr__": lambda *_: pytest.fail("written to")})
    monkeypatch.setattr(common, "settle", frozen)
    train("train_semi", "--iters", 1)
