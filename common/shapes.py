"""The generated data set `shapes`: textured shapes on textured grounds, the same on every machine."""
import colorsys
import hashlib

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFilter

CLASSES = {"ground": (0, 0, 0), "disc": (220, 60, 60), "square": (60, 160, 60), "triangle": (60, 90, 220),
           "star": (230, 190, 40), "ring": (170, 70, 190)}
PALETTE = sum(CLASSES.values(), ()) + (224, 224, 192) * (256 - len(CLASSES))  # void as VOC draws it
IGNORE = 255


def make(root):
    """Write the set to the folder `root` in VOC layout unless it exists: 400 training and 100 val images, 128x128."""
    if root.is_dir():  # it may be read-only: no lock file beside it
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if root.is_dir():  # made by another process while this one waited
            return
        part = root.with_name(f"{root.name}.part")
        write(part, draw)
        part.rename(root)


def write(root, draw, key=""):
    """Write 400 training and 100 val images to the folder `root` in VOC layout.

    draw: function (numpy.random.RandomState) -> (image, label). key: beginning of the random seeds.
    """
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in CLASSES.items()))
    for name, count in (("train", 400), ("val", 100)):
        ids = [f"{name}_{n:03d}" for n in range(count)]
        for i in ids:
            image, label = draw(np.random.RandomState(int(hashlib.sha256(f"{key}{i}".encode()).hexdigest()[:8], 16)))
            label.putpalette(PALETTE)
            image.save(root / "JPEGImages" / f"{i}.jpg", quality=90)
            label.save(root / "SegmentationClassAug" / f"{i}.png")
        (root / "ImageSets/Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")


def texture(rng, size, hue, saturation):
    """Stripes, checks or blotches in two tones of a hue (0..1), (size,size,3) float32 in 0..255."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, waves, kind = rng.uniform(0, np.pi), rng.uniform(4, 16), rng.randint(3)
    turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    u, v = (np.sin(2 * np.pi * waves * axis) > 0 for axis in turned)
    if kind < 2:
        mix = u ^ v if kind else u
    else:
        coarse = Image.fromarray(rng.rand(int(waves), int(waves)).astype(np.float32))
        mix = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))
    tones = [colorsys.hsv_to_rgb(hue % 1, saturation, value) for value in rng.uniform(0.3, 1, 2)]
    first, second = 255 * np.array(tones, np.float32)
    return first + (second - first) * mix[..., None]


def outline(kind, rng):
    """Corners (n,2) of a shape of radius 1 around 0, turned at random. Kind "ground" is an irregular blob."""
    corners = {"square": 4, "triangle": 3, "star": 10}.get(kind, 48)
    angle, radius = np.arange(corners) * 2 * np.pi / corners, np.ones(corners)
    if kind == "star":
        radius[1::2] = 0.45
    elif kind == "ground":
        for wave in (2, 3, 5):
            radius -= 0.12 * (1 + np.sin(wave * angle + rng.uniform(0, 2 * np.pi)))
    angle = angle + rng.uniform(0, 2 * np.pi)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def draw(rng, size=128):
    """Return an image (RGB) and its label (mode P): shapes and blobs on a textured ground, void along every edge.

    A class always has its outline and mostly its hue; blobs, which are ground, have any.
    """
    image, label = texture(rng, size, rng.rand(), rng.uniform(0, 0.5)), np.zeros((size, size), np.uint8)
    for _ in range(rng.randint(2, 6)):
        image = add_shape(image, label, rng.randint(len(CLASSES)), rng)
    return finish(image, label, rng)


def add_shape(image, label, number, rng, factor=1):
    """Return an image (size,size,3) with a shape of class `number` on it; its label (size,size) changes in place.

    factor: of the radius.
    """
    kind, size = list(CLASSES)[number], len(label)
    centre, radius = rng.uniform(16, size - 16, 2), rng.uniform(18, 44) * factor
    hue = number / 5 + rng.normal(0, 0.05) if number else rng.rand()
    pen = ImageDraw.Draw(mask := Image.new("L", (size, size)))
    corners = outline(kind, rng)
    pen.polygon([tuple(p) for p in centre + radius * corners], fill=255)
    if kind == "ring":
        pen.polygon([tuple(p) for p in centre + 0.55 * radius * corners], fill=0)
    inside = np.array(mask) > 0
    label[inside] = number
    grown, shrunk = (np.array(mask.filter(f(3))) > 0 for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    label[grown & ~shrunk] = IGNORE
    return np.where(inside[..., None], texture(rng, size, hue, rng.uniform(0.4, 1)), image)


def finish(image, label, rng):
    """Return the image (RGB) in uneven light and with noise, and its label (mode P)."""
    size = len(label)
    light = np.linspace(*rng.uniform(0.6, 1.2, 2), size)
    image = image * (light if rng.rand() < 0.5 else light[:, None])[..., None] + rng.normal(0, 12, (size, size, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(label).convert("P")
