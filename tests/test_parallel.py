"""Several processes, gradient accumulation, torch.compile; signals to stop, and going on."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, log, python

import cli
import common
import data
import eval
import model
import parallel
from csrc import ops

EXACT = "--bn frozen --no-amp --iters 10 --batch-size 4 --semi-start 3 --eval-every 100".split()
SLOW = pytest.mark.slow
# what train_semi.py does in a step the others do too
EACH = [script if script == "train_semi" else pytest.param(script, marks=SLOW) for script in SCRIPTS]


def several(processes):
    """The start of torchrun's command."""
    port = 29500 + os.getpid() % 2000
    return list(map(str, ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]))


def torchrun(processes, *words):
    done = python(*several(processes), *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("pieces", [2, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("script", EACH)
def test_two_processes_are_one(voc, train, tmp_path, script, pieces):
    """Half the batch each, and pictures with different numbers of void pixels: the same losses."""
    words = [w for w in EXACT if script == "train_semi" or w not in ("--semi-start", "3")] + ["--accumulate", pieces]
    words += ["--d-unlabelled", "--upsample", "learned"] if (script, pieces) == ("train_semi", 2) else []
    said = torchrun(2, ROOT / f"{script}.py", "--data", voc, *SMALL, *words, "--out", tmp_path / "two")
    assert "2 processes" in said and said.count("mIoU") == 1
    alone = log(train(script, *words, out="one"))
    both = log(tmp_path / "two")
    assert len(both) == 10 and len({row["loss_ce"] for row in both}) == 10
    for one, two in zip(alone, both, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"miou"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5 if name == "loss_ce" else 1e-4), (name, one, two)


def test_processes_share_an_evaluation(voc, train, tmp_path):
    """Seven pictures, two and three processes: every one counts once, to the last bit."""
    (voc / "seven.txt").write_text("\n".join(f"train{n}" for n in range(7)))
    words = ["--ckpt", train("train_base") / "last.pt", "--gpu", -1, "--list", voc / "seven.txt", "--workers", 1]
    found = {}
    for n in (1, 2, 3):
        here = list(map(str, [*words, "--json", tmp_path / f"{n}.json", "--out", tmp_path / f"{n}"]))
        if n == 1:
            eval.main(eval.flags().parse_args(here))
        else:
            assert torchrun(n, ROOT / "eval.py", *here).count("mIoU") == 1
        found[n] = json.loads((tmp_path / f"{n}.json").read_text())
        assert len(list((tmp_path / f"{n}").glob("*.png"))) == 7
        for i in range(7):
            assert (tmp_path / f"{n}/train{i}.png").read_bytes() == (tmp_path / f"1/train{i}.png").read_bytes()
    assert found[1] == found[2] == found[3] and found[1]["miou"] > 0
    torchrun(2, ROOT / "eval.py", "--ckpt", words[1], "--gpu", -1, "--out", tmp_path / "images", "--images",
             *(voc / f"JPEGImages/train{i}.png" for i in range(3)))
    for i in range(3):
        assert (tmp_path / f"images/train{i}.png").read_bytes() == (tmp_path / f"1/train{i}.png").read_bytes()


@SLOW
def test_statistics_are_level_where_they_are_scored(voc, train, tmp_path, capsys):
    """Batch norm that trains sees other pictures in each process; what is scored and what is saved are one net."""
    torchrun(2, ROOT / "train_base.py", "--data", voc, *SMALL, "--accumulate", 1, "--iters", 3, "--out", tmp_path / "two")
    capsys.readouterr()
    eval.main(eval.flags().parse_args(["--ckpt", str(tmp_path / "two/last.pt"), "--gpu", "-1"]))
    assert capsys.readouterr().out.splitlines()[-1] == f"mIoU {log(tmp_path / 'two')[-1]['miou']:.2f}"


def test_a_signal_during_the_sum_waits_for_the_next(monkeypatch):
    """All processes have to take the same answer, the sum's."""
    signals = parallel.Signals()
    monkeypatch.setattr(parallel, "WORLD", 2)

    def late(x):
        os.kill(os.getpid(), signal.SIGTERM)
        return x
    monkeypatch.setattr(parallel, "total", late)
    assert signals.heard() is None and signals.heard() == "SIGTERM"


def test_a_signal_breaks_an_evaluation_off_once():
    """Also one that came before it; another kind of signal finds the training saving, and is let be."""
    signals = parallel.Signals()
    with pytest.raises(parallel.Stopped):
        try:
            with signals.breaking_off():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(parallel.Stopped), signals.breaking_off():
        pytest.fail("it began")


def test_processes_start_from_one_step(monkeypatch):
    monkeypatch.setattr(parallel, "WORLD", 2)
    monkeypatch.setattr(parallel, "total", lambda x: x.add_(torch.tensor([0, 7])))
    assert parallel.same_start(7) == 7
    with pytest.raises(cli.InputError, match=r"checkpoints of steps \[0, 7\]"):
        parallel.same_start(0)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("out", "resume"))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize("script", EACH)
def test_stopped_and_resumed_is_straight(train, tmp_path, monkeypatch, capsys, script):
    """20 steps, against 20 with SIGTERM in the tenth: the same log and, to the bit, the same checkpoint."""
    words = "--iters", 20, "--workers", 1, "--eval-every", 8, "--save-every", 7
    straight = train(script, *words, out="straight")
    add = common.Run.add

    def add_and_signal(run, **values):
        add(run, **values)
        run.count = getattr(run, "count", 0) + 1
        if run.count == 10:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(common.Run, "add", add_and_signal)
        train(script, *words, out="stopped")
    assert not stop.value.code and "stopped by SIGTERM after step 10" in capsys.readouterr().out
    assert torch.load(tmp_path / "stopped/last.pt", weights_only=True)["step"] == 10
    assert log(tmp_path / "stopped")[-1]["step"] == 10
    resumed = train(script, *words, "--resume", out="stopped")
    assert (resumed / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    for name in ("last.pt", "best.pt"):
        assert same(*(torch.load(out / name, weights_only=True) for out in (straight, resumed))), name


def test_stopped_in_an_evaluation(train, tmp_path, monkeypatch, capsys):
    """It is broken off, the step before it is saved, and --resume makes up for it."""
    words = "--iters", 6, "--eval-every", 3, "--save-every", 100
    straight = train("train_semi", *words, out="straight")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(data, "pad", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        train("train_semi", *words, out="stopped")
    assert not stop.value.code and "stopped by SIGINT after step 3" in capsys.readouterr().out
    assert "miou" not in log(tmp_path / "stopped")[-1]
    resumed = train("train_semi", *words, "--resume", out="stopped")
    assert (resumed / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()


def slowly(script, seconds):
    """The code of a script whose loaders take so long for a picture."""
    return (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import cli, data, {script}; read = data.read_scaled; "
            f"data.read_scaled = lambda *a: (time.sleep({seconds}), read(*a))[1]; cli.launch({script}.main, {script}.flags)")


def test_workers_leave_the_signal_to_the_script(voc, tmp_path):
    """SIGTERM to the whole group of processes while the workers load, as a scheduler sends it."""
    words = map(str, ["--data", voc, *SMALL, "--iters", 500, "--workers", 2, "--out", tmp_path / "out"])
    run = subprocess.Popen([sys.executable, "-c", slowly("train_base", 0.2), *words], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (tmp_path / "out/log.jsonl").exists():
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    said, error = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped by SIGTERM after step" in said and not error, error
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == log(tmp_path / "out")[-1]["step"]


@SLOW
def test_several_processes_stop_and_go_on(voc, tmp_path):
    """SIGTERM to torchrun and its processes, then --resume: the log of a straight run."""
    slow = tmp_path / "slow.py"
    slow.write_text(slowly("train_semi", 0.1))
    words = list(map(str, ["--data", voc, *SMALL, "--iters", 30, "--eval-every", 100, "--workers", 1]))
    run = subprocess.Popen([sys.executable, *several(2), slow, *words, "--out", tmp_path / "stopped"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    file, until = tmp_path / "stopped/log.jsonl", time.monotonic() + 120
    while time.monotonic() < until and not (file.exists() and file.read_text().count("\n") > 3):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    said, error = run.communicate(timeout=60)
    step = log(tmp_path / "stopped")[-1]["step"]
    assert f"after step {step}, which is in" in said and 3 < step < 30, error
    assert torch.load(tmp_path / "stopped/last.pt", weights_only=True)["step"] == step
    torchrun(2, ROOT / "train_semi.py", *words, "--out", tmp_path / "stopped", "--resume")
    torchrun(2, ROOT / "train_semi.py", *words, "--out", tmp_path / "straight")
    assert file.read_text() == (tmp_path / "straight/log.jsonl").read_text()


def test_pieces_of_a_batch_are_a_batch(train):
    """Frozen batch norm: gradients add up to those of the whole batch but for what the pieces' own means weigh."""
    words = [w for w in EXACT if w not in ("--semi-start", "3")]
    one, two = (log(train("train_adv", *words, "--accumulate", n, "--scale", 1.2, 1.5, out=str(n))) for n in (1, 2))
    assert len(two) == 10
    for a, b in zip(one, two):
        assert b["loss_ce"] == pytest.approx(a["loss_ce"], rel=0.03) and b["loss_d"] == pytest.approx(a["loss_d"], rel=0.03)


def test_what_cannot_be_shared_out(fails, voc):
    assert "--batch-size 2: it is shared out to 1 processes x 4 --accumulate" in fails(
        "train_base", "--data", voc, *SMALL, "--accumulate", 4)


def test_nets_and_losses_compile_whole():
    """No graph break from the pixels to the losses of train_semi, and the same numbers as without."""
    torch.manual_seed(0)
    seg, disc = model.DeepLabV2("resnet18", 4, 8, "none", bn="frozen").train(), model.Discriminator(4)

    def losses(picture, target):
        logits = seg(seg.normalise(picture))
        valid = target != data.IGNORE
        d_fake = disc(ops.upsample_softmax(logits, (65, 65), torch.float32, valid=valid))
        d_real = disc(model.one_hot(target, 4))
        semi, kept = ops.masked_cross_entropy(logits, confidence=d_fake, valid=valid, threshold=0.4, size=(65, 65))
        return (ops.masked_cross_entropy(logits, target)[0], model.bce(d_fake, 1, valid), model.bce(d_real, 0.9, valid), semi,
                kept)
    picture = torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8)
    target = torch.randint(0, 4, (2, 65, 65), dtype=torch.uint8)
    target[:, :5] = 255
    want = losses(picture, target)
    got = torch.compile(losses, fullgraph=True, backend="aot_eager")(picture, target)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)
    weights = [p for p in seg.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(sum(loss[:4]), weights) for loss in (want, got))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@SLOW
def test_compiled_training(train, monkeypatch):
    """But for the code that inductor makes of it, which takes minutes."""
    compile, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net).__name__) or compile(
        net, backend="aot_eager", fullgraph=True))
    out = train("train_semi", "--compile", "--iters", 2)
    assert compiled == ["DeepLabV2", "Discriminator"]
    assert set(torch.load(out / "last.pt", weights_only=True)["seg"]) == set(
        model.DeepLabV2("efficientnet_lite0", 4, 16, "none").state_dict())


def test_optimisers_are_fused():
    args = argparse.Namespace(lr=1, head_lr=1, nesterov=True, weight_decay=0, d_optim="adam", d_lr=1, d_betas=(0.9, 0.99),
                              d_decay=None, d_momentum=0.5)
    seg, disc = model.DeepLabV2("resnet18", 4, 8, "none"), model.Discriminator(4)
    found = [model.seg_optimizer(seg, args), model.disc_optimizer(disc, args)]
    args.d_optim = "sgd"
    assert all(opt.defaults["fused"] for opt in [*found, model.disc_optimizer(disc, args)])
