"""tests/survive.py in a short form."""
import re

from conftest import ROOT, python


def test_nothing_is_lost():
    done = python(ROOT / "tests/survive.py", "--share", 0.02, "--seed", 1)
    lines = re.findall(r"^(\w+(?: \w+)?) +tried +(\d+) .* lost +0 ", done.stdout, re.M)
    assert done.returncode == 0 and len(lines) == 6, done.stdout + done.stderr
    assert int(dict(lines)["pictures"]) == 40
