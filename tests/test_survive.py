"""tests/stress/survive.py in a short form."""
import re

import pytest
from conftest import ROOT, python


@pytest.mark.parametrize("share, kinds", [(0.2, "pictures"), (0.05, "operators"),
                                          (0.02, "checkpoints wrong_flags full_disk kills"), (0.02, "signals")])
def test_nothing_is_lost(share, kinds):
    done = python(ROOT / "tests/stress/survive.py", "--share", share, "--seed", 1, "--kinds", *kinds.split())
    lines = re.findall(r"^(\w+(?: \w+)?) +tried +(\d+) .* lost +0 ", done.stdout, re.M)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and [name.replace(" ", "_") for name, _ in lines] == kinds.split(), said
    enough = {"pictures": 400, "operators": 25, "checkpoints": 6, "wrong flags": 18, "kills": 2, "signals": 4,
              "full disk": 0 if "mounting a tmpfs is not allowed" in said else 2}
    assert all(int(tried) >= enough[name] for name, tried in lines), said
