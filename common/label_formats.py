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
from PIL import Image, ImageOps

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
    codes: dict  # {value: colour code}
    is_colour: bool  # the values are colour codes
    has_palette: bool  # the values are indices into a palette that is not grey


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


def upright_size(path):
    """Return ((W,H) of an image after its EXIF orientation, the orientation); an InputError for float or 16 bits."""
    with catch_label_errors(path), Image.open(path) as image:
        if image.mode[0] in "IF" or image.mode in ("RGBX", "La"):
            raise Refused(f"pixels of mode {image.mode}; convert it to 8 bits a channel, grey or RGB")
        if image.format in ("TIFF", "GIF") and getattr(image, "n_frames", 1) > 1:
            raise Refused(f"holds {image.n_frames} pages; save them as images of their own")
        orientation = image.getexif().get(0x0112, 1)
        if image.format == "TIFF":  # whether PIL gives the upright size before it loads the file depends on its version
            return ImageOps.exif_transpose(image).size, orientation
        return image.size[::-1] if orientation in range(5, 9) else image.size, orientation


def rgb_code(colour):
    """Return 65536 R + 256 G + B."""
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def rgb_channels(code):
    return code >> 16, code >> 8 & 255, code & 255


def shorten(items):
    """Return up to SHOWN items as text."""
    items = list(items)
    return ", ".join(map(str, items[:SHOWN])) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


# Label maps in image files

def read_mask(path):
    """Return (values (H,W), whether they are colours, colour codes of the palette (256,) or None).

    Values are class ids, grey levels (of a palette of greys, too) or palette indices. Raises an InputError for what is
    no label map: several pages, float or multi-band pixels, information in the alpha channel only.
    """
    with catch_label_errors(path), Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise Refused(f"holds {image.n_frames} pages; a label map has one, so save them as files of their own")
        if image.mode == "P":
            palette = np.array(image.getpalette("RGB")).reshape(-1, 3) @ [65536, 256, 1]
            palette, values = np.pad(palette, (0, 256 - len(palette)), constant_values=-1), np.array(image)
            used = np.unique(values)
            is_grey = (palette[used] >= 0).all() and not (palette[used] % 0x010101).any()
            if is_grey and (not used.any() or palette[used].tolist() != palette_codes(used.tolist())):
                return (palette & 255).astype(np.uint8)[values], False, None  # GIF numbers the greys of each file anew
            return values, False, palette
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
    """Return the Scan of a label map."""
    values, is_colour, palette = read_mask(path)
    found, counts = np.unique(values, return_counts=True)
    found = found.astype(int)
    codes = found if is_colour else palette[found] if palette is not None else found * 0x010101
    return Scan(*(dict(zip(found.tolist(), x.tolist())) for x in (counts, codes)), is_colour, palette is not None)


def read_mask_ids(mask):
    """Return the class ids (H,W) uint8 of a Mask."""
    values, is_colour, palette = read_mask(mask.path)
    keys, ids = (np.array(column) for column in zip(*sorted(mask.values)))
    if mask.kind == "colour" and not is_colour:
        values = palette[values] if palette is not None else values.astype(np.int32) * 0x010101
    if mask.kind == "levels":
        keys = (keys[1:] + keys[:-1]) / 2  # halfway between two levels
    return ids.astype(np.uint8)[np.searchsorted(keys, values)]


def palette_codes(values):
    """Return the colour codes of values in VOC's palette."""
    palette = layouts.voc_palette()
    return [rgb_code(palette[3 * value:3 * value + 3]) for value in values]


def choose_encoding(scans, ids, colours, names, source, kind=None):
    """Return (kind, ((value, grey level or colour code, class id), ...)) of label maps.

    scans: {path: Scan}; ids: {value: class id}; colours: {colour code: class id}, or {}; names: of the classes; source:
    their file. Raises an InputError if the labels are not clear or, with `kind`, not of this kind.
    """
    path, totals, codes = next(iter(scans)), Counter(), Counter()
    for scan in scans.values():
        totals.update({} if scan.is_colour else scan.counts)
        for value, n in scan.counts.items():
            codes[scan.codes[value]] += n
    used, as_colour = set(totals), ("colour", tuple(colours.items()))
    is_colour = codes.keys() <= colours.keys()

    colour_file = next((p for p, scan in scans.items() if scan.is_colour), None)
    if colour_file and kind in ("index", "levels"):
        raise InputError(f"{colour_file}: is a colour image, not {kind}; leave --kind out")
    voc, own = palette_codes(range(IGNORE)), {class_id: code for code, class_id in colours.items()}
    foreign = next((p for p, scan in scans.items() if scan.has_palette and any(
        value != IGNORE and code not in (voc[value], own.get(ids.get(value))) for value, code in scan.codes.items())),
        None)
    if colour_file or kind == "colour" or foreign and colours and not kind:
        if not is_colour:
            raise InputError(explain_colours(colour_file or foreign or path, codes, colours, names, source))
        return as_colour
    if foreign and not kind:
        raise InputError(f"{foreign}: its palette is neither VOC's nor grey, so its values may be those of a paint "
                         f"program: --kind index if they are class ids, else give each class its R G B in {source}")

    is_index = used - {IGNORE} <= ids.keys() and kind != "levels"
    if is_index and not kind and IGNORE in used - ids.keys():
        held = {frozenset(scan.counts): p for p, scan in scans.items()}
        if used <= {0, IGNORE}:
            is_index = False  # two classes, not one class and void
        elif (p := held.get(frozenset({0, IGNORE}))) and not any(IGNORE in h and len(h | {0}) > 2 for h in held):
            raise InputError(f"{p}: holds 0 and 255, others hold class ids and no 255, so 255 may be a class or void; "
                             "--kind index if it is void, else save all alike")
    if is_index and is_colour and not kind and any(
            colours[code] != ids.get(value, IGNORE) for scan in scans.values() for value, code in scan.codes.items()):
        raise InputError(f"{path}: its values and its colours name different classes of {source}; choose with --kind "
                         "index or --kind colour")
    jpeg = next((p for p in scans if p.suffix.lower() in JPEG), None)
    if is_index and jpeg:
        raise InputError(f"{jpeg}: JPEG changes class ids to those of their neighbours; export label maps as PNG")
    if is_index:
        return "index", tuple(({IGNORE: IGNORE} | ids).items())
    if is_colour and not kind:
        return as_colour

    levels = sorted(find_levels(totals, len(names), kind == "levels")) if kind != "index" else []
    if not levels or not kind and any(scan.has_palette for scan in scans.values()):
        raise InputError(explain_values(scans, used, ids, len(names), source))
    if colours and not any(code % 0x010101 for code in colours):  # the table says which grey level is which class
        return "levels", tuple((level, colours[code]) for level, code in zip(levels, sorted(colours)))
    of_classes = sorted(colours, key=colours.get) or palette_codes(range(len(names)))
    greys = [(299 * r + 587 * g + 114 * b) // 1000 for r, g, b in map(rgb_channels, of_classes)]
    if not kind and levels == sorted(greys) != greys:
        raise InputError(f"{path}: its grey levels {shorten(levels)} are those of colours that were turned to grey, "
                         "whose order is not that of the classes; export the label maps in colour or as class ids")
    return "levels", tuple((level, n) for n, level in enumerate(levels))


def find_levels(totals, num_classes, is_given):
    """Return the num_classes grey levels in {value: pixels}, or [] if there are not just so many separated ones.

    The most frequent values, more than NEAR apart, are levels. With two classes the rest is noise at edges if it is up
    to 2 % of the pixels and no further level, spread by JPEG, stands out. With more classes no noise is allowed: an
    edge between two levels would be a third class. is_given (--kind levels) allows any rest.
    """
    if is_given and len(totals) == num_classes:
        return list(totals)
    rest, levels = dict(totals), []
    while rest and len(levels) < num_classes:
        levels.append(max(rest, key=rest.get))
        rest = {value: n for value, n in rest.items() if abs(value - levels[-1]) > NEAR}
    if len(levels) < num_classes or max(levels) > 255:
        return []
    # noise is thick near a level
    far = [value for value in rest if min(abs(value - level) for level in levels) > 2 * NEAR]
    highest = max((sum(rest[v] for v in far if abs(v - value) <= NEAR) for value in far), default=0)
    pixels, noise = sum(totals.values()), sum(rest.values())
    is_noise = noise <= 0.02 * pixels and highest <= max(noise / 3, 1e-5 * pixels)
    return levels if not rest or is_given or num_classes == 2 and is_noise else []


def explain_values(scans, used, ids, num_classes, source):
    """Return the error for grey values that are neither class ids nor levels."""
    path = next((p for p, scan in scans.items() if scan.counts.keys() - ids.keys()), next(iter(scans)))
    text = f"{path}: holds the values {shorten(sorted(scans[path].counts))}, but {source} names {num_classes} classes"
    if max(used) > 255 or len(used - {IGNORE}) > max(num_classes + 1, 8):
        return f"{text}: looks like an instance mask, one number per object; export semantic masks, one per class"
    return (f"{text}; add the missing classes, or --kind levels if the grey levels in order are the classes, or --kind "
            "index if 255 is ignored and the rest are class ids")


def explain_colours(path, codes, colours, names, source):
    """Return the error for colours that are no class's."""
    if path.suffix.lower() in JPEG:
        return f"{path}: JPEG changes colours, so that they are no longer those of {source}; export label maps as PNG"
    wrong, shown = [code for code, _ in codes.most_common() if code not in colours], []
    for code in wrong[:SHOWN]:
        near = min(colours, default=None, key=lambda c: math.dist(rgb_channels(c), rgb_channels(code)))
        name = f", nearest {'void' if colours[near] == IGNORE else names[colours[near]]}" if colours else ""
        share = 100 * codes[code] / sum(codes.values())
        shown.append(f"{' '.join(map(str, rgb_channels(code)))} ({share:.2g} % of the pixels{name})")
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    advice = (f"add them to {source} as NAME R G B, or as void R G B to ignore them" if colours else
              f"give each class in {source} its own colour: NAME R G B")
    return f"{path}: colours that are no class's: {', '.join(shown)}{more}; {advice}"


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
    """Return the Shape of an entry of a LabelMe file. Raises Refused if it has no area."""
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
    with catch_label_errors(path):
        for line in layouts.read_lines(path):
            number, *fractions = map(float, line.split())
            if len(fractions) == 4:
                raise Refused("holds boxes, class x y w h; export polygons (YOLO segmentation)")
            if (len(fractions) < 6 or len(fractions) % 2 or number not in names or
                    min(fractions) < -0.5 or max(fractions) > 1.5):
                raise Refused(f"the line {line[:30]!r} is not a class in 0..{max(names)} and x y of 3 points or more, "
                              "in fractions of the image's sides; export polygons (YOLO segmentation)")
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
                mask = np.array(Image.open(io.BytesIO(png)).convert("L")) > 0
                part = label[max(0, top):top + mask.shape[0], max(0, left):left + mask.shape[1]]
                if part.shape != mask.shape:
                    raise Refused("a mask reaches beyond the image; draw it again")
                part[mask] = class_id
    return label


def draw_polygon(label, points, class_id):
    """Set the pixels of a label map (H,W) whose centres are in a polygon [(x, y), ...] of pixel coordinates.

    In each row, the pixels right of an edge change between outside and inside (even-odd rule). PIL would draw the
    outline as well, half a pixel outside.
    """
    points = np.array(points, float)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise Refused("a polygon has points that are not two numbers; correct it")
    left, top = np.clip(np.floor(points.min(0)), 0, label.shape[::-1]).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0)), 0, label.shape[::-1]).astype(int)
    box = label[top:bottom, left:right]
    changes = np.zeros((box.shape[0], box.shape[1] + 1), np.uint8)
    corners = points - (left + 0.5, top + 0.5)  # centres of pixels are whole numbers
    for start, end in zip(corners, np.roll(corners, 1, 0)):
        (x0, y0), (x1, y1) = sorted((start, end), key=lambda corner: corner[1])
        rows = np.arange(max(0, math.ceil(y0)), min(len(box), math.ceil(y1)))
        if len(rows):
            columns = np.ceil(x0 + (rows - y0) * (x1 - x0) / (y1 - y0)).clip(0, box.shape[1]).astype(int)
            changes[rows, columns] ^= 1
    box[np.bitwise_xor.accumulate(changes, 1)[:, :-1] > 0] = class_id


def decode_rle(counts, shape, size):
    """Return COCO's run lengths as a mask (H,W) bool: runs of 0 and 1 in turns, column by column."""
    if tuple(shape) != size[::-1]:
        raise Refused(f"a mask of {shape[1]}x{shape[0]} pixels is on an image of {size[0]}x{size[1]}; export it again")
    if isinstance(counts, str):
        counts = decompress_counts(counts)
    if sum(counts) != size[0] * size[1]:
        raise Refused(f"run lengths of {sum(counts)} pixels are on an image of {size[0]}x{size[1]}; export it again")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(shape[::-1]).T


def decompress_counts(text):
    """Return the run lengths in COCO's compressed form: 5 bits a character, the lowest first, and 32 if more follow.

    From the fourth on, a number is the difference to the last but one.
    """
    counts, number, bits = [], 0, 0
    for character in text.encode():
        number |= (character - 48 & 31) << bits
        bits += 5
        if not character - 48 & 32:
            number -= (number >> bits - 1) << bits  # the highest bit is the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, bits = 0, 0
    return counts
