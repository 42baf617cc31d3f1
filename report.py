"""One page about one or several runs: what was run, curves, IoU of the classes, confusion, and pictures to look at.

    python report.py out/base out/semi --out page.html
"""
import argparse
import base64
import io
import itertools
import json
from pathlib import Path

import jinja2
import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure

import cli
import common
import data
import model
import predict
import watch
from csrc import ops
from eval import trust
from flags import WHOLE

WIDTH = 240  # of a picture on the page, in pixels
SHOWN = 4    # of the best pictures, of the worst, and of those where the runs differ most
SCORES = {"miou": "mIoU, %", "auc": "area under the ROC curve, of D, %", "precision": "right of the kept, %",
          "auc_net": "the area of the net's probability, %", "auc_both": "the area of the product of both, %"}
TITLES = SCORES | {"kept": "kept: unlabelled pixels taught, a share", "loss_d": "loss_d, healthy in the band"}


def flags():
    p = cli.Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="OUT", help="what a training wrote: run.json, log.jsonl, last.pt")
    p.add_argument("--out", required=True, metavar="FILE", help="the page, one file")
    p.add_argument("--data", metavar="ROOT", help="data set to look at; default: the first run's")
    p.add_argument("--list", default="val", help="list of ImageSets/Segmentation, or a file of ids (default val)")
    p.add_argument("--workers", type=WHOLE, default=2, help="loader processes (default 2); 0 loads in this process")
    p.add_argument("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    return p


class Run:
    """What a training left in its folder. Errors: InputError."""

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name
        try:
            self.facts = json.loads((self.folder / (file := "run.json")).read_text())
            lines = (self.folder / (file := "log.jsonl")).read_text().splitlines()
            self.rows = [json.loads(line) for line in lines if line[-1:] == "}"]  # not one that is being written
            self.rows[0]
        except (OSError, ValueError, IndexError) as e:
            what = "no" if isinstance(e, OSError) else "an empty or damaged"
            raise cli.InputError(f"{folder}: has {what} {file}; name the --out of a training") from None
        checkpoint = model.read_checkpoint(last := self.folder / "last.pt", "OUT")
        self.seg = model.build_segmenter(checkpoint, last)
        self.classes, self.step = checkpoint["classes"], checkpoint["step"]
        self.flags, self.disc = checkpoint["args"], None
        self.args = argparse.Namespace(**self.flags, window=predict.WINDOW)
        if checkpoint["disc"]:
            self.disc = model.Discriminator(len(self.classes)).eval()
            model.load_weights(self.disc, checkpoint["disc"], f"OUT {last}")
        self.minutes = (last.stat().st_mtime - (self.folder / "run.json").stat().st_mtime) / 60

    @torch.inference_mode()
    def look(self, samples, args, device):
        """Predict all samples: each one's confusion matrix (K,K), and the ids (n,) of every 16th labelled pixel."""
        pairs = data.loader(data.Whole(samples, self.args), args.workers, batch_size=1)
        self.ids, self.matrices = [], []
        for picture, target in cli.progress(pairs, len(samples), self.name):  # (1,3,h,w), (1,H,W) uint8
            logits = predict.logits(self.seg.to(device), picture, self.args, device)
            ids = ops.upsample_argmax(logits, target.shape[1:])
            self.ids.append(ids.cpu()[target != data.IGNORE][::16])
            self.matrices.append(ops.confusion_matrix(ids, target.to(device), self.seg.num_classes).cpu())
        self.matrix = sum(self.matrices)
        miou, per_class = ops.mean_iou(self.matrix)
        self.miou, self.per_class = 100 * miou, (100 * per_class).tolist()
        self.scores = np.array([100 * ops.mean_iou(matrix)[0] for matrix in self.matrices])

    @torch.inference_mode()
    def figures(self, i, sample, size, palette, device):
        """(caption, URI) of what the nets say of a picture: classes, D's confidence in them, those that are trusted."""
        pixels, target = data.Whole([sample], self.args)[0]
        logits = predict.logits(self.seg, pixels[None], self.args, device)
        ids = ops.upsample_argmax(logits, target.shape)[0].cpu()
        yield f"{self.name}: {self.scores[i]:.1f}", shown(predict.palette_png(ids, size, palette))
        if self.disc:
            sure, kept = trust(self.disc.to(device), logits, (target[None] != data.IGNORE).to(device), self.args)
            grey = (255 * sure[0, 0]).byte().cpu()
            yield f"{self.name}: D's confidence", shown(predict.palette_png(grey, size, [x // 3 for x in range(768)]))
            if hasattr(self.args, "threshold"):  # a training on unlabelled pictures
                taught = ids.where(kept[0].cpu(), data.IGNORE)
                yield f"{self.name}: trusted", shown(predict.palette_png(taught, size, palette))


def uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def shown(picture, kind="png", **more):
    """A PIL picture, WIDTH wide, as an URI."""
    file = io.BytesIO()
    picture.resize((WIDTH, round(WIDTH * picture.height / picture.width))).save(file, kind, **more)
    return uri(kind, file.getvalue())


def plot(draw, height=2.6):
    """What draw(axes) draws, as URIs for a light and for a dark page."""
    found = []
    for style in ("default", "dark_background"):
        with matplotlib.style.context([style, {"savefig.transparent": True, "font.size": 9}]):
            figure, file = Figure(figsize=(5, height), layout="constrained"), io.BytesIO()
            draw(axes := figure.subplots())
            axes.legend()
            figure.savefig(file, format="svg")
            found.append(uri("svg+xml", file.getvalue()))
    return found


def curves(runs):
    """(title, URIs) for every figure in the logs."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row if name not in ("step", "lr"))
    for name in sorted(names, key=lambda name: name != "miou"):
        def draw(axes):
            for run in runs:
                rows = [row for row in run.rows if name in row]
                line = ".-" if name in SCORES else "-"
                axes.plot([row["step"] for row in rows], [row[name] for row in rows], line, label=run.name)
                if rows and name in watch.HEALTHY:
                    axes.axhspan(*watch.healthy(name, run.args)[:2], alpha=0.15 / len(runs), color="tab:green", lw=0)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        yield TITLES.get(name, name), plot(draw)


def bars(runs, classes):
    def draw(axes):
        thick, places = 0.8 / len(runs), np.arange(len(classes))
        for i, run in enumerate(runs):
            axes.barh(places + i * thick, run.per_class, thick, label=run.name)
        axes.set_yticks(places + 0.4 - thick / 2, classes)
        axes.invert_yaxis()
        axes.set_xlabel("IoU, %")
    return plot(draw, 1 + 0.35 * len(classes) * max(1, 0.6 * len(runs)))


def rows_of_pictures(runs, ids, samples, palette, device):
    """(title, rows) of the best and worst pictures and those where runs differ most; a row is (name, figures)."""
    means, apart = np.mean([run.scores for run in runs], 0), np.zeros(len(ids))
    for one, two in itertools.combinations(runs, 2):
        apart = np.maximum(apart, [(a != b).float().mean() for a, b in zip(one.ids, two.ids)])
    order = [i for i in np.argsort(means) if not np.isnan(means[i])]
    groups = [("Worst", order[:SHOWN]), ("Best", order[::-1][:SHOWN])]
    if len(runs) > 1:
        groups.append(("Where the runs differ most", np.argsort(-apart)[:SHOWN]))

    def row(i):
        picture = data.read_picture(samples[i][0])
        label = data.read_label(samples[i][1], picture.size)
        yield "picture", shown(picture, "jpeg", quality=80)
        yield "label", shown(predict.palette_png(label, picture.size, palette))
        for run in runs:
            yield from run.figures(i, samples[i], picture.size, palette, device)
    return [(title, [(ids[i], list(row(i))) for i in chosen]) for title, chosen in groups]


def main(args):
    out, names = Path(args.out), [Path(folder).resolve().name for folder in args.runs]
    names = names if len(names) == len(set(names)) else args.runs
    runs = [Run(folder, name) for folder, name in zip(args.runs, names)]
    classes = runs[0].classes
    if other := [run.folder for run in runs if run.classes != classes]:
        raise cli.InputError(f"{other[0]}: has other classes than {runs[0].folder}; make a page of each")
    if out.is_dir() or not out.parent.is_dir():
        raise cli.InputError(f"--out {out}: is a folder, or its folder is not there; name a file, as page.html")
    dataset = data.open_data(args.data or runs[0].args.data)
    ids = dataset.ids(args.list)
    samples = dataset.samples(ids)
    note = dataset.note + predict.same_classes(classes, dataset, runs[0].folder)
    device = common.announce(f"{note}data {dataset.name}: {len(ids)} pictures of list {args.list}", args.gpu)
    for run in runs:
        run.look(samples, args, device)
    varied = [name for name in sorted({name for run in runs for name in run.flags} - {"out", "palette", "resume"})
              if len({str(run.flags.get(name, "")) for run in runs}) > 1]
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "docs/report.html").read_text())
    page = template.render(
        runs=runs, classes=classes, varied=varied, data=dataset.name, list=args.list, count=len(ids), width=WIDTH,
        curves=list(curves(runs)), bars=bars(runs, classes),
        colours=[dataset.palette[3 * k:3 * k + 3] for k in (*range(len(classes)), data.IGNORE)],
        groups=rows_of_pictures(runs, ids, samples, dataset.palette, device))
    cli.replace(out, lambda file: file.write_text(page))
    print(f"{out}: {len(page) / 1e6:.1f} MB, {len(runs)} runs, {len(ids)} pictures")


if __name__ == "__main__":
    cli.launch(main, flags)
