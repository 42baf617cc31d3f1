import importlib
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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tensors here are small, and pytest-xdist has the cores

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = "train_base", "train_adv", "train_semi", "train_match"
COLOURS = np.array([(40, 40, 40), (220, 60, 60), (60, 200, 60), (60, 60, 220)], np.uint8)  # class by class
SMALL = ("--backbone efficientnet_lite0 --init none --crop 65 --batch-size 2 --iters 3 --log-every 1 --workers 0 "
         "--gpu -1").split()


@pytest.fixture(autouse=True)
def signals():
    """After each test, restore the signal handlers and kill the loaders' workers."""
    import data
    from common import distributed
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    data.kill_workers()
    distributed.stop_reason = None
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that CI leaves out as well")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def blocks(tmp_path_factory):
    """A tiny set in VOC layout: 8 training and 2 validation pictures of blocks, each class in its own colour; K = 4."""
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


@pytest.fixture
def voc(blocks, tmp_path):
    """A test's own copy of `blocks`."""
    return Path(shutil.copytree(blocks, tmp_path / "voc"))


def call(script, *words):
    """main() of a script, in this process."""
    module = importlib.import_module(script)
    module.main(module.flags().parse_args([str(w) for w in words]))


@pytest.fixture
def train(voc, tmp_path):
    """train(script, *flags) -> OUT, run in this process on `voc`; flags given last win."""
    def run(script, *words, out="out"):
        call(script, "--data", voc, *SMALL, "--out", tmp_path / out, *words)
        return tmp_path / out
    return run


def of_each_script(blocks, out, *words):
    for script in SCRIPTS:
        call(script, "--data", blocks, *SMALL, *words, "--out", out / script)
    return {script: out / script for script in SCRIPTS}


@pytest.fixture(scope="session")
def trained(blocks, tmp_path_factory):
    """{script: OUT} of each script's three steps on `blocks`; nothing may be written there."""
    return of_each_script(blocks, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def seeing(blocks, tmp_path_factory):
    """The same from ImageNet's weights: what `trained` nets predict hardly depends on the picture."""
    return of_each_script(blocks, tmp_path_factory.mktemp("seeing"), "--init", "imagenet")


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(script, *flags) -> the one line on standard error, after checking for exit status 2 and a single line."""
    def run(script, *words):
        from common import console
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            console.launch(module.main, module.flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, error
        return error
    return run


def python(*words, cwd=ROOT, **env):
    """Run a script as a user would, in a process of its own."""
    command, env = [sys.executable, *map(str, words)], os.environ | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
