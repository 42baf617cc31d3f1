"""report.py: a page that holds what the runs logged and what their nets predict, and needs no other file."""
import html
import re
import shutil

import pytest
import torch
from conftest import call
from PIL import Image

import data
import model
import predict
import report
from common import console, layouts
from csrc import ops


@pytest.fixture(scope="module")
def page(seeing, blocks, tmp_path_factory):
    """Of three of the runs of three steps, with what was found on the way."""
    out = tmp_path_factory.mktemp("report") / "page.html"
    call("report", *(seeing[script] for script in ("train_base", "train_semi", "train_match")), "--out", out,
         "--gpu", -1, "--workers", 0)
    return out


def test_what_is_on_the_page(page, seeing, blocks):
    text = html.unescape(page.read_text())
    assert not re.search(r"(?:src|href|srcset)=\"(?!data:)|https?://(?!www\.w3\.org)|@import|url\(", text)
    checkpoint = torch.load(seeing["train_semi"] / "last.pt", weights_only=True)
    seg, samples = model.load_segmenter(seeing["train_semi"] / "last.pt"), layouts.open_dataset(blocks)
    samples = samples.samples(samples.ids("val"))
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    for image, target in data.EvalDataset(samples, seg.stride, seg.input_scale):
        ops.confusion_matrix(predict.predict_logits(seg, image[None]), target[None], out=matrix)
    for truth, row in zip(checkpoint["classes"], matrix):
        for guess, n in zip(checkpoint["classes"], row):
            assert f"{truth} taken for {guess}: {n:,} pixels\">{100 * n / max(1, row.sum()):.1f}</td>" in text
    assert f"<td>{100 * ops.mean_iou(matrix)[0]:.2f}</td>" in text
    for words in ("mIoU, %", "<figcaption>loss_d<", "<figcaption>kept<", "loss_u", "--lam-semi", "pseudo-labels<",
                  "Where the runs differ most", "train_match: ", "grey", "prefers-color-scheme: dark"):
        assert words in text, words
    assert text.count("train_semi: discriminator's confidence</figcaption>") == 3 * min(report.SHOWN, len(samples))


def test_nets_of_different_strides(train, tmp_path, voc):
    """Pictures whose padding depends on the net, and a data set of other classes."""
    for folder in ("JPEGImages", "SegmentationClassAug"):
        for file in (voc / folder).glob("val*.png"):
            Image.open(file).crop((0, 0, 75, 60)).save(file)
    one, two = train("train_base"), train("train_adv", "--input-scale", 0.5, out="two")
    call("report", one, two, "--out", tmp_path / "page.html", "--gpu", -1, "--workers", 0)
    text = (tmp_path / "page.html").read_text()
    assert "Where the runs differ most" in text and "confidence</fig" not in text
    (voc / "classes.txt").write_text("grey\nred\ngreen\n")
    with pytest.raises(console.InputError, match="4 classes, .* has 3"):
        call("report", one, "--out", tmp_path / "page.html", "--gpu", -1)


@pytest.mark.parametrize("spoil, say", [
    (lambda out: shutil.rmtree(out), "run.json"),
    (lambda out: (out / "log.jsonl").unlink(), "log.jsonl"),
    (lambda out: (out / "run.json").write_text('{"args'), "run.json"),
    (lambda out: (out / "last.pt").unlink(), "last.pt"),
    (lambda out: torch.save(torch.load(out / "last.pt") | {"classes": ["a", "b", "c", "d"]}, out / "last.pt"),
     "has other classes than")])
def test_bad_runs(fails, seeing, tmp_path, spoil, say):
    out = shutil.copytree(seeing["train_base"], tmp_path / "run")
    spoil(out)
    assert say in fails("report", seeing["train_base"], out, "--out", tmp_path / "page.html", "--gpu", -1)
    assert not list(tmp_path.glob("page*"))
    assert "name a file" in fails("report", seeing["train_base"], "--out", tmp_path, "--gpu", -1)


@pytest.mark.quick
def test_a_run_cannot_bring_code(tmp_path, monkeypatch):
    """Only the plain name of a file beside report.py is imported."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for script in ("evil.py", "../evil.py", str(tmp_path / "evil.py"), "", "evil", "tests/conftest.py", "train_base"):
        assert report.find_report_images(script) is None
    assert report.find_report_images("train_semi.py") and report.find_report_images("train_base.py") is None


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium: apt install chromium")
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1400, "dark"), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in ((390, "dark"), (1400, "light")))])
def test_in_a_browser(page, width, scheme):
    """No error, all pictures load, no sideways scrolling, tables sort by a click and by a key."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        tab, said = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme), []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(page.as_uri())
        broken = tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        assert not said and broken == 0 and tab.evaluate("document.images.length") > 20
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        rows = "[...document.querySelectorAll('.images')].map(r => getComputedStyle(r).gridTemplateColumns)"
        assert all(len(columns.split()) == (2 if width == 390 else 6) for columns in tab.evaluate(rows))
        light = tab.evaluate("[...document.querySelectorAll('.plots img')].every(i => i.currentSrc == i.src)")
        assert light == (scheme == "light")
        heads = tab.locator("h2:text('Classes') ~ div table.sorted >> nth=0").locator("th button")
        column = "[...document.querySelectorAll('.sorted')[1].tBodies[0].rows].map(r => r.cells[1].textContent)"
        before = tab.evaluate(column)
        heads.nth(1).click()
        assert tab.evaluate(column) == sorted(before, key=float)
        heads.nth(1).press("Enter")
        assert tab.evaluate(column) == sorted(before, key=float, reverse=True)
        tab.keyboard.press("Shift+Tab")
        tab.keyboard.press("Space")
        assert tab.evaluate("document.querySelector('[aria-sort]').textContent") == "class"
        assert tab.evaluate("document.querySelectorAll('[aria-sort]').length") == 1
        browser.close()
