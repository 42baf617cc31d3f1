"""The generated data set `shapes`: patterned shapes of any colour on plain grounds, the same on every machine."""
import colorsys
import hashlib

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFilter

CLASSES = {"ground": (0, 0, 0), "disc": (220, 60, 60), "square": (60, 160, 60), "triangle": (60, 90, 220)}
PALETTE = sum(CLASSES.values(), ()) + (224, 224, 192) * (256 - len(CLASSES))  # void as VOC draws it
IGNORE, SIZE = 255, 96


def make(root):
    """Write the set to the folder `root` in VOC layout unless it exists: 400 training and 100 val images, 96x96."""
    if root.is_dir():  # it may be read-only: no lock file beside it
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if root.is_dir():  # made by another process while this one waited
            return
        part = root.with_name(f"{root.name}.part")
        for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
            (part / folder).mkdir(parents=True, exist_ok=True)
        (part / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in CLASSES.items()))
        for name, count in (("train", 400), ("val", 100)):
            ids = [f"{name}_{n:03d}" for n in range(count)]
            for i in ids:
                image, label = draw(np.random.RandomState(int(hashlib.sha256(i.encode()).hexdigest()[:8], 16)))
                label.putpalette(PALETTE)
                image.save(part / "JPEGImages" / f"{i}.jpg", quality=90)
                label.save(part / "SegmentationClassAug" / f"{i}.png")
            (part / "ImageSets/Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
        part.rename(root)


def colours(rng):
    """Return a dark and a light colour of about the same hue, in random order: two (3,) arrays in 0..255."""
    hue, saturation, dark = rng.rand(), rng.uniform(0.1, 1), rng.uniform(0.15, 0.5)
    tones = (hue, dark), (hue + rng.normal(0, 0.1), dark + rng.uniform(0.35, 0.5))
    return [255 * np.array(colorsys.hsv_to_rgb(h % 1, saturation, value), np.float32) for h, value in tones][
        ::rng.choice([1, -1])]


def pattern(rng, kind):
    """Return where the second colour is in a pattern (SIZE,SIZE,1), 0..1, turned by some degrees.

    A disc has upright stripes, a square checks, a triangle level stripes, and the ground a few soft blotches.
    """
    if kind == "ground":
        coarse = Image.fromarray(rng.rand(4, 4).astype(np.float32))
        return np.array(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[..., None]
    y, x = np.mgrid[:SIZE, :SIZE]
    angle, period = rng.normal(0, 0.15), rng.uniform(7, 12)
    turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    u, v = (np.sin(2 * np.pi * (axis + rng.uniform(0, period)) / period) > 0 for axis in turned)
    return {"disc": u, "square": u ^ v, "triangle": v}[kind][..., None]


def draw(rng):
    """Return an image (RGB) and its label (mode P), SIZExSIZE: two or three shapes, with void along every edge.

    A class has its outline and its pattern, but no colour: that colours do not count is what few labels hardly show.
    """
    first, _ = colours(rng)
    image = first * (1 + rng.uniform(-0.3, 0.3) * pattern(rng, "ground"))
    label = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.randint(2, 4)):
        number = rng.randint(1, len(CLASSES))
        kind, centre, radius = list(CLASSES)[number], rng.uniform(12, SIZE - 12, 2), rng.uniform(26, 42)
        corners, factor = {"disc": (48, 0.9), "square": (4, 1.1), "triangle": (3, 1.35)}[kind]  # areas are about equal
        radius *= factor
        angle = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        mask = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(mask).polygon([(centre[0] + radius * np.cos(a), centre[1] + radius * np.sin(a)) for a in angle],
                                     fill=255)
        first, second = colours(rng)
        inside = np.array(mask) > 0
        image = np.where(inside[..., None], first + (second - first) * pattern(rng, kind), image)
        label[inside] = number
        grown, shrunk = (np.array(mask.filter(f(3))) > 0 for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        label[grown & ~shrunk] = IGNORE
    light = np.linspace(*rng.uniform(0.7, 1.2, 2), SIZE)
    image = image * (light if rng.rand() < 0.5 else light[:, None])[..., None] + rng.normal(0, 8, (SIZE, SIZE, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(label).convert("P")
