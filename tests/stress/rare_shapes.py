"""Write a data set like `shapes` in which star and ring are rare: about 0.5 % of the pixels each.

    python tests/stress/rare_shapes.py FOLDER
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.shapes import IGNORE, PALETTE, outline, texture  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageFilter  # noqa: E402

CLASSES = {"ground": 1, "disc": 1, "square": 1, "triangle": 1, "star": 0.37, "ring": 0.36}  # factor of the radius
SIZE = 128


def draw(rng):
    """Return an image (RGB) and its label (mode P). Rare shapes are drawn last, so that nothing covers them."""
    image, label = texture(rng, SIZE, rng.rand(), rng.uniform(0, 0.5)), np.zeros((SIZE, SIZE), np.uint8)
    for number in sorted((rng.randint(6) for _ in range(rng.randint(2, 6))), key=lambda n: n > 3):
        kind, factor = list(CLASSES.items())[number]
        centre, radius = rng.uniform(16, SIZE - 16, 2), rng.uniform(18, 44) * factor
        hue = number / 5 + rng.normal(0, 0.05) if number else rng.rand()
        pen = ImageDraw.Draw(mask := Image.new("L", (SIZE, SIZE)))
        corners = outline(kind, rng)
        pen.polygon([tuple(p) for p in centre + radius * corners], fill=255)
        if kind == "ring":
            pen.polygon([tuple(p) for p in centre + 0.55 * radius * corners], fill=0)
        inside = np.array(mask) > 0
        image = np.where(inside[..., None], texture(rng, SIZE, hue, rng.uniform(0.4, 1)), image)
        label[inside] = number
        grown, shrunk = (np.array(mask.filter(f(3))) > 0 for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        label[grown & ~shrunk] = IGNORE
    light = np.linspace(*rng.uniform(0.6, 1.2, 2), SIZE)
    image = image * (light if rng.rand() < 0.5 else light[:, None])[..., None] + rng.normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(label).convert("P")


root = Path(sys.argv[1])
for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
    (root / folder).mkdir(parents=True)
(root / "classes.txt").write_text("".join(f"{n} {' '.join(map(str, PALETTE[3 * k:3 * k + 3]))}\n"
                                          for k, n in enumerate(CLASSES)))
for name, count in (("train", 400), ("val", 100)):
    ids = [f"{name}_{n:03d}" for n in range(count)]
    for i in ids:
        image, label = draw(np.random.RandomState(int(hashlib.sha256(f"rare {i}".encode()).hexdigest()[:8], 16)))
        label.putpalette(PALETTE)
        image.save(root / "JPEGImages" / f"{i}.jpg", quality=90)
        label.save(root / "SegmentationClassAug" / f"{i}.png")
    (root / "ImageSets/Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
