"""Label maps in image files, and the shapes of COCO, LabelMe and YOLO: read, checked, and turned into class ids."""
import base64
import contextlib
import io
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import layouts
from common.console import InputError, catch_read_errors
from common.layouts import IGNORE

import numpy as np
from PIL import Image, ImageDraw

NEAR = 16  # grey values this far from a level count as noise around it
SHOWN = 8  # names, values or colours that a message lists
JPEG = (".jpg", ".jpeg")


class Mask(NamedTuple):
    """A label map in an image file. values: ((value, grey level or colour code, class id), ...) by kind."""
    path: Path
    kind: str  # "index", "levels" or "colour"
    values: tuple


class Scan(NamedTuple):
    """What a label map holds."""
    counts: dict  # {value: pixels}
    is_colour: bool  # the values are colour codes
    palette: np.ndarray | None  # (256,) colour code of each value
    is_wide: bool  # more than 8 bits


class Drawing(NamedTuple):
    """A label map of shapes, drawn in their order on class 0. size: (W,H) that the file names, or None."""
    path: Path
    size: tuple | None
    shapes: list  # of Shape


class Shape(NamedTuple):
    """form and data: "polygon" [(x, y), ...] in pixels; "rle" (counts, (h, w)); "bitmap" ((left, top), PNG bytes)."""
    name: object  # of the class; the class id once the classes are numbered
    form: str
    data: object


class WrongSize(InputError):
    """A label and its image differ in size. The message has no remedy: it depends on the image."""


class Refused(Exception):
    """A file that is read but not taken: why, and the remedy."""


@contextlib.contextmanager
def catch_label_errors(path):
    """Raise an InputError that names `path` if the block raises Refused, or cannot read it."""
    with catch_read_errors(path):
        try:
            yield
        except Refused as e:
            raise InputError(f"{path}: {e}") from None


def read_label_map(source, size):
    """Return the class ids (H,W) uint8 of a Mask or Drawing for an image of `size` (W,H).

    Raises WrongSize if the label has another size.
    """
    if isinstance(source, Mask):
        ids = read_mask_ids(source)
        found = ids.shape[::-1]
    else:
        found = source.size or size
        ids = draw_shapes(source, size) if found == size else None
    if found != size:
        sizes = [f"{width}x{height}" for width, height in (found, size)]
        raise WrongSize(f"{source.path}: the label's size {sizes[0]} is not its image's {sizes[1]}")
    return ids


# Label maps in image files

def read_mask(path):
    """Return (values (H,W), whether they are colours, colour codes of the palette or None).

    Values are class ids, grey levels (of a palette of greys, too) or palette indices. A colour code is 65536 R + 256 G
    + B. Raises an InputError for what is no label map: several pages, float or multi-band pixels, information in the
    alpha channel only.
    """
    with catch_label_errors(path), Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise Refused(f"holds {image.n_frames} pages; a label map has one, so save them as files of their own")
        if image.mode == "P":
            palette = np.array(image.getpalette("RGB")).reshape(-1, 3) @ [65536, 256, 1]
            palette, values = np.pad(palette, (0, 256 - len(palette)), constant_values=-1), np.array(image)
            used = np.unique(values)
            codes = palette[used]
            if (codes < 0).any() or (codes % 0x010101).any() or codes.tolist() == palette_codes(used.tolist()):
                return values, False, palette
            return (palette & 255).astype(np.uint8)[values], False, None  # GIF numbers the greys of each file anew
        if image.mode in ("1", "L", "I", "I;16", "I;16B"):
            return np.array(image), False, None
        if image.mode not in ("LA", "RGB", "RGBA"):
            raise Refused(f"pixels of mode {image.mode}; save class ids or grey levels in 8 bits, or RGB colours")
        red, green, blue, alpha = np.moveaxis(np.array(image.convert("RGBA")), 2, 0)
        is_colour = not (np.array_equal(red, green) and np.array_equal(green, blue))
        values = red.astype(np.int32) << 16 | green.astype(np.int32) << 8 | blue if is_colour else red
        if alpha.min() < 255 and len(np.unique(values.astype(np.int64) << 8 | alpha)) > len(np.unique(values)):
            raise Refused("pixels of one colour differ in transparency; save it without an alpha channel")
        return values, is_colour, None


def scan_mask(path):
    """Return (Scan of a label map or None, error or "")."""
    try:
        values, is_colour, palette = read_mask(path)
    except InputError as e:
        return None, str(e)
    found, counts = np.unique(values, return_counts=True)
    is_wide = not is_colour and values.itemsize > 1
    return Scan(dict(zip(found.astype(int).tolist(), counts.tolist())), is_colour, palette, is_wide), ""


def read_mask_ids(mask):
    """Return the class ids (H,W) uint8 of a Mask."""
    values, is_colour, palette = read_mask(mask.path)
    keys, ids = (np.array(column) for column in zip(*sorted(mask.values)))
    if mask.kind == "colour" and not is_colour:
        values = palette[values] if palette is not None else values.astype(np.int32) * 0x010101
    if mask.kind == "levels":
        keys = (keys[1:] + keys[:-1]) / 2  # halfway between two levels
    return ids.astype(np.uint8)[np.searchsorted(keys, values)]


def rgb_code(colour):
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def value_codes(scan):
    """Return {value: colour code} of a Scan."""
    return {value: value if scan.is_colour else int(scan.palette[value]) if scan.palette is not None else
            value * 0x010101 for value in scan.counts}


def choose_encoding(scans, ids, colours, names, source, kind=None):
    """Return (kind, ((value, grey level or colour code, class id), ...)) of label maps.

    scans: {path: Scan}; ids: {value: class id}; colours: {colour code: class id}, or {}; names: of the classes; source:
    their file. Raises an InputError if the labels are not clear or, with `kind`, not of this kind.
    """
    totals, codes, colour_file = Counter(), Counter(), None
    for path, scan in scans.items():
        totals.update({} if scan.is_colour else scan.counts)
        colour_file = colour_file or (path if scan.is_colour else None)
        for value, code in value_codes(scan).items():
            codes[code] += scan.counts[value]
    path, used = colour_file or next(iter(scans)), set(totals)
    if colour_file and kind in ("index", "levels"):
        raise InputError(f"{path}: is a colour image, not {kind}; leave --kind out")
    as_colours = colours if codes.keys() <= colours.keys() else {}
    as_index = {IGNORE: IGNORE} | ids if used - {IGNORE} <= ids.keys() else {}
    if not kind and used - {0} == {IGNORE} and IGNORE not in ids:
        as_index = {}  # 0 and 255 are two classes, not one class and void
    foreign = {path: scan for path, scan in scans.items() if not has_palette(scan, layouts.voc_palette())}
    pairs = {pair for scan in foreign.values() for pair in value_codes(scan).items()}
    if not kind and foreign and (as_colours or len(pairs) > len(dict(pairs))):
        as_index = {}  # the palette has the classes' colours, or each file has its own
    if kind == "colour" or colour_file:
        if not as_colours:
            raise InputError(explain_colours(path, codes, colours, names, source))
        return "colour", tuple(colours.items())
    if foreign and not kind and not as_colours:
        path = next(iter(foreign))
        if colours:
            raise InputError(explain_colours(path, codes, colours, names, source))
        raise InputError(f"{path}: its palette is neither VOC's nor grey, so its values may be those of a paint "
                         f"program: --kind index if they are class ids, else give each class its R G B in {source}")
    pairs = {pair for scan in scans.values() for pair in value_codes(scan).items()}
    if not kind and as_colours and as_index and any(as_colours[code] != as_index[value] for value, code in pairs):
        raise InputError(f"{path}: its values and its colours name different classes of {source}; choose with --kind "
                         "index or --kind colour")
    held = [scan.counts.keys() for scan in scans.values()]
    if as_index and not kind and IGNORE in used - ids.keys() and {0, IGNORE} in held and not any(
            IGNORE in values and values - {0, IGNORE} for values in held):
        path = next(p for p, scan in scans.items() if scan.counts.keys() == {0, IGNORE})
        raise InputError(f"{path}: holds 0 and 255, others hold class ids and no 255, so 255 may be a class or void; "
                         "--kind index if it is void, else save all alike")
    if as_index and kind != "levels":
        if jpeg := next((p for p in scans if p.suffix.lower() in JPEG), None):
            raise InputError(f"{jpeg}: JPEG changes class ids to those of their neighbours; export label maps as PNG")
        return "index", tuple(as_index.items())
    if as_colours and not kind:
        return "colour", tuple(colours.items())
    is_jpeg = path.suffix.lower() in JPEG
    levels = sorted(find_levels(totals, len(names), is_jpeg, kind is None)) if kind != "index" else []
    if not levels or not kind and not all(has_palette(scan) and not scan.is_wide for scan in scans.values()):
        raise InputError(explain_values(scans, used, ids, len(names), source))
    if colours and all(code % 0x010101 == 0 for code in colours):  # the table says which grey level is which class
        return "levels", tuple((level, colours[code]) for level, code in zip(levels, sorted(colours)))
    of_classes = sorted(colours, key=colours.get) or palette_codes(range(len(names)))
    greys = [(299 * (code >> 16) + 587 * (code >> 8 & 255) + 114 * (code & 255)) // 1000 for code in of_classes]
    if not kind and levels == sorted(greys) != greys:
        raise InputError(f"{path}: its grey levels {shorten(levels)} are those of colours that were turned to grey, "
                         "whose order is not that of the classes; export the label maps in colour or as class ids")
    return "levels", tuple((level, n) for n, level in enumerate(levels))


def palette_codes(values, palette=None):
    """Return the colour codes of values in a palette of 768 numbers (default VOC's)."""
    palette = palette or layouts.voc_palette()
    return [rgb_code(palette[3 * value:3 * value + 3]) for value in values]


def has_palette(scan, expected=None):
    """Whether the used colours of a Scan's palette, if any, are those of `expected`, or greys that rise by value."""
    if scan.palette is None:
        return True
    used = [value for value in sorted(scan.counts) if value != IGNORE or not expected]
    here = [int(scan.palette[value]) for value in used]
    is_grey = here == sorted(set(here)) and all(code >= 0 and code % 0x010101 == 0 for code in here)
    return is_grey or bool(expected) and here == palette_codes(used, expected)


def find_levels(totals, num_classes, is_jpeg, is_strict):
    """Return the num_classes grey levels in {value: pixels}, or [] if there are not just so many separated ones.

    The most frequent values, more than NEAR apart, are levels. With two classes the rest is noise at edges if it is up
    to 2 % of the pixels and no single value or, in JPEG, no bump stands out. With more classes no noise is allowed: an
    edge between two levels would be a third class. is_strict=False (--kind levels) allows any rest.
    """
    if not is_strict and len(totals) == num_classes:
        return list(totals)
    rest, levels = dict(totals), []
    while rest and len(levels) < num_classes:
        levels.append(max(rest, key=rest.get))
        rest = {value: n for value, n in rest.items() if abs(value - levels[-1]) > NEAR}
    if len(levels) < num_classes or max(levels) > 255:
        return []
    bumps = rest
    if is_jpeg:  # noise is thick near a level, and a further level spreads over several values
        bumps = {value for value in rest if min(abs(value - level) for level in levels) > 2 * NEAR}
        bumps = {value: sum(rest[v] for v in bumps if abs(v - value) <= NEAR) for value in bumps}
    pixels, noise = sum(totals.values()), sum(rest.values())
    is_noise = noise <= 0.02 * pixels and max(bumps.values(), default=0) <= max(noise / 3, 1e-5 * pixels)
    return levels if not rest or not is_strict or num_classes == 2 and is_noise else []


def explain_values(scans, used, ids, num_classes, source):
    """Return the error for grey values that are neither class ids nor levels."""
    path = next((p for p, scan in scans.items() if scan.counts.keys() - ids.keys()), next(iter(scans)))
    text = f"{path}: holds the values {shorten(sorted(scans[path].counts))}, but {source} names {num_classes} classes"
    if max(used) > 255 or scans[path].is_wide or len(used - {IGNORE}) > max(num_classes + 1, 8):
        return f"{text}: looks like an instance mask, one number per object; export semantic masks, one per class"
    return (f"{text}; add the missing classes, or --kind levels if the grey levels in order are the classes, or --kind "
            "index if 255 is ignored and the rest are class ids")


def explain_colours(path, codes, colours, names, source):
    """Return the error for colours that are no class's."""
    if path.suffix.lower() in JPEG:
        return f"{path}: JPEG changes colours, so that they are no longer those of {source}; export label maps as PNG"
    def channels(code):
        return code >> 16, code >> 8 & 255, code & 255

    wrong, shown = [code for code, _ in codes.most_common() if code not in colours], []
    for code in wrong[:SHOWN]:
        near = min(colours, default=None, key=lambda c: sum(abs(a - b) for a, b in zip(channels(c), channels(code))))
        name = f", nearest {'void' if colours[near] == IGNORE else names[colours[near]]}" if colours else ""
        share = 100 * codes[code] / sum(codes.values())
        shown.append(f"{' '.join(map(str, channels(code)))} ({share:.2g} % of the pixels{name})")
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    advice = (f"add them to {source} as NAME R G B, or as void R G B to ignore them" if colours else
              f"give each class in {source} its own colour: NAME R G B")
    return f"{path}: colours that are no class's: {', '.join(shown)}{more}; {advice}"


def shorten(items):
    """Return up to SHOWN items as text."""
    items = list(items)
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


# Shapes

def read_coco(content, path, find_image):
    """Return ({image: Drawing}, names of classes by their ids) of a COCO file.

    find_image: function (file name) -> image. Categories without an annotation that group others, as Roboflow writes,
    are left out.
    """
    with catch_label_errors(path):
        categories = {c["id"]: str(c["name"]).strip() for c in content["categories"]}
        used = {a["category_id"] for a in content["annotations"]}
        groups = {c.get("supercategory") for c in content["categories"] if c.get("supercategory") != c["name"]}
        by_id, labels = {}, {}
        for entry in content["images"]:
            size = (entry["width"], entry["height"]) if entry.get("width") and entry.get("height") else None
            image, by_id[entry["id"]] = find_image(entry["file_name"]), Drawing(path, size, [])
            if labels.setdefault(image, by_id[entry["id"]]) is not by_id[entry["id"]]:
                raise Refused(f"lists {entry['file_name']} twice; remove one")
        for n, a in enumerate(content["annotations"]):
            name, shape = f"annotation {a.get('id', n)}", a.get("segmentation")
            if a["image_id"] not in by_id or a["category_id"] not in categories:
                raise Refused(f"{name} names an image or a category that the file does not list; export it again")
            if isinstance(shape, dict):
                shapes = [("rle", (shape["counts"], tuple(shape["size"])))]
            elif not shape or not all(len(points) > 3 and len(points) % 2 == 0 for points in shape):
                raise Refused(f"{name} has a box but no polygon; export segmentations, or remove it")
            else:
                shapes = [("polygon", list(zip(points[::2], points[1::2]))) for points in shape]
            by_id[a["image_id"]].shapes.extend(Shape(categories[a["category_id"]], *shape) for shape in shapes)
    return labels, [categories[i] for i in sorted(categories) if i in used or categories[i] not in groups]


def read_labelme(content, path, find_image):
    """Return ({image: Drawing}, names of classes) of a LabelMe file. find_image: function (file name) -> image."""
    with catch_label_errors(path):
        size = (content.get("imageWidth"), content.get("imageHeight"))
        shapes = [labelme_shape(shape) for shape in content["shapes"]]
        drawing = Drawing(path, size if all(size) else None, shapes)
        return {find_image(content["imagePath"]): drawing}, [shape.name for shape in shapes]


def labelme_shape(shape):
    """Return the Shape of an entry of a LabelMe file; a ValueError if it has no area."""
    points, form = [tuple(point) for point in shape["points"]], shape.get("shape_type") or "polygon"
    if form == "mask":
        left, top = map(round, points[0])
        return Shape(shape["label"], "bitmap", ((left, top), base64.b64decode(shape["mask"])))
    if form == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    elif form == "circle":
        (x, y), edge = points
        radius, angles = math.dist((x, y), edge), np.linspace(0, 2 * math.pi, 90, endpoint=False)
        points = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    elif form not in ("polygon", "rectangle", "rotation"):
        raise Refused(f"a shape of {shape['label']} is a {form}, which has no area; draw a polygon instead")
    return Shape(shape["label"], "polygon", points)


def read_yolo(path, names, size):
    """Return the Drawing of a YOLO file for an image of `size` (W,H). names: {number: name}.

    A line is `number x1 y1 x2 y2 ...` in fractions of the upright image's sides.
    """
    shapes = []
    for line in layouts.read_lines(path):
        with catch_label_errors(path):
            number, *fractions = map(float, line.split())
            if len(fractions) == 4:
                raise Refused("holds boxes, class x y w h; export polygons (YOLO segmentation)")
            if len(fractions) < 6 or len(fractions) % 2 or number not in names:
                raise Refused(f"the line {line[:30]!r} is not a class in 0..{max(names)} and x y of 3 points or more; "
                              "correct it")
            points = [(x * size[0], y * size[1]) for x, y in zip(fractions[::2], fractions[1::2])]
            shapes.append(Shape(names[number], "polygon", points))
    return Drawing(path, None, shapes)


def draw_shapes(drawing, size):
    """Return the label map (H,W) uint8 of a Drawing for an image of `size` (W,H); later shapes lie on earlier ones."""
    label = np.zeros(size[::-1], np.uint8)
    with catch_label_errors(drawing.path):
        for class_id, form, content in drawing.shapes:
            if form == "polygon":
                draw_polygon(label, content, class_id)
            elif form == "rle":
                label[decode_rle(*content, size)] = class_id
            else:
                (left, top), png = content
                mask = np.array(Image.open(io.BytesIO(png)).convert("L"))[max(0, -top):, max(0, -left):] > 0
                part = label[max(0, top):, max(0, left):][:len(mask), :mask.shape[1]]
                part[mask[:part.shape[0], :part.shape[1]]] = class_id
    return label


def draw_polygon(label, points, class_id, scale=5, limit=2**24):
    """Set the pixels of a label map (H,W) whose centres are in a polygon [(x, y), ...] of pixel coordinates.

    PIL draws the outline as well, half a pixel outside. So the polygon is drawn `scale` times as large, in strips of at
    most `limit` pixels, and every pixel's centre is read from that.
    """
    points = np.array(points, float)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise Refused("a polygon has points that are not two numbers; correct it")
    height, width = label.shape
    left, top = np.clip(np.floor(points.min(0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0)), 0, (width, height)).astype(int)
    if len(points) < 3 or right == left:
        return
    rows = max(1, limit // (scale * scale * (right - left)))
    for y in range(top, bottom, rows):
        strip = Image.new("L", ((right - left) * scale, min(rows, bottom - y) * scale))
        ImageDraw.Draw(strip).polygon([tuple(point) for point in (points - (left, y)) * scale - 0.5], fill=1)
        label[y:min(y + rows, bottom), left:right][np.array(strip)[scale // 2::scale, scale // 2::scale] > 0] = class_id


def decode_rle(counts, shape, size):
    """Return COCO's run lengths as a mask (H,W) bool: runs of 0 and 1 in turns, column by column."""
    if tuple(shape) != size[::-1]:
        raise Refused(f"a mask of {shape[1]}x{shape[0]} pixels is on an image of {size[0]}x{size[1]}; export it again")
    if isinstance(counts, str):
        try:
            from pycocotools import mask
        except ImportError:
            raise Refused("holds compressed run lengths; pip install pycocotools, which reads them") from None
        return mask.decode({"counts": counts.encode(), "size": list(shape)}).astype(bool)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(shape[::-1]).T
