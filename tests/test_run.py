"""A training run's log, warnings, files and flags."""

import pytest
import torch
from PIL import Image

import model
import train_semi
from common import console, layouts
from common.args import resolve_args
from common.run import HealthyRange, range_warnings

QUICK = pytest.mark.quick


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def broken(f):
        f.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(console.InputError, match="a.txt: .*No space left"):
        console.write_atomically(target, broken)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@QUICK
@pytest.mark.parametrize("name, values, warned", [
    ("loss_d", [0.2] * 30, [10]), ("loss_d", [0.22] * 9 + [0.3] + [0.22] * 9, []), ("loss_d", [0.69] * 30, []),
    ("loss_d", [0.3] * 5 + [0.8] * 10 + [0.3] + [0.2] * 10, [15, 26]), ("kept", [0.02, 0.98] * 15, []),
    ("kept", [1] * 30, [30])])
def test_warnings_of_an_unhealthy_scalar(name, values, warned):
    """Once, at the tenth row in a row; rows alone decide, so that a resumed run warns too. kept: after its start."""
    # under smoothing 0.1 the loss of a discriminator that always wins is 0.163
    healthy = {"loss_d": model.healthy_loss_d(0.1), "kept": HealthyRange(0.01, 0.99, "raise it", "lower it", 20)}
    rows = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    warnings = [(n, line) for n in range(1, len(rows) + 1) for line in range_warnings(rows[:n], healthy)]
    assert [n for n, _ in warnings] == warned and all(name in line for _, line in warnings)


def test_no_checkpoint_of_a_run_that_diverged(train, tmp_path):
    """At steps that are not logged too: --resume would continue from it."""
    with pytest.raises(console.InputError, match="at step 2"):
        train("train_base", "--lr", 1e30, "--iters", 6, "--log-every", 6, "--eval-every", 6, "--save-every", 2)
    assert not (tmp_path / "out/last.pt").exists()


def test_an_earlier_run_is_not_lost(train, tmp_path, capsys):
    first = (train("train_base", "--seed", 1, "--iters", 1) / "log.jsonl").read_text()
    train("train_base", "--seed", 2, "--iters", 1)
    assert (tmp_path / "out/earlier-1/log.jsonl").read_text() == first and "earlier-1" in capsys.readouterr().out
    assert (tmp_path / "out/earlier-1/last.pt").exists() and (tmp_path / "out/log.jsonl").read_text() != first


@QUICK
@pytest.mark.parametrize("size, crop, scale", [((250, 170), 161, 1), ((90, 80), 81, 1), ((500, 375), 161, 0.5),
                                               ((480, 200), 97, 0.5), ((4000, 3000), 161, 0.25), ((40, 30), 65, 1)])
def test_defaults_of_an_own_folder(tmp_path, monkeypatch, size, crop, scale):
    """Without CUDA small ones, named in the first line unless a flag is given; with CUDA the paper's."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for n in range(5):
        for folder, mode in (("images", "RGB"), ("labels", "L")):
            Image.new(mode, size if n % 2 else size[::-1]).save(tmp_path / folder / f"{n}.png")

    def resolve(*words, cuda=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        args, dataset = train_semi.flags().parse_args(words), layouts.open_dataset(str(tmp_path))
        resolve_args(args, dataset, model.init_format, {"lam_semi": 0.1}, {"lam_semi": 0.5})
        return [args.backbone, args.crop, args.input_scale, args.iters, args.lam_semi], dataset.note
    found, note = resolve()
    assert found == ["efficientnet_lite0", crop, scale, 1000, 0.5] and f"--crop {crop}" in note
    found, note = resolve("--crop", "97", "--iters", "7", "--backbone", "resnet18")
    assert found == ["resnet18", 97, scale, 7, 0.5] and "--crop" not in note and "--backbone" not in note
    assert resolve("@recipes/paper_voc_semi.txt")[0] == ["resnet101", 321, scale, 20000, 0.1]
    found, note = resolve(cuda=True)
    assert found == ["resnet101", 321, 1, 20000, 0.1] and "CUDA" not in note


