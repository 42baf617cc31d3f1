"""tests/stress/survive.py in a short form."""
import re

import pytest
from conftest import ROOT, python


@pytest.mark.parametrize("share, kinds", [(0.2, "pictures"), (0.05, "operators"),
                                          (0.02, "checkpoints wrong_flags full_disk kills"), (0.02, "signals")])
def test_nothing_is_lost(share, kinds):
    done = python(ROOT / "tests/stress/survive.py", "--share", share, "--seed", 1, "--kinds", *kinds.split())
    names = re.findall(r"^(\w+(?: \w+)?) +tried +\d+ .* lost +0 ", done.stdout, re.M)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name.replace(" ", "_") for name in names] == kinds.split()
