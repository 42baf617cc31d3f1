"""The page of gpu.py on the CPU, with a part that fails, and the error of memory.py.

    python -m pytest tests/stress/gpu_page.py    # 2 minutes on two idle cores
"""
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import python

sys.path.insert(0, str(Path(__file__).parent))
import gpu  # noqa: E402

import data  # noqa: E402
import train_base  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = python("tests/stress/gpu.py")
    assert done.returncode == 2 and "no CUDA here" in done.stderr and done.stderr.count("\n") == 1


def test_a_part_that_fails_is_one_line_and_the_others_run(tmp_path):
    words = "--gpu", -1, "--steps", 2, "--out", tmp_path / "gpu.md", "--flags", "--lam-adv 0.1"
    done = python("tests/stress/gpu.py", *words, SEG_OPS="reference")
    page = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0 and page in done.stdout, done.stderr
    assert re.search("csrc/selfcheck.py.*\n\npassed\n", page)
    assert len(re.findall(r"^\| train_(?:adv|semi) \| [\d.]+ \| [\d.]+ \| \d+% \|.*reference", page, re.M)) == 2
    for script in ("train_base", "train_match"):  # have no such flag
        assert re.search(rf"^\| {script} \| failed \(exit status 2\): .*--lam-adv", page, re.M)
    assert re.search(r"csrc/bench.py\)\n\nfailed \(exit status 2\): .*not in use", page)


def test_share_of_the_loader(tmp_path, monkeypatch):
    """Without workers nearly all of a step waits for images, which take longer in each of the three parts."""
    read, seconds = data.read_image, iter([0.5] * 4 + [1] * 4 + [2] * 4)
    monkeypatch.setattr(data, "read_image", lambda path: time.sleep(next(seconds, 0)) or read(path))
    monkeypatch.setattr(data, "batches", data.batches)
    monkeypatch.setattr(train_base, "Run", train_base.Run)
    gpu.write_voc(tmp_path / "voc", 9)
    words = "--gpu -1 --steps 2 --script train_base --flags=--workers=0 --data"
    row = gpu.time_script(gpu.flags().parse_args([*words.split(), str(tmp_path / "voc")])).split(" | ")
    step, images, share = float(row[1]) / 1e3, float(row[2]), int(row[3][:-1])
    assert 2 < step < 4 and abs(images * step - 2) < 0.2 and 60 < share < 100


def test_computed_memory_is_that_of_a_process():
    done = python("tests/stress/memory.py", "--check")
    errors = [int(x) for x in re.findall(r"([+-]\d+)% \|$", done.stdout, re.M)]
    assert len(errors) == 4 and max(map(abs, errors)) <= 8, done.stdout + done.stderr
