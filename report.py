"""An HTML page about one or several runs: flags, curves, IoU per class, confusion, and images to look at.

    python report.py out/base out/semi --out page.html
"""
import importlib
import itertools
import json
from pathlib import Path

from common.args import NON_NEGATIVE_INT, Parser
from common.checkpoint import read_checkpoint
from common.console import InputError, launch, write_atomically
from common.layouts import IGNORE, open_dataset
from common.pages import data_uri, embed_image, render
from common.run import announce

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure

import data
import model
import predict
from csrc import ops
from eval import class_scores, evaluate

SHOWN = 4    # of the best images, of the worst, and of those where the runs differ most
GREY = [x // 3 for x in range(768)]  # a palette
STYLES = {"light": "default", "dark": "dark_background"}  # of matplotlib, for either kind of page


def flags():
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="OUT", help="output folder of a training run")
    p.add_argument("--out", required=True, metavar="FILE", help="the page, one file")
    p.add_argument("--data", metavar="ROOT", help="data set to predict (default: that of the first run)")
    p.add_argument("--list", default="val", help="name of a list in ROOT, or a file of ids, one a line (default val)")
    p.add_argument("--workers", type=NON_NEGATIVE_INT, default=2, help="worker processes of the loader (default 2)")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    return p


class TrainedRun:
    """The files of a training run and what its model predicts; an InputError if the folder has none."""

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name
        try:
            self.facts = json.loads((self.folder / "run.json").read_text())
            lines = (self.folder / "log.jsonl").read_text().splitlines()
            self.rows = [json.loads(line) for line in lines if line[-1:] == "}"]  # not one that is being written
            self.script_images = find_report_images(self.facts.get("script", ""))
        except (OSError, ValueError, AttributeError) as e:
            raise InputError(f"{folder}: no run.json and log.jsonl there ({e}); name the --out of a run") from None
        self.checkpoint = read_checkpoint(last := self.folder / "last.pt", "OUT")
        self.seg, self.step = model.load_segmenter(last, self.checkpoint), self.checkpoint["step"]
        self.classes, self.flags = self.seg.classes, self.checkpoint["args"]
        self.minutes = self.checkpoint.get("minutes")

    def predict(self, samples, workers, device):
        """Predict all samples; keep the ids (n,) of every 16th labelled pixel and the mIoU of each sample."""
        self.ids, matrices = [], []

        def collect(_, ids, target):
            self.ids.append(ids[target != IGNORE][::16].cpu())
            matrices.append(ops.confusion_matrix(ids[None], target[None], self.seg.num_classes).cpu())
        result = evaluate(self.seg.to(device), samples, workers, self.flags.get("amp"), write=collect)
        self.miou, self.matrix = result.scores["miou"], result.matrix
        self.per_class = {name: 100 * values for name, values in class_scores(result.matrix).items()}  # (K,) percent
        self.accuracy = result.pixel_accuracy()
        self.scores = np.array([100 * ops.mean_iou(matrix)[0] for matrix in matrices])

    @torch.inference_mode()
    def figures(self, i, sample, size, palette, device):
        """Yield (caption, data URI) of the prediction of sample i and of the images that the run's script adds."""
        pixels, target = data.EvalDataset([sample], self.seg.stride, self.seg.input_scale)[0]
        logits = predict.predict_logits(self.seg, pixels[None], self.flags.get("amp"))
        maps = {f"{self.scores[i]:.1f}": ops.upsample_argmax(logits, target.shape)[0]}
        if self.script_images:
            maps |= self.script_images(self.checkpoint, pixels, logits, (target[None] != IGNORE).to(device))
        for title, x in maps.items():
            x, colours = (x, palette) if x.dtype == torch.uint8 else ((255 * x.float()).byte(), GREY)
            yield f"{self.name}: {title}", embed_image(predict.palette_image(x.cpu(), size, colours))


def find_report_images(script):
    """Return the function report_images of a training script beside this file (a plain file name), or None.

    report_images(parts, image, logits, valid) -> {title: (H,W) array}: uint8 arrays are class ids, floating-point ones
    are in 0..1. parts: the checkpoint dict; image: (3,h,w) uint8; logits: (1,K,h,w); valid: (1,H,W) bool.
    """
    name = Path(script).stem
    is_ours = script == f"{name}.py" and name.isidentifier() and (Path(__file__).parent / script).is_file()
    return getattr(importlib.import_module(name), "report_images", None) if is_ours else None


def curves(runs):
    """Yield (column, "light" or "dark", data URI) for each column of the logs; a band is the healthy range."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    names = [name for name in names if name not in ("step", "lr", "per_class")]
    for name, scheme in itertools.product(sorted(names, key=lambda name: name != "miou"), STYLES):
        with matplotlib.style.context([STYLES[scheme], {"savefig.transparent": True, "font.size": 9}]):
            figure = Figure(figsize=(5, 2.6), layout="constrained")
            axes = figure.subplots()
            for run in runs:
                rows = [row for row in run.rows if name in row]
                line = "-" if len(rows) > len(run.rows) / 2 else ".-"  # scores have fewer points
                axes.plot([row["step"] for row in rows], [row[name] for row in rows], line, label=run.name)
                if rows and name in (healthy := run.facts.get("healthy", {})):
                    axes.axhspan(*healthy[name][:2], alpha=0.15 / len(runs), color="tab:green", lw=0)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.legend()
            yield name, scheme, data_uri("svg+xml", lambda file: figure.savefig(file, format="svg"))


def choose_images(runs, samples, palette, device):
    """Return (title, rows) of the worst and best images and those where the runs differ most; a row: (id, figures)."""
    means, difference = np.mean([run.scores for run in runs], 0), np.zeros(len(samples))
    for one, two in itertools.combinations(runs, 2):
        difference = np.maximum(difference, [(a != b).float().mean() for a, b in zip(one.ids, two.ids)])
    order = [i for i in np.argsort(means) if not np.isnan(means[i])]
    groups = [("Worst", order[:SHOWN]), ("Best", order[::-1][:SHOWN]),
              ("Where the runs differ most", np.argsort(-difference)[:SHOWN])][:3 if len(runs) > 1 else 2]

    def row(i):
        image = data.read_image(samples[i].image)
        label = data.read_label(samples[i].label, image.size)
        yield "image", embed_image(image, "jpeg", quality=80)
        yield "label", embed_image(predict.palette_image(label, image.size, palette))
        for run in runs:
            yield from run.figures(i, samples[i], image.size, palette, device)
    return [(title, [(samples[i].id, list(row(i))) for i in chosen]) for title, chosen in groups]


def main(args):
    out, names = Path(args.out), [Path(folder).resolve().name for folder in args.runs]
    names = names if len(names) == len(set(names)) else args.runs
    runs = [TrainedRun(folder, name) for folder, name in zip(args.runs, names)]
    classes = runs[0].classes
    if other := [run.folder for run in runs if run.classes != classes]:
        raise InputError(f"{other[0]}: has other classes than {runs[0].folder}; make a page of each")
    if not args.out or out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file, such as page.html")
    dataset = open_dataset(args.data or runs[0].flags.get("data"))
    samples = dataset.samples(dataset.ids(args.list))
    note = dataset.note + predict.check_classes(classes, dataset, runs[0].folder)
    device = announce(f"{note}data {dataset.name}: {len(samples)} images of list {args.list}", args.gpu, ops.describe)
    for run in runs:
        run.predict(samples, args.workers, device)
    varied = [name for name in sorted({name for run in runs for name in run.flags} - {"out", "palette", "resume"})
              if len({str(run.flags.get(name, "")) for run in runs}) > 1]
    page = render(
        "report.html", runs=runs, classes=classes, varied=varied, data=dataset.name, list=args.list,
        count=len(samples), curves=list(curves(runs)),
        colours=[dataset.palette[3 * k:3 * k + 3] for k in (*range(len(classes)), IGNORE)],
        groups=choose_images(runs, samples, dataset.palette, device))
    write_atomically(out, lambda file: file.write_text(page))
    print(f"{out}: {len(page) / 1e6:.1f} MB, {len(runs)} runs, {len(samples)} images")


if __name__ == "__main__":
    launch(main, flags)
