"""csrc/selfcheck.py finds each of these errors in the kernels of the CPU, and of CUDA, which run on the CPU: 3 minutes.

    python -m pytest tests/stress/selfcheck.py
"""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ERRORS = {  # file, what is replaced in it, by what; PLANTED is true in one test
    "a sum of a point": ("cells.cuh", "(b.z - b.w)", "(b.z - (PLANTED ? -b.w : b.w))"),
    "CUDA: a tie": ("confusion_matrix.cu", "now > largest[i] ||",
                    "now > largest[i] || (PLANTED && now == largest[i]) ||"),
    "CUDA: 1 % in a logit": ("cells.cuh", "LOG2E * (c.y - c.x)", "(PLANTED ? 1.01f : 1) * LOG2E * (c.y - c.x)"),
    "1 % in the bilinear term": ("cells.cuh", "LOG2E * (c.w - c.z -", "(PLANTED ? 1.01f : 1) * LOG2E * (c.w - c.z -"),
    "1 % in a dot product": ("upsample_softmax.cu", "dots[p] += e[p]", "dots[p] += (PLANTED ? 1.01f : 1) * e[p]"),
    "CUDA: valid is ignored": ("masked_cross_entropy.cu", "(!params.valid ||", "(PLANTED || !params.valid ||"),
    "no barrier before sums are read": ("cells.cuh", "    __syncthreads();\n    const int x =",
                                        "    if (!PLANTED) __syncthreads();\n    const int x ="),
    "CUDA: no limit along a row": ("cells.cuh", "grid.x.step * max_right)", "(PLANTED ? 0 : grid.x.step * max_right))"),
    "no limit along a column": ("cells.cuh", "fmaxf(grid.y.step *", "fmaxf((PLANTED ? 0 : grid.y.step) *"),
    "the sum times y leaves out a row": ("masked_cross_entropy.cu", "if (i) row_sum", "if (i > PLANTED) row_sum"),
    "CUDA: sums are not cleared": ("cells.cuh", "      sums[at(k)] = make", "      if (!PLANTED) sums[at(k)] = make"),
    "no limit between pixels": ("exponentials.h", "(max_step < 4)", "(PLANTED ? largest == largest : max_step < 4)"),
    "no limit between corners": ("exponentials.h", "(largest - lowest_best < 40)",
                                 "(PLANTED ? largest == largest : largest - lowest_best < 40)"),
    "nonfinite corners are smooth": ("exponentials.h", "(nonfinite == 0)",
                                     "(PLANTED ? largest == largest : nonfinite == 0)"),
    "an axis of unchanged size": ("exponentials.h", "points != outputs &&",
                                  "(PLANTED || points != outputs) &&"),
    "1 % in a corner": ("cells.h", "s.x - s.xy);", "(s.x - s.xy) * (PLANTED ? 1.01f : 1));"),
    "sums of other cells": ("cells.h", "      s = GradientSums{};", "      if (!PLANTED) s = GradientSums{};"),
    "a pixel too many": ("cells.h", "clamp(counts[lane] - offset,", "clamp(counts[lane] - offset + PLANTED,"),
    "an ignored class is used": ("cells.h", "to[i] = ignored | outside", "to[i] = (ignored & !PLANTED) | outside"),
    "1 % in the gradient times x": ("upsample_softmax.cpp", "sum_x += grad *",
                                    "sum_x += (PLANTED ? 1.01f : 1) * grad *"),
    "cells swapped": ("upsample_softmax.cpp", "to[k] = from[(k * P + p) * LANES + l]",
                      "to[k] = from[(k * P + p) * LANES + (l ^ PLANTED)]"),
    "a tie": ("confusion_matrix.cpp", "logit > largest[p];", "PLANTED ? logit >= largest[p] : logit > largest[p];"),
    "a probability above 1": ("confusion_matrix.cpp", "(limit < 1)", "(PLANTED ? limit == limit : limit < 1)"),
    "NaN is above a limit": ("confusion_matrix.cpp", "ids[p] |= ~above & NONE",
                             "ids[p] |= ~(PLANTED ? above | (sums[p] != sums[p]) : above) & NONE"),
    "a block's last pixel is valid": ("confusion_matrix.cpp", "!valid || valid[i] ?",
                                      "!valid || valid[i] || (PLANTED && p == PIXELS - 1) ?"),
    "the limit of the first class": ("confusion_matrix.cpp", "confidence[ids[p][l]]",
                                     "confidence[PLANTED ? 0 : ids[p][l]]"),
    "the last of 1,024 ids": ("confusion_matrix.cpp", "prediction_bytes, n);",
                              "prediction_bytes, n - (PLANTED && n == CHUNK));"),
    "sums of other labels": ("masked_cross_entropy.cpp", "      store(&label_sum[k",
                             "      if (!PLANTED) store(&label_sum[k"),
    "one denominator twice": ("masked_cross_entropy.cpp", "* denominator[p + 1]", "* denominator[p + !PLANTED]"),
    "valid is ignored": ("masked_cross_entropy.cpp", "valid ? valid->", "valid && !PLANTED ? valid->"),
    "all pixels are counted": ("masked_cross_entropy.cpp", "total[0] += selected",
                               "total[0] += PLANTED ? not_ignored : selected"),
    "a confidence is interpolated": ("masked_cross_entropy.cpp", "? p : pixels", "&& !PLANTED ? p : pixels"),
    "a confidence at its threshold": ("masked_cross_entropy.cpp", "compared[o] > cutoff",
                                      "(PLANTED ? compared[o] >= cutoff : compared[o] > cutoff)"),
}
CASES = [(error, device) for error, (file, *_) in ERRORS.items() for device in ("cpu", "cuda")
         if file == "exponentials.h" or (".cu" in file) == (device == "cuda")]
RUN = {"cpu": "from csrc import selfcheck; selfcheck.main('cpu')", "cuda": """
import os, pytest, torch, test_cuda_on_cpu as t
from csrc import selfcheck
seed = t.library("planted", "-O1", *os.environ["SEG_OPS_CFLAGS"].split()).cuda_on_cpu_seed
t.use(pytest.MonkeyPatch(), t.Schedules(torch.ops.planted, seed, 1))
selfcheck.check("cpu", repeats=False)"""}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is needed, with all errors; the environment variable PLANTED is the number of one, or -1."""
    tree = tmp_path_factory.mktemp("planted")
    for folder in ("csrc", "common", "tests"):
        shutil.copytree(ROOT / folder, tree / folder)
    for number, (file, old, new) in enumerate(ERRORS.values()):
        text = (tree / "csrc" / file).read_text()
        assert text.count(old) == 1, old
        (tree / "csrc" / file).write_text(text.replace(old, new.replace("PLANTED", f"(planted == {number})")))
    number = 'static const int planted = std::atoi(std::getenv("PLANTED"));'
    (tree / "planted.h").write_text(f"#include <cstdlib>\n{number}\n")
    return tree


@pytest.mark.parametrize("error, device", [("", "cpu"), ("", "cuda"), *CASES])
def test_selfcheck_finds(tree, error, device):
    env = {"TORCH_EXTENSIONS_DIR": str(tree / "cache"), "SEG_OPS_CFLAGS": f"-O1 -include {tree}/planted.h",
           "PYTHONPATH": f"{tree}:{tree}/tests", "PLANTED": str(list(ERRORS).index(error) if error else -1)}
    done = subprocess.run([sys.executable, "-c", RUN[device]], cwd=tree, env=os.environ | env, capture_output=True,
                          text=True)
    print(done.returncode, done.stderr.rpartition("csrc.selfcheck.")[2][:200])
    assert done.returncode < 0 or "\ncsrc.selfcheck.Mismatch: " in done.stderr if error else done.returncode == 0, done
