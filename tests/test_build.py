"""The build of the kernels: two processes at once, a build that was killed, a folder that cannot be written."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from csrc import build, ops

pytestmark = pytest.mark.skipif(not ops.in_use().startswith("kernel"), reason="no kernels can be built here")
LOAD = ("import torch; from csrc import build, ops; print(ops.in_use() + build.note);"
        "ids = torch.zeros(1, 3, 3, dtype=torch.uint8); print(ops.confusion_matrix(ids, ids, 2)[0, 0])")


def start(folder, **env):
    return subprocess.Popen([sys.executable, "-c", LOAD], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "SEG_OPS": "auto"} | env)


def test_killed_build_then_two_at_once_then_the_cache(tmp_path):
    first = start(tmp_path)
    while not list(tmp_path.glob("*/*.ninja")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("*/ready"))
    both = [start(tmp_path), start(tmp_path)]
    done = [p.communicate() for p in both]
    assert all(out.startswith("kernel") and out.endswith("\ntensor(9)\n") and not err for out, err in done), done
    assert sum(", built in" in out for out, _ in done) == 1
    assert start(tmp_path, CXX="no-such-compiler").communicate() == ("kernel\ntensor(9)\n", "")  # the cache needs none


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    out, _ = start(tmp_path / "file").communicate()
    assert out.startswith("reference (") and "file" in out.splitlines()[0] and out.endswith("tensor(9)\n")


def test_cache_knows_sources_flags_and_cpu(monkeypatch):
    here = build.folder()
    monkeypatch.setattr(build, "cpu", lambda: "another")
    assert build.folder() != here
