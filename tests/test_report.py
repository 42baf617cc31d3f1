"""report.py: a page of what runs logged and what their models predict, which needs no other file."""
import html
import re
import shutil

from common import layouts

import pytest
import torch
from conftest import SMALL, call, load

import data
import model
import predict
import report
from csrc import ops
from eval import class_scores


@pytest.fixture(scope="module")
def page(trained, blocks, tmp_path_factory):
    """The page of three runs, of which one shrinks and pads its images differently."""
    folder = tmp_path_factory.mktemp("report")
    call("train_adv", "--data", blocks, *SMALL, "--iters", 1, "--input-scale", 0.5, "--out", folder / "adv")
    runs = trained["train_base"], trained["train_semi"], folder / "adv"
    call("report", *runs, "--out", folder / "page.html", "--gpu", -1, "--workers", 0)
    return folder / "page.html"


def test_what_is_on_the_page(page, trained, blocks):
    """Curves, flags, images, and scores that are those of the checkpoint; nothing is loaded from elsewhere."""
    text = html.unescape(page.read_text())
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)|https?://(?!www\.w3\.org)|@import|url\(", text)
    seg, dataset = model.load_segmenter(trained["train_semi"] / "last.pt"), layouts.open_dataset(blocks)
    samples = dataset.samples(dataset.ids("val"))
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    for image, target in data.EvalDataset(samples, seg.stride, seg.input_scale):
        ops.confusion_matrix(predict.predict_logits(seg, image[None]), target[None], out=matrix)
    for truth, row in zip(seg.classes, matrix):
        for guess, n in zip(seg.classes, row):
            assert f"{truth} taken for {guess}: {n:,} pixels\">{100 * n / max(1, row.sum()):.1f}</td>" in text
    assert f"<td>{100 * ops.mean_iou(matrix)[0]:.2f}</td>" in text
    for values in class_scores(matrix).values():
        assert all(f"<td>{100 * x:.2f}</td>" in text for x in [*values, values.nanmean()] if x == x)
    for words in ("<figcaption>loss_d<", "<figcaption>kept<", "loss_adv_u", "--lam-semi", "pseudo-labels<"):
        assert words in text, words
    assert text.count("train_semi: discriminator's confidence</figcaption>") == 3 * min(report.SHOWN, len(samples))


def test_bad_runs(fails, trained, voc, tmp_path):
    run, page = trained["train_base"], tmp_path / "page.html"
    assert f"--out {tmp_path}" in fails("report", run, "--out", tmp_path, "--gpu", -1)
    (voc / "classes.txt").write_text("grey\nred\ngreen\n")
    assert "4 classes" in fails("report", run, "--data", voc, "--out", page, "--gpu", -1)
    out = shutil.copytree(run, tmp_path / "run")
    torch.save(load(out) | {"classes": ["a", "b", "c", "d"]}, out / "last.pt")
    assert f"{out}: has other classes" in fails("report", run, out, "--out", page, "--gpu", -1)
    (out / "last.pt").unlink()
    assert "last.pt" in fails("report", out, "--out", page, "--gpu", -1)
    (out / "run.json").write_text('{"args')
    assert "run.json" in fails("report", out, "--out", page, "--gpu", -1)
    (out / "log.jsonl").unlink()
    assert "log.jsonl" in fails("report", out, "--out", page, "--gpu", -1)
    assert not page.exists()


@pytest.mark.quick
def test_a_run_cannot_bring_code(tmp_path, monkeypatch):
    """Only the plain name of a file beside report.py is imported."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for script in ("evil.py", "../evil.py", str(tmp_path / "evil.py"), "", "evil", "tests/conftest.py"):
        assert report.find_report_images(script) is None


