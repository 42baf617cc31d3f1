"""What needs packages that are optional: the page in a browser, ONNX, TensorBoard.

    pip install playwright tensorboard onnx onnxscript onnxruntime    (and apt install chromium)
    python -m pytest tests/stress/optional.py
"""
import shutil

import numpy as np
import pytest
import torch
from conftest import Killed, call, interrupt, log
from test_predict import differing_pixels
from test_report import page  # noqa: F401


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium: apt install chromium")
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1400, "dark")])
def test_in_a_browser(page, width, scheme):  # noqa: F811
    """No error, all images load, no sideways scrolling, tables sort by a click and by a key."""
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
        shown = "[...document.querySelectorAll('.plots figure')].filter(f => f.offsetHeight).map(f => f.className)"
        assert {*tab.evaluate(shown)} == {scheme}
        head = tab.locator("h2:text('Classes') ~ div table.sorted >> nth=0").locator("th button").nth(1)
        column = "[...document.querySelectorAll('.sorted')[1].tBodies[0].rows].map(r => r.cells[1].textContent)"
        before = tab.evaluate(column)
        for press, reverse in ((head.click, False), (lambda: head.press("Enter"), True)):
            press()
            assert tab.evaluate(column) == sorted(before, key=float, reverse=reverse)
        browser.close()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium: apt install chromium")
def test_the_ranking_in_a_browser(trained, blocks, tmp_path):
    """No error, all images load, no sideways scrolling, a click enlarges an image and another closes it."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    call("predict", "--ckpt", trained["train_base"] / "last.pt", blocks / "JPEGImages", "--out", tmp_path, "--gpu", -1,
         "--rank")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for width in (390, 1400):
            tab, said = browser.new_page(viewport=dict(width=width, height=800)), []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto((tmp_path / "ranking.html").as_uri())
            broken = tab.evaluate("[...document.querySelectorAll('li img')].filter(i => !i.naturalWidth).length")
            assert not said and broken == 0 and tab.locator("li img").count() == 30
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.locator("li button").nth(1).click()
            assert tab.locator("dialog img").get_attribute("src") == tab.locator("li img").nth(1).get_attribute("src")
            tab.locator("dialog img").click()
            assert not tab.locator("dialog").is_visible() and not said
        browser.close()


def test_onnx(trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    call("export", "--ckpt", trained["train_base"] / "last.pt", "--out", tmp_path / "net.onnx")
    net = runtime.InferenceSession(tmp_path / "net.onnx")
    run = lambda x: torch.from_numpy(net.run(None, {"images": x.numpy()})[0])  # noqa: E731
    assert differing_pixels(run, trained["train_base"] / "last.pt") < 1e-3
    assert "red" in net.get_modelmeta().custom_metadata_map["classes.json"]


def test_tensorboard(train, tmp_path):
    """What log.jsonl has, and images; --resume voids what is of later steps."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    words = "--iters", 6, "--eval-every", 3, "--save-every", 3, "--tensorboard"
    with pytest.raises(Killed), interrupt("step 5/", Killed):
        train("train_semi", *words)
    out = train("train_semi", *words, "--resume")
    found = events.EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss_ce", "kept", "miou"):
        want = [(row["step"], row[name]) for row in log(out) if name in row]
        got = [(e.step, e.value) for e in found.Scalars(name)]
        assert [s for s, _ in got] == [s for s, _ in want] and np.allclose([v for _, v in got], [v for _, v in want])
    strips = found.Images("examples")
    assert [e.step for e in strips] == [3, 6] and strips[0].width == 720
    train("train_base", "--iters", 1)
    assert (tmp_path / "out/earlier-1/tensorboard").is_dir() and not (tmp_path / "out/tensorboard").exists()
