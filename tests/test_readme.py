"""The README's commands, to the letter, but with small networks and few steps."""
import shutil

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, call

import prepare


def commands():
    """The words of every python command in README.md's blocks, but for those that install or test."""
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()[1:]]
    found = [part.split() for line in lines for part in line.split(" && ")]
    return [words[1:] for words in found if words[:1] and words[0].endswith("python") and words[1] != "-m"]


def test_the_readmes_commands(blocks, tmp_path, monkeypatch):
    """In its order, in a fresh folder: each uses what those before it left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(blocks, "mine")
    (tmp_path / "mine/ImageSets").rename(tmp_path / "lists")  # the user's own data has none
    for name in ("holiday", "more_images"):
        shutil.copytree(blocks / "JPEGImages", name)
    for script, *words in commands():
        words = [str(blocks) if word in ("ROOT", "shapes") else word for word in words]
        if script == "prepare.py":
            with pytest.raises(SystemExit) as end:
                prepare.main(prepare.flags().parse_args(words))
            assert not end.value.code
        elif script.startswith("train"):
            call(script[:-3], *words, *SMALL)
        else:
            call(script[:-3], *words, *([] if script == "export.py" else ["--gpu", -1]))
    scripts = *SCRIPTS, "eval", "predict", "report", "export", "prepare"
    assert {words[0] for words in commands()} >= {f"{name}.py" for name in scripts}
    assert (tmp_path / "page.html").stat().st_size > 100_000 and (tmp_path / "predictions/legend.png").exists()
    assert torch.export.load("model.pt2").module()(torch.zeros(1, 3, 50, 40, dtype=torch.uint8)).shape == (1, 50, 40)
