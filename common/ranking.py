"""In which order to label images: uncertain ones first, that differ from each other and from the labelled images."""
import csv
import io
from pathlib import Path
from typing import NamedTuple

from common.console import write_atomically
from common.pages import embed_image, render

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

GREEDY = 1000  # images whose order is chosen one by one; the others follow by uncertainty
SHOWN = 40     # images on the page
WIDE = 480     # of an image on the page, opened, in pixels


class Measured(NamedTuple):
    """What the order of the images depends on."""

    path: Path
    feature: torch.Tensor  # (C,), mean of the backbone's features
    entropy: torch.Tensor  # (h,w), see entropy()
    confidence: float      # mean probability of the predicted class
    shares: list           # predicted share of each class


def entropy(logits):
    """Return the entropy of the softmax of logits (K,h,w), as a fraction of the largest possible: (h,w) in 0..1."""
    log_p = logits.float().log_softmax(0)
    return -(log_p.exp() * log_p).sum(0) / np.log(len(logits))


def choose_order(uncertainty, features, labelled):
    """Return the order of n images, (indices, scores), two lists, best first.

    The next image is the one with the largest score u * d: its uncertainty u times its distance d, 1 - cos of the
    features, to the nearest image that is labelled or was chosen before. This is the greedy k-centre algorithm (Sener &
    Savarese 2018) weighted by uncertainty; the weight is ours.

    uncertainty: (n,). features: (n,C). labelled: (m,C), features of the labelled images, m >= 0.
    """
    features, labelled = F.normalize(features.double()), F.normalize(labelled.double())
    distance = torch.full((len(features),), 2.0).double()  # the largest that there is
    if len(labelled):
        distance = (1 - features @ labelled.T).amin(1)
    indices, scores, left = [], [], torch.ones(len(features), dtype=torch.bool)
    for _ in range(min(len(features), GREEDY)):
        score = (uncertainty * distance).where(left, -1)
        best = score.argmax().item()
        indices.append(best)
        scores.append(score[best].item())
        left[best] = False
        distance = distance.minimum(1 - features @ features[best])
    rest = uncertainty.where(left, -1).argsort(descending=True)[:len(features) - len(indices)]
    return indices + rest.tolist(), scores + [0.0] * len(rest)


def write_ranking(out, measured, labelled, classes, palette, read_image):
    """Write ranking.csv and ranking.html to the folder `out`, which has the predictions; return the order.

    measured, labelled: lists of Measured; of labelled images only the features are used. read_image: function of a path
    -> PIL image, upright as the prediction is.
    """
    uncertainty = torch.tensor([m.entropy.mean() for m in measured]).double()
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
