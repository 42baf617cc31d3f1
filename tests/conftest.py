"""A small data set, trainings on it, and ways to run scripts, for all tests."""
import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tensors here are small

import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = "train_base", "train_adv", "train_semi", "train_match"
COLOURS = np.array([(40, 40, 40), (220, 60, 60), (60, 200, 60), (60, 60, 220)], np.uint8)  # of the classes
SMALL = ("--backbone efficientnet_lite0 --init imagenet --crop 65 --batch-size 2 --iters 3 --log-every 1 --workers 0 "
         "--gpu -1 --class-weights none").split()


@pytest.fixture(autouse=True)
def restore_process():
    """After each test, restore the signal handlers and end the loaders' workers."""
    from common import distributed

    import data
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    data.kill_workers()
    distributed.stop_reason = None
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def blocks(tmp_path_factory):
    """A tiny data set in VOC layout: 8 training and 2 validation images of blocks in the colours of 4 classes."""
    root, rng = tmp_path_factory.mktemp("blocks") / "voc", np.random.RandomState(0)
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, ids in (("train", [f"train{n}" for n in range(8)]), ("val", ["val0", "val1"])):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(ids))  # no newline at the end
        for i in ids:
            label = rng.randint(0, 4, (5, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint8)  # (80,96)
            Image.fromarray(COLOURS[label]).save(root / f"JPEGImages/{i}.png")
            label[:3] = 255
            Image.fromarray(label).save(root / f"SegmentationClassAug/{i}.png")
    (root / "classes.txt").write_text("grey\nred\ngreen\nblue\n")
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The generated data set, data/shapes in some folder."""
    from common import layouts
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shapes"))
        return layouts.open_dataset(None).root.resolve()


@pytest.fixture
def voc(blocks, tmp_path):
    """A copy of `blocks` that a test may change."""
    return Path(shutil.copytree(blocks, tmp_path / "voc"))


def call(script, *words):
    """Run main() of a script in this process."""
    module = importlib.import_module(script)
    module.main(module.flags().parse_args([str(w) for w in words]))


@pytest.fixture
def train(voc, tmp_path):
    """train(script, *flags) -> output folder of a training on `voc` in this process; later flags override earlier."""
    def run(script, *words, out="out"):
        call(script, "--data", voc, *SMALL, "--out", tmp_path / out, *words)
        return tmp_path / out
    return run


@pytest.fixture(scope="session")
def trained(blocks, tmp_path_factory):
    """{script: output folder} of three steps on `blocks`, trained at first use; tests must not write there."""
    class Trained(dict):
        def __missing__(self, script):
            self[script] = tmp_path_factory.mktemp("trained") / script
            call(script, "--data", blocks, *SMALL, "--out", self[script])
            return self[script]
    return Trained()


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(script, *flags) -> the line on standard error, after checking that it is one and the exit status is 2."""
    def run(script, *words):
        from common import console

        import data
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            console.launch(module.main, module.flags)
        data.kill_workers()  # as at the end of a process
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, error
        return error
    return run


class Killed(BaseException):
    """Stands for kill -9: nothing in the scripts catches it."""


@contextlib.contextmanager
def interrupt(text, action):
    """While a script in this process runs: take what it prints, and act when it prints `text`.

    action: a signal, which is sent to this process, or Killed, which is raised.
    """
    class Output(io.StringIO):
        def write(self, part):
            super().write(part)
            if text in part:
                if action is Killed:
                    raise Killed
                os.kill(os.getpid(), action)
    with contextlib.redirect_stdout(Output()) as output:
        yield output


def on_each_rank(monkeypatch, ranks, function):
    """Return [function(rank)] as each rank computes it in this process; their sums are left out."""
    from common import distributed
    monkeypatch.setattr(distributed, "WORLD_SIZE", ranks)
    monkeypatch.setattr(distributed, "init_device", lambda gpu: torch.device("cpu"))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda x, source: None)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "RANK", rank)
        found.append(function(rank))
    return found


def python(*words, cwd=ROOT, **env):
    """Run a script as a user would, in its own process."""
    command, env = [sys.executable, *map(str, words)], os.environ | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def load(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)


def is_equal(a, b, ignored=()):
    """Whether two checkpoints, or parts of them, are equal to the bit, apart from the dict keys in `ignored`."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[k], b[k], ignored) for k in a.keys() - {*ignored})
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(is_equal(x, y, ignored) for x, y in zip(a, b))
    return a == b
