"""What watches a run: warnings where figures are not healthy, and --tensorboard."""
import math

import numpy as np
import torch

import data
import predict
from cli import InputError
from csrc import ops

# what a healthy run logs, and what to try where it leaves that for long
HEALTHY = {
    "loss_d": (0.05, 0.7, "near 0 D always wins and starves the other losses: try a smaller --d-lr or --d-smooth 0.1"),
    "kept": (0.01, 0.99, "the share of unlabelled pixels taught: --threshold (see loss_d) or --confidence moves it"),
}
PATIENCE = 10  # logged steps in a row before a warning
SHOWN = 4  # pictures of val in a strip


def healthy(name, args):
    """What the figure `name` is between in a run of `args` that goes well, and what to try where it is not."""
    (low, high, advice), smooth = HEALTHY[name], getattr(args, "d_smooth", 0)
    if name == "loss_d" and smooth:  # smoothed labels keep half their entropy in the loss of a D that always wins
        low -= (smooth * math.log(smooth) + (1 - smooth) * math.log(1 - smooth)) / 2
    return low, high, advice


def warnings(rows, args):
    """A line for each figure that the last row is the PATIENCE-th in a row to have outside what is healthy."""
    start = getattr(args, "semi_start", getattr(args, "u_start", 0))
    for name in HEALTHY:
        low, high, advice = healthy(name, args)
        values = [r[name] for r in rows[-PATIENCE - 1:] if name in r and (name != "kept" or r["step"] > start)]
        ill = [not low <= value <= high for value in values]
        if len(ill) >= PATIENCE and all(ill[-PATIENCE:]) and ill[:-PATIENCE] != [True]:
            yield f"warning: {name} was outside {low:.2g}..{high:g} at {PATIENCE} logged steps in a row; {advice}"


class Board:
    """A run's writer for TensorBoard. Errors: InputError where that is not installed."""

    def __init__(self, dataset, args):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard: tensorboard is not installed; pip install tensorboard") from None
        self.samples, self.palette, self.args = dataset.samples(dataset.ids("val"))[:SHOWN], dataset.palette, args
        self.make = SummaryWriter

    def open(self, folder, done):
        """Write to `folder` from here on; what it has of steps behind `done` is void."""
        self.writer = self.make(folder, purge_step=done + 1)

    def figures(self, step, row):
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    @torch.inference_mode()
    @torch.compiler.set_stance("force_eager")  # sizes vary
    def strip(self, step, seg, device):
        """Draw what `seg` says of the first pictures of val."""
        rows, was_training = [], seg.training
        seg.eval()
        for path, label in self.samples:
            picture = data.read_picture(path)
            pixels, size = data.for_net(picture, self.args)
            ids = ops.upsample_argmax(predict.logits(seg, pixels[None], self.args, device), size)[0].cpu()
            maps = data.read_label(label, picture.size), ids
            rows.append((picture, *(predict.palette_png(x, picture.size, self.palette) for x in maps)))
        seg.train(was_training)
        self.writer.add_image("picture, label, prediction", np.asarray(predict.overview(rows)), step, dataformats="HWC")
