"""In which order to label images: first those that are like many uncertain ones, and like none with a label."""
import csv
import heapq
import io
import itertools
from pathlib import Path
from typing import NamedTuple

from common.console import write_atomically
from common.pages import embed_image, render

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

GREEDY = 1000  # images that are chosen one by one; the others, and those that cover nothing more, follow by uncertainty
SHOWN = 40     # images on the page
WIDE = 480     # of an image on the page, opened, in pixels


class Measured(NamedTuple):
    """What the order of the images depends on."""

    path: Path
    feature: torch.Tensor  # (C,), mean of the backbone's features
    entropy: torch.Tensor  # (h,w), see entropy()
    uncertainty: float     # see mean_over_classes()
    confidence: float      # mean probability of the predicted class
    shares: list           # predicted share of each class


def entropy(probabilities):
    """Return the entropy of probabilities (K,h,w), as a fraction of the largest possible: (h,w) in 0..1."""
    return torch.special.entr(probabilities).sum(0) / np.log(max(2, len(probabilities)))


def mean_over_classes(entropy, probabilities):
    """Return the mean of the entropy (h,w) where a class is predicted, averaged over the predicted classes.

    So a large object counts as much as a small one. With the plain mean the ranking preferred images that an object
    fills, and labels of these helped less (docs/experiments.md). The definition is ours.
    """
    classes = probabilities.argmax(0).flatten()
    sums, counts = (torch.bincount(classes, x.flatten()) for x in (entropy.double(), torch.ones_like(entropy)))
    return (sums[counts > 0] / counts[counts > 0]).mean().item()


def choose_order(uncertainty, features, labelled):
    """Return the order of n images, (indices, scores), two lists, best first.

    A set of images covers image j by the largest similarity of one of them to j: the cosine of their features, from
    which the mean of all features was subtracted, and 0 where it is negative. The coverage of a set is the mean of this
    over all n images, weighted by their uncertainties. The next image is the one that raises the coverage of the
    labelled images and those chosen before the most; its score is by how much. This is greedy facility location (Wei,
    Iyer & Bilmes 2015, "Submodularity in data subset selection and active learning"), with the uncertainty as our
    weight. No image ever raises the coverage by more than it could before, so that only those at the head of a queue
    are computed anew (Minoux 1978).

    uncertainty: (n,). features: (n,C). labelled: (m,C), features of the labelled images, m >= 0.
    """
    mean = torch.cat([features, labelled]).mean(0)
    features, labelled = (F.normalize((x - mean).float()) for x in (features, labelled))
    weights = (uncertainty / uncertainty.sum().clamp_min(1e-12)).float()
    covered = torch.zeros(len(features))
    for x in labelled.split(256) if len(labelled) else ():
        covered = covered.maximum((features @ x.T).amax(1))

    def gains(x):  # (c,C), features of candidates
        return (weights @ (features @ x.T - covered[:, None]).clamp_min(0)).tolist()
    queue = [(-gain, i) for i, gain in enumerate(itertools.chain(*map(gains, features.split(256))))]
    heapq.heapify(queue)
    indices, scores, computed_anew = [], [], set()
    while queue and queue[0][0] < -1e-6 and len(indices) < GREEDY:
        if queue[0][1] in computed_anew:
            gain, i = heapq.heappop(queue)
            indices.append(i)
            scores.append(-gain)
            covered = covered.maximum(features @ features[i])
            computed_anew.clear()
        else:
            heads = [heapq.heappop(queue)[1] for _ in range(min(8, len(queue)))]
            for i, gain in zip(heads, gains(features[heads])):
                heapq.heappush(queue, (-gain, i))
            computed_anew.update(heads)
    rest = sorted((i for _, i in queue), key=lambda i: -uncertainty[i])
    return indices + rest, scores + [0.0] * len(rest)


def write_ranking(out, measured, labelled, classes, palette, read_image):
    """Write ranking.csv and ranking.html to the folder `out`, which has the predictions; return the order.

    measured, labelled: lists of Measured; of labelled images only the features are used. read_image: function of a path
    -> PIL image, upright as the prediction is.
    """
    uncertainty = torch.tensor([m.uncertainty for m in measured]).double()
    known = torch.stack([m.feature for m in labelled]) if labelled else torch.empty(0, len(measured[0].feature))
    indices, scores = choose_order(uncertainty, torch.stack([m.feature for m in measured]), known)
    rows = csv.writer(text := io.StringIO(), lineterminator="\n")
    rows.writerow(["image", "score", "uncertainty", "confidence", *classes])
    for i, score in zip(indices, scores):
        m = measured[i]
        rows.writerow([m.path, f"{score:.4g}", *(f"{x:.4f}" for x in (uncertainty[i], m.confidence, *m.shares))])
    write_atomically(out / "ranking.csv", lambda file: file.write_text(text.getvalue()))

    def row(i, score):
        m = measured[i]
        image, prediction = read_image(m.path), Image.open(out / f"{m.path.stem}.png")
        grey = Image.fromarray((255 * m.entropy).byte().numpy()).resize(image.size, Image.BILINEAR)
        yield "image", embed_image(image, "jpeg", WIDE, quality=80)
        yield "prediction", embed_image(prediction, "png", WIDE)
        yield "uncertainty", embed_image(grey, "jpeg", WIDE, quality=80)
    shown = [(measured[i], score, list(row(i, score))) for i, score in list(zip(indices, scores))[:SHOWN]]
    page = render("ranking.html", rows=shown, count=len(measured), labelled=len(labelled), classes=classes,
                  colours=[palette[3 * k:3 * k + 3] for k in range(len(classes))])
    write_atomically(out / "ranking.html", lambda file: file.write_text(page))
    return indices
