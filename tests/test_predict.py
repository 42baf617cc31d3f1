"""predict.py: logits of large images and of several views, and what the command reads and writes."""
import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import predict


class Points(torch.nn.Module):
    """A network whose logits are the colours at every 16th pixel."""

    stride = 16

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # which tells the device

    def forward(self, x):
        return x[:, :, ::16, ::16].float() / 50


class Sided(Points):
    """Points, but finding more of the first class the further right it looks."""

    def forward(self, x):
        logits = super().forward(x)
        logits[:, 0] += torch.arange(logits.shape[3])
        return logits


@pytest.mark.quick
@pytest.mark.parametrize("size", [(161, 161), (65, 321), (337, 97), (65, 65), (97, 81)])
@pytest.mark.parametrize("window", [65, 70, 97, 2049])
def test_windows_are_the_whole(size, window):
    """Where a logit depends on what lies at its place, and every picture is covered."""
    pixels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen, net = [], Points()
    net.register_forward_hook(lambda net, x, y: seen.append(x[0].shape[2:]))
    got = predict.predict_logits(net, pixels, False, window)
    torch.testing.assert_close(got, predict.predict_logits(Points(), pixels, False))
    assert max(max(s) for s in seen) <= max(window, 65) and (len(seen) > 1) == (max(size) > window)


@pytest.mark.quick
def test_views_are_averaged():
    """As probabilities; mirrored pictures give mirrored logits, and one colour what it gives alone."""
    pixels = torch.randint(0, 256, (1, 3, 129, 193), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen, net = [], Points()
    net.register_forward_hook(lambda net, x, y: seen.append(tuple(x[0].shape[2:])))
    got = predict.predict_logits(net, pixels, False, tta=True)
    assert sorted(seen) == [(97, 145)] * 2 + [(129, 193)] * 2 + [(161, 241)] * 2
    torch.testing.assert_close(got.exp().sum(1), torch.ones(1, 9, 13))
    one, two = (predict.predict_logits(Sided(), x, False, tta=True) for x in (pixels, pixels.flip(3)))
    torch.testing.assert_close(one, two.flip(3))
    plain = predict.predict_logits(Points(), pixels, False)
    assert not torch.allclose(got, plain.log_softmax(1), atol=0.01)
    one = torch.full_like(pixels, 7)
    got = predict.predict_logits(Points(), one, False, tta=True)
    torch.testing.assert_close(got, torch.full((1, 3, 9, 13), 1 / 3).log())


def test_folders_and_turned_images(seeing, tmp_path, fails):
    ckpt, rng = seeing["train_base"] / "last.pt", np.random.RandomState(0)
    (tmp_path / "in/deep").mkdir(parents=True)
    picture = Image.fromarray(rng.randint(0, 255, (9, 14, 3), np.uint8).repeat(10, 0).repeat(10, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be shown turned by 90 degrees
    picture.save(tmp_path / "in/deep/turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "in/upright.png")
    (tmp_path / "in/notes.txt").write_text("no picture")
    words = "--ckpt", ckpt, "--gpu", -1
    call("predict", *words, tmp_path / "in", "--out", tmp_path / "out", "--blend")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "legend.png", "turned.png", "turned_blend.jpg", "upright.png", "upright_blend.jpg"]
    one, two = (np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in ("turned", "upright"))
    assert one.shape == (140, 90) and (one == two).all() and (one != one[::-1, ::-1]).any()
    blend = np.asarray(Image.open(tmp_path / "out/turned_blend.jpg")).astype(float)
    upright = np.asarray(Image.open(tmp_path / "in/upright.png")).astype(float)
    colours = np.asarray(Image.open(tmp_path / "out/turned.png").convert("RGB")).astype(float)
    assert abs(blend - 0.5 * upright - 0.5 * colours).mean() < 12  # JPEG's losses on noise
    call("predict", *words, tmp_path / "in/upright.png", "--out", tmp_path / "one", "--window", 65, "--tta")
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == ["legend.png", "upright.png"]
    picture.save(tmp_path / "legend.jpg")
    assert "legend.png" in fails("predict", *words, tmp_path / "legend.jpg", "--out", tmp_path / "no")
    picture.save(tmp_path / "in/[1].png")
    picture.save(tmp_path / "in/._upright.png")  # as a Mac leaves them
    picture.save(tmp_path / "in/broken.jpg")
    (tmp_path / "in/broken.jpg").write_bytes((tmp_path / "in/broken.jpg").read_bytes()[:-99])
    found = [f.name for f in predict.find_images([tmp_path / "in"])]
    assert found == ["[1].png", "broken.jpg", "turned.png", "upright.png"]
    assert "broken.jpg" in fails("predict", *words, tmp_path / "in/broken.jpg", "--out", tmp_path / "no")
    assert "in/upright.png" in fails("predict", *words, tmp_path / "in/upright.png", "--out", tmp_path / "in")
    picture.save(tmp_path / "in/deep/one_blend.jpg")
    picture.save(tmp_path / "in/deep/one.jpg")
    one = tmp_path / "in/deep/one.jpg", tmp_path / "in/deep/one_blend.jpg", "--out", tmp_path / "in/deep"
    assert "deep/one_blend.jpg" in fails("predict", *words, *one, "--blend")
    for nothing in (tmp_path / "out/none*.jpg", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert nothing.name in fails("predict", *words, nothing, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.quick
def test_a_legend_names_every_class():
    names, palette = ["sky", "road", "tree"], [10, 200, 30, 250, 0, 0, 0, 0, 99]
    image = np.asarray(predict.draw_legend(names, palette))
    assert all((image == palette[3 * k:3 * k + 3]).all(2).sum() > 200 for k in range(3))
