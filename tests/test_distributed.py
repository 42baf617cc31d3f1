"""Several ranks, stopping by signals and resuming; more of it in tests/stress/trainings.py."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

from common import args, distributed
from common.console import InputError
from common.layouts import open_dataset

import pytest
import torch
from conftest import ROOT, SMALL, call, interrupt, is_equal, load, log, on_each_rank, python

import model
from csrc import ops
from eval import evaluate

IDS = [f"train{n}" for n in range(7)]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
# train_semi.py does all that train_base.py and train_adv.py do; tests/stress/trainings.py tests these too
STARTS = {"train_semi": ["--semi-start", 3, "--d-unlabelled"], "train_match": ["--u-start", 3, "--confidence", 0.2]}
WEIGHTS = "grey 2e-6\nred 0\ngreen 1e-5\nblue 3e-6\n"


@contextlib.contextmanager
def start(*words):
    """Start a Python command in its own process group, of which nothing is left at the end."""
    with subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, env=ENV) as run:
        try:
            yield run
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)


def torchrun(ranks):
    """Return the first words of a command that runs a script on several ranks."""
    port = 29500 + os.getpid() % 2000
    return ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]


def run_ranks(ranks, *words):
    done = python(*torchrun(ranks), *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.quick
def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one(monkeypatch):
    """A scheduler may show each task only its own GPU; --gpu must be one of those that exist."""
    set_device, init = mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", set_device)
    monkeypatch.setattr(distributed.dist, "init_process_group", init)
    monkeypatch.setattr(distributed.atexit, "register", init)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    for gpus, rank, expected in ((4, 3, 3), (1, 3, 0)):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert distributed.init_device(0) == torch.device("cuda", expected)
        assert set_device.call_args.args == (expected,)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 1)
    with pytest.raises(InputError, match="--gpu 1: this machine has 1"):
        distributed.init_device(1)


@pytest.mark.quick
@pytest.mark.parametrize("file, said", [("/dev/nvidia0", "driver too old for torch built with CUDA 13.0"),
                                        ("/dev/null0", "no CUDA here")])
def test_why_there_is_no_gpu(monkeypatch, file, said):
    cpu = torch.device("cpu")
    monkeypatch.setattr(distributed.os.path, "exists", lambda path: path == file)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert said in distributed.describe_device(cpu, 0) and "(" not in distributed.describe_device(cpu, -1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no CUDA here" in distributed.describe_device(cpu, 0)


@pytest.mark.parametrize("script", STARTS)
def test_two_ranks_train_as_one(voc, train, tmp_path, script):
    """Half the batch each, of images with different numbers of void pixels and of each class: the same losses.

    train_semi.py has weights of the classes, whose sum over the pixels of a batch is below 1.
    """
    # at this seed no pixel is so near to a threshold that rounding decides about it
    words = *"--bn frozen --no-amp --iters 6 --batch-size 4 --eval-every 100 --seed 1".split(), *STARTS.get(script, [])
    if script == "train_semi":
        (tmp_path / "weights.txt").write_text(WEIGHTS)
        words += "--class-weights", tmp_path / "weights.txt"
    printed = run_ranks(2, ROOT / f"{script}.py", "--data", voc, *SMALL, *words, "--out", tmp_path / "two")
    assert "2 ranks" in printed and printed.count("mIoU") == 1
    alone, both = log(train(script, *words, out="one")), log(tmp_path / "two")
    assert len(both) == 6 and len({row["loss_ce"] for row in both}) == 6 and any(row.get("kept", 1) for row in both)
    for one, two in zip(alone, both, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"miou", "precision", "per_class"}:
            assert two[name] == pytest.approx(one[name], rel=1e-5 if name == "loss_ce" else 1e-4), (name, one, two)


@pytest.mark.quick
def test_the_mean_over_ranks_is_over_all_pixels(monkeypatch):
    """Of 6 pixels on one rank and 2 on the other: the mean of what the ranks return is that over all 8."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda count: count * 0 + 8)
    one, two = (distributed.global_mean(torch.tensor(x), torch.tensor(n)) for x, n in ((1.0, 6), (5.0, 2)))
    assert (one + two) / 2 == (1.0 * 6 + 5.0 * 2) / 8
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda count: count * 0)
    assert distributed.global_mean(torch.tensor(0.0), torch.tensor(0)) == 0  # no pixel on any rank


@pytest.mark.quick
def test_the_weighted_mean_over_ranks_divides_by_all_weights(monkeypatch):
    """Ranks with different classes: the mean of what they return, and of its gradients, is that of one rank."""
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(4, 3, 5, 5, generator=g), torch.randint(0, 3, (4, 33, 33), generator=g)
    target[:2][target[:2] == 2] = 255  # the last class is on the second rank only
    logits, target, weight = logits.requires_grad_(), target.to(torch.uint8), torch.tensor([1e-6, 0, 5e-5])
    expected = model.cross_entropy(logits, target, weight)
    gradient, = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    total = sum(weight[c].double() * (target == c).sum() for c in range(3))
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda count: count * 0 + total.float())
    parts = [model.cross_entropy(logits[i:i + 2], target[i:i + 2], weight) for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, expected)
    torch.testing.assert_close(torch.autograd.grad(sum(parts) / 2, logits)[0], gradient)


NORM = """
import sys
sys.path.insert(0, {root!r})
import torch
from common import distributed
distributed.init_device(-1)
g = torch.Generator().manual_seed(0)
x, upstream = torch.randn(2, 4, 5, 6, 7, generator=g, dtype=torch.float64)
x = (x * torch.tensor([1, 2, 0.1, 10, 1]).view(5, 1, 1) + torch.arange(4).view(4, 1, 1, 1) + 5).to({dtype})
layout = torch.channels_last
if "1d" in {layer!r}:
    x, upstream, layout = x.flatten(2), upstream.flatten(2), torch.contiguous_format
from timm.layers import BatchNormAct2d
one = torch.nn.Sequential({layer}(5)).double()
weights = {{"0.weight": torch.arange(-2.0, 3), "0.bias": torch.arange(5.0)}}
one.load_state_dict(weights, strict=False)
two = torch.nn.Sequential({layer}(5)).to({weights})
two.load_state_dict(one.state_dict())
distributed.prepare_model(two)
mine = slice(2 * distributed.RANK, 2 * distributed.RANK + 2)
for step in range(3):
    two[0].track_running_stats = one[0].track_running_stats = step < 2
    a = x.double().clone().requires_grad_()
    b = x[mine].clone(memory_format=layout).requires_grad_()
    y, z = one(a), two(b)
    (y * upstream).sum().backward()
    (z * upstream[mine].to(z.dtype)).sum().backward()
    for found, want in ((z, y[mine]), (b.grad, a.grad[mine])):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), want, rtol={tolerance}, atol={tolerance} * want.abs().max().item())
for p, q in zip(two.parameters(), one.parameters()):  # DDP takes the mean, the loss of a rank is twice its share
    torch.testing.assert_close(distributed.all_reduce_sum(p.grad).double(), q.grad, rtol={tolerance}, atol=0)
for name, want in one.state_dict().items():
    torch.testing.assert_close(two.state_dict()[name].double(), want.double(), rtol=1e-5, atol=0)
torch.testing.assert_close(two.eval()(x).double(), one.eval()(x.double()), rtol={tolerance}, atol={tolerance})
assert two[0].num_batches_tracked == 2
if distributed.RANK == 0:
    print("the same")
"""


@pytest.mark.parametrize("layer, dtype, weights, tolerance", [
    ("torch.nn.BatchNorm2d", "torch.float64", "torch.float64", 1e-12),
    ("torch.nn.BatchNorm1d", "torch.float64", "torch.float64", 1e-12),
    ("BatchNormAct2d", "torch.float64", "torch.float64", 1e-12),
    ("torch.nn.BatchNorm2d", "torch.float32", "torch.float32", 2e-6),
    ("torch.nn.BatchNorm2d", "torch.bfloat16", "torch.float32", 2e-2)])
def test_batch_norm_of_two_ranks_is_that_of_one(tmp_path, layer, dtype, weights, tolerance):
    """In float64 on one rank: output, gradients, running statistics (fixed in the last step), evaluation."""
    values = dict(root=str(ROOT), layer=layer, dtype=dtype, weights=weights, tolerance=tolerance)
    (tmp_path / "norm.py").write_text(NORM.format(**values))
    assert run_ranks(2, tmp_path / "norm.py").endswith("the same\n")  # gloo of torch 2.10 prints lines of its own


@pytest.mark.quick
def test_another_accelerator(monkeypatch):
    """Is used as a GPU is, by the references."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    device = distributed.init_device(1)
    assert device == torch.device("xpu", 1) and chosen == [1] and ops.in_use(device.type) == "reference"
    assert distributed.describe_device(device, 1) == "xpu:1"
    with pytest.raises(InputError, match="2 xpu devices"):
        distributed.init_device(2)


@pytest.mark.quick
@pytest.mark.parametrize("cpus, loaders, ranks, workers", [(64, 1, 1, 8), (12, 2, 1, 6), (32, 2, 4, 4), (4, 2, 8, 1)])
def test_workers_on_a_gpu(blocks, monkeypatch, cpus, loaders, ranks, workers):
    """The CPUs of this machine are shared by its ranks and by the loaders of each; on the CPU a loader has two."""
    monkeypatch.setattr(args, "num_cpus", lambda: cpus)
    monkeypatch.setattr(distributed, "RANKS_HERE", ranks)
    for has_gpu, words, expected in ((True, [], workers), (True, ["--gpu", "-1"], 2), (False, [], 2),
                                     (True, ["--workers", "3"], 3)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        flags = args.shared_flags("", "out").parse_args(words)
        args.resolve_args(flags, open_dataset(str(blocks)), lambda *_: {"stride": 16}, loaders=loaders)
        assert flags.workers == expected


def test_cudnn_searches_in_training_only(train, monkeypatch):
    """In all steps, also after an evaluation, and in no evaluation: there sizes vary."""
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    forward = model.DeepLabV2.forward
    monkeypatch.setattr(model.DeepLabV2, "forward", lambda self, x: seen.append(
        (self.training, torch.backends.cudnn.benchmark)) or forward(self, x))
    train("train_base", "--iters", 2, "--eval-every", 1)
    assert set(seen) == {(True, True), (False, False)} and [x[0] for x in seen] == [True, False] * 2


def test_two_ranks_score_as_one(voc, trained, tmp_path):
    """Seven images: the scores and predictions of eval.py on two ranks are those of one rank to the bit."""
    (voc / "seven.txt").write_text("\n".join(IDS))
    for ranks in (1, 2):
        words = ("--ckpt", trained["train_base"] / "last.pt", "--gpu", -1, "--list", voc / "seven.txt", "--workers", 0,
                 "--json", tmp_path / f"{ranks}.json", "--out", tmp_path / f"{ranks}")
        if ranks == 1:
            call("eval", *words)
        else:
            assert run_ranks(ranks, ROOT / "eval.py", *words).count("mIoU") == 1
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one == two and one["miou"] > 0
    for name in IDS:
        assert (tmp_path / f"1/{name}.png").read_bytes() == (tmp_path / f"2/{name}.png").read_bytes()


def test_ranks_share_the_images(trained, blocks, tmp_path, monkeypatch):
    """Each of seven is evaluated, and predicted, by one of three ranks; scores alone would not tell."""
    ckpt, dataset = trained["train_base"] / "last.pt", open_dataset(str(blocks))
    seg, samples, seen = model.load_segmenter(ckpt), dataset.samples(IDS), [set() for _ in range(3)]
    on_each_rank(monkeypatch, 3, lambda rank: evaluate(seg, samples, 0, write=lambda sample, *_: seen[rank].add(
        sample.id)))
    assert sorted(id for share in seen for id in share) == IDS and all(seen)
    words = "--ckpt", ckpt, "--gpu", -1, *(sample.image for sample in samples), "--out"
    on_each_rank(monkeypatch, 3, lambda rank: call("predict", *words, tmp_path / f"{rank}"))
    assert sorted(file.stem for file in tmp_path.glob("*/train*.png")) == IDS


@pytest.mark.parametrize("script", ["train_match"])  # train_semi: test_scripts.py; others: tests/stress/trainings.py
def test_stopped_and_resumed_is_straight(train, tmp_path, script):
    """SIGTERM in the fifth of 8 steps, then --resume: the log and, to the bit, the checkpoints of a straight run."""
    words = "--iters", 8, "--eval-every", 4, "--save-every", 3, *STARTS.get(script, [])
    straight = train(script, *words, out="straight")
    with pytest.raises(SystemExit) as stop, interrupt("step 5/", signal.SIGTERM) as output:
        train(script, *words, out="stopped")
    stopped = tmp_path / "stopped"
    assert not stop.value.code and "stopped by SIGTERM after step 5" in output.getvalue()
    assert load(stopped)["step"] == log(stopped)[-1]["step"] == 5
    train(script, *words, "--resume", out="stopped")
    assert (stopped / "log.jsonl").read_text() == (straight / "log.jsonl").read_text()
    for name in ("last.pt", "best.pt"):
        assert is_equal(load(stopped, name), load(straight, name), ignored=("out", "resume", "minutes")), name


def test_workers_leave_the_signal_to_the_script(voc, tmp_path):
    """SIGTERM to the whole process group while the workers load, as a scheduler sends it."""
    words = "--data", voc, *SMALL, "--iters", 10**5, "--eval-every", 10**5, "--workers", 2, "--out", tmp_path / "out"
    with start(ROOT / "train_base.py", *words) as run:
        wait_until((tmp_path / "out/log.jsonl").exists)
        os.killpg(run.pid, signal.SIGTERM)
        printed, error = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped by SIGTERM after step" in printed and not error, error
    assert load(tmp_path / "out")["step"] == log(tmp_path / "out")[-1]["step"]


@pytest.mark.quick
def test_a_batch_that_ranks_cannot_share(fails, blocks, monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    assert "--batch-size 2" in fails("train_base", "--data", blocks, *SMALL)
    assert "multiple of 8" in fails("train_match", "--data", blocks, *SMALL, "--batch-size", 4)  # CutMix mixes pairs
