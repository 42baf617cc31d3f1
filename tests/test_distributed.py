"""Several ranks, torch.compile, stopping by signals and resuming."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, call, log, python

import data
import model
from common import console, distributed
from common.layouts import IGNORE
from csrc import ops

EXACT = "--bn frozen --no-amp --iters 10 --batch-size 4 --eval-every 100".split()
SLOW, ONE_THREAD = pytest.mark.slow, os.environ | {"OMP_NUM_THREADS": "1"}
# what train_semi.py does in a step train_base.py and train_adv.py do too
EACH = [pytest.param(script, marks=SLOW) if script in ("train_base", "train_adv") else script for script in SCRIPTS]
STARTS = {"train_semi": "--semi-start 3 --d-unlabelled",
          "train_match": "--u-start 3 --confidence 0.2"}


@contextlib.contextmanager
def group(*words, **more):
    """A command in a group of processes of its own, of which nothing is left at the end."""
    with subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, **more) as run:
        try:
            yield run
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def until(true, seconds=120):
    """Wait for it, but not for ever."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not true():
        time.sleep(0.1)


def several(processes):
    """The start of torchrun's command."""
    port = 29500 + os.getpid() % 2000
    return list(map(str, ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", port]))


def torchrun(processes, *words):
    done = python(*several(processes), *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EACH)
def test_two_processes_are_one(voc, train, tmp_path, script):
    """Half the batch each, and pictures with different numbers of void pixels: the same losses."""
    words = EXACT + STARTS.get(script, "").split()
    said = torchrun(2, ROOT / f"{script}.py", "--data", voc, *SMALL, *words, "--out", tmp_path / "two")
    assert "2 ranks" in said and said.count("mIoU") == 1
    alone = log(train(script, *words, out="one"))
    both = log(tmp_path / "two")
    assert len(both) == 10 and len({row["loss_ce"] for row in both}) == 10
    assert any(row.get("kept", 1) for row in both)
    for one, two in zip(alone, both, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"miou"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5 if name == "loss_ce" else 1e-4), (name, one, two)


@pytest.mark.quick
def test_a_mean_over_processes(monkeypatch):
    """Of 6 pixels here and 2 there: the mean of what the processes have is that over all 8."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda count: count * 0 + 8)
    here, there = (distributed.global_mean(torch.tensor(x), torch.tensor(n)) for x, n in ((1.0, 6), (5.0, 2)))
    assert (here + there) / 2 == (1.0 * 6 + 5.0 * 2) / 8
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda count: count * 0)
    assert distributed.global_mean(torch.tensor(0.0), torch.tensor(0)) == 0  # no pixel anywhere


def test_processes_share_an_evaluation(voc, trained, tmp_path):
    """Seven pictures, two and three processes: every one counts once, to the last bit."""
    (voc / "seven.txt").write_text("\n".join(f"train{n}" for n in range(7)))
    words = ["--ckpt", trained["train_base"] / "last.pt", "--gpu", -1, "--list", voc / "seven.txt", "--workers", 0]
    found = {}
    for n in (1, 3):
        here = list(map(str, [*words, "--json", tmp_path / f"{n}.json", "--out", tmp_path / f"{n}"]))
        if n == 1:
            call("eval", *here)
        else:
            assert torchrun(n, ROOT / "eval.py", *here).count("mIoU") == 1
        found[n] = json.loads((tmp_path / f"{n}.json").read_text())
        assert len(list((tmp_path / f"{n}").glob("*.png"))) == 7
        for i in range(7):
            assert (tmp_path / f"{n}/train{i}.png").read_bytes() == (tmp_path / f"1/train{i}.png").read_bytes()
    assert found[1] == found[3] and found[1]["miou"] > 0
    torchrun(2, ROOT / "predict.py", "--ckpt", words[1], "--gpu", -1, "--out", tmp_path / "images",
             *(voc / f"JPEGImages/train{i}.png" for i in range(3)))
    for i in range(3):
        assert (tmp_path / f"images/train{i}.png").read_bytes() == (tmp_path / f"1/train{i}.png").read_bytes()


def test_a_rank_without_a_validation_image(voc, tmp_path):
    """It takes part in the sums of a script's own scores, so that the other rank does not wait for it."""
    (voc / "ImageSets/Segmentation/val.txt").write_text("val0")
    words = "--data", voc, *SMALL, "--iters", 1, "--out", tmp_path / "two"
    with group(*several(2), ROOT / "train_semi.py", *words, env=ONE_THREAD) as run:
        said, error = run.communicate(timeout=120)
    assert run.returncode == 0 and said.count("mIoU") == 1, error
    assert 0 <= log(tmp_path / "two")[-1]["precision"] <= 100


@SLOW
def test_statistics_are_level_where_they_are_scored(voc, train, tmp_path, capsys):
    """Batch norm that trains sees other pictures in each process; what is scored and what is saved are one net."""
    torchrun(2, ROOT / "train_base.py", "--data", voc, *SMALL, "--iters", 3, "--out", tmp_path / "two")
    capsys.readouterr()
    call("eval", "--ckpt", tmp_path / "two/last.pt", "--gpu", -1)
    assert capsys.readouterr().out.splitlines()[-1] == f"mIoU {log(tmp_path / 'two')[-1]['miou']:.2f}"


def test_a_signal_during_the_sum_waits_for_the_next(monkeypatch):
    """All processes have to take the same answer, the sum's."""
    distributed.install_signal_handlers()
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)

    def late(x):
        os.kill(os.getpid(), signal.SIGTERM)
        return x
    monkeypatch.setattr(distributed, "all_reduce_sum", late)
    assert distributed.stop_requested() is None and distributed.stop_requested() == "SIGTERM"


def test_processes_start_from_one_step(train, monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda x: x + 7)
    with pytest.raises(console.InputError, match="--resume: the ranks found different checkpoints"):
        train("train_base")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("out", "resume", "minutes"))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize("script", EACH)
def test_stopped_and_resumed_is_straight(train, tmp_path, monkeypatch, capsys, script):
    """20 steps, against 20 with SIGTERM in the tenth: the same log and, to the bit, the same checkpoint."""
    words = ["--iters", 20, "--workers", 1, "--eval-every", 8, "--save-every", 7, *STARTS.get(script, "").split()]
    straight = train(script, *words, out="straight")
    poly_lr = model.poly_lr

    def lr_and_signal(step, *more):
        poly_lr(step, *more)
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(model, "poly_lr", lr_and_signal)
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
    words, pad_to_stride, seen = ("--iters", 6, "--eval-every", 3, "--save-every", 100), data.pad_to_stride, []
    straight = train("train_semi", *words, out="straight")

    def signalling(*args):
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(1)
        return pad_to_stride(*args)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(data, "pad_to_stride", signalling)
        train("train_semi", *words, out="stopped")
    assert not stop.value.code and "stopped by SIGINT after step 3" in capsys.readouterr().out
    assert "miou" not in log(tmp_path / "stopped")[-1] and len(seen) == 1
    checkpoint = torch.load(tmp_path / "stopped/last.pt", weights_only=True)
    assert checkpoint["step"] == 3 and checkpoint["miou"] is None
    resumed = train("train_semi", *words, "--resume", out="stopped")
    assert (resumed / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()


def slowly(script, seconds):
    """The code of a script whose loaders take so long for a picture."""
    return (f"import sys, time; sys.path[:0] = {[str(ROOT)]!r}; import data, {script}; from common import console; "
            f"r = data.read_image; data.read_image = lambda f: time.sleep({seconds}) or r(f); "
            f"console.launch({script}.main, {script}.flags)")


@pytest.mark.parametrize("script", SCRIPTS)
def test_workers_start_before_there_are_nets(train, monkeypatch, script):
    """Which they would keep copies of."""
    def net(*_):
        raise EOFError(len(active_children()))
    monkeypatch.setattr(model, "DeepLabV2", net)
    with pytest.raises(EOFError, match="2" if script in ("train_semi", "train_match") else "1"):
        train(script, "--workers", 1)


def test_workers_leave_the_signal_to_the_script(voc, tmp_path):
    """SIGTERM to the whole group of processes while the workers load, as a scheduler sends it."""
    words = "--data", voc, *SMALL, "--iters", 500, "--workers", 2, "--out", tmp_path / "out"
    with group("-c", slowly("train_base", 0.2), *words) as run:
        until((tmp_path / "out/log.jsonl").exists)
        os.killpg(run.pid, signal.SIGTERM)
        said, error = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped by SIGTERM after step" in said and not error, error
    assert torch.load(tmp_path / "out/last.pt", weights_only=True)["step"] == log(tmp_path / "out")[-1]["step"]


@SLOW
@pytest.mark.parametrize("script", ["train_semi", "train_match"])
def test_several_processes_stop_and_go_on(voc, tmp_path, script):
    """SIGTERM to torchrun and its processes, then --resume: the log of a straight run."""
    slow = tmp_path / "slow.py"
    slow.write_text(slowly(script, 0.1))
    words = ["--data", voc, *SMALL, "--iters", 30, "--eval-every", 100, "--workers", 1, "--batch-size", 4,
             *STARTS[script].split()]
    file = tmp_path / "stopped/log.jsonl"
    with group(*several(2), slow, *words, "--out", tmp_path / "stopped", env=ONE_THREAD) as run:
        until(lambda: file.exists() and file.read_text().count("\n") > 3)
        os.killpg(run.pid, signal.SIGTERM)
        said, error = run.communicate(timeout=60)
    step = log(tmp_path / "stopped")[-1]["step"]
    assert f"after step {step};" in said and 3 < step < 30, error
    assert torch.load(tmp_path / "stopped/last.pt", weights_only=True)["step"] == step
    torchrun(2, ROOT / f"{script}.py", *words, "--out", tmp_path / "stopped", "--resume")
    torchrun(2, ROOT / f"{script}.py", *words, "--out", tmp_path / "straight")
    assert file.read_text() == (tmp_path / "straight/log.jsonl").read_text()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_is_killed(voc, tmp_path, killed):
    """The other one ends within a minute, by one line before all tracebacks; --resume goes on from the checkpoint."""
    words = "--data", voc, *SMALL, "--iters", 10**5, "--save-every", 1, "--out", tmp_path / "out"
    with group(*several(2), ROOT / "train_base.py", *words, env=ONE_THREAD) as run:
        until(lambda: (tmp_path / "out/last.pt").exists() or run.poll() is not None)
        mine = subprocess.check_output(["pgrep", "-P", str(run.pid), "-f", "train_base.py"], text=True).split()
        os.kill(int(mine[killed]), signal.SIGKILL)
        _, error = run.communicate(timeout=60)
    assert error.count("another rank failed") == 1 and "[rank" not in error, error
    assert "Traceback" not in error.split("another rank failed")[0], error
    step = torch.load(tmp_path / "out/last.pt", weights_only=True)["step"]
    done = python("train_base.py", *words, "--iters", step + 1, "--resume")
    assert done.stdout.count("\nstep ") == 1 and f"\nstep {step + 1}/" in done.stdout, done.stderr


def test_a_process_with_a_bad_picture(voc, tmp_path):
    """Its line is the first thing that is read, and nobody's traceback is there."""
    path = voc / "JPEGImages/train1.png"
    path.write_bytes(path.read_bytes()[:-60])  # the header is whole: a process finds it when it is its turn
    words = "--data", voc, *SMALL, "--split", 1, "--iters", 9, "--out", tmp_path / "out"
    with group(*several(2), ROOT / "train_base.py", *words, env=ONE_THREAD) as run:
        _, error = run.communicate(timeout=60)
    first, *more = [line for line in error.splitlines() if line.startswith("train_base.py: ")]
    assert run.returncode and f"{path}: cannot be read" in first
    assert len(more) <= 1 and all("another rank failed" in line for line in more), error
    assert "Traceback" not in error.split(first)[0] and "[rank" not in error, error


def test_two_runs_start_at_once(voc, tmp_path):
    """In one --out: one trains, the other is refused. The one is killed: no lock is left."""
    words = [ROOT / "train_base.py", "--data", voc, *SMALL, "--iters", 10**5, "--save-every", 1,
             "--out", tmp_path / "out"]
    for more in [], ["--resume"]:
        with group(*words, *more) as one, group(*words, *more) as two:
            until(lambda: (one.poll() or two.poll()) and (tmp_path / "out/last.pt").exists())
            ended = [one.poll(), two.poll()]
            assert sorted(ended, key=str) == [2, None]
            assert "another run is writing there" in (one, two)[ended.index(2)].communicate()[1]
    assert not list((tmp_path / "out").glob("earlier-*"))


@pytest.mark.quick
def test_what_cannot_be_shared_out(fails, blocks, monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    assert "batch-size 2" in fails(
        "train_base", "--data", blocks, *SMALL)
    assert "multiple of 8" in fails(
        "train_match", "--data", blocks, *SMALL, "--batch-size", 4)


def test_nets_and_losses_compile_whole():
    """No graph break from the pixels to the losses of train_semi, and the same numbers as without."""
    torch.manual_seed(0)
    seg, disc = model.DeepLabV2("resnet18", 4, 8, "none", bn="frozen").train(), model.Discriminator(4)

    def losses(picture, target):
        logits = seg(picture)
        valid = target != IGNORE
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            d_fake = disc(ops.upsample_softmax(logits, valid=valid))
            d_real = disc(model.one_hot(target, 4))
        semi, kept = ops.masked_cross_entropy(logits, confidence=d_fake, valid=valid, threshold=0.4)
        loss_ce, _ = ops.masked_cross_entropy(logits, target)
        return loss_ce, model.bce(d_fake, 1, valid), model.bce(d_real, 0.9, valid), semi, kept
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
@pytest.mark.parametrize("script, nets", [("train_semi", ["DeepLabV2", "Discriminator"]),
                                          ("train_match", ["DeepLabV2", "DeepLabV2"])])
def test_compiled_training(train, monkeypatch, script, nets):
    """But for the code that inductor makes of it, which takes minutes. The evaluations are not compiled."""
    compile, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net).__name__) or compile(
        net, backend="aot_eager", fullgraph=True))
    out = train(script, "--compile", "--iters", 2)
    assert compiled == nets
    assert set(torch.load(out / "last.pt", weights_only=True)["seg"]) == set(
        model.DeepLabV2("efficientnet_lite0", 4, 16, "none").state_dict())
