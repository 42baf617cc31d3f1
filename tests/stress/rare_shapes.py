"""Write a data set like `shapes` in which star and ring are rare: about 0.5 % of the pixels each.

    python tests/stress/rare_shapes.py FOLDER
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import shapes  # noqa: E402

import numpy as np  # noqa: E402

FACTORS = {4: 0.37, 5: 0.36}  # of the radius of star and ring


def draw(rng, size=128):
    """Return an image (RGB) and its label (mode P). Rare shapes are drawn last, so that nothing covers them."""
    image = shapes.texture(rng, size, rng.rand(), rng.uniform(0, 0.5))
    label = np.zeros((size, size), np.uint8)
    for number in sorted((rng.randint(6) for _ in range(rng.randint(2, 6))), key=lambda n: n in FACTORS):
        image = shapes.add_shape(image, label, number, rng, FACTORS.get(number, 1))
    return shapes.finish(image, label, rng)


if __name__ == "__main__":
    shapes.write(Path(sys.argv[1]), draw, "rare ")
