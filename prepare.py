"""Data sets as people have them, brought to a layout that trains, and what is in a data set.

    python data.py voc                                     VOC 2012 and SBD, merged: 10,582 training, 1,449 validation pictures
    python data.py cityscapes --root DIR                   lists for a Cityscapes folder
    python data.py camvid --from DIR                       SegNet's CamVid folder to VOC layout
    python data.py shapes                                  the generated set (training on it writes it too)
    python data.py check --data ROOT                       reads every file; exit status 1 if anything is wrong
    python data.py split --data ROOT --split 0.125         the lists of a split
    python data.py bench --data ROOT                       pictures a second, beside torchvision's transforms
"""
import argparse
import filecmp
import hashlib
import http.client
import math
import os
import shutil
import statistics
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

import data
from cli import InputError, Parser, folder, progress, replace, writing

VOC_COUNTS = {"train": 1464, "val": 1449, "train_aug": 10582, "pictures": 17125}  # published
CITYSCAPES_COUNTS = {"train": 2975, "val": 500}
# names as in ../shared/camvid, colours as SegNet draws them
CAMVID_CLASSES = {"sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
                  "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign_symbol": (192, 128, 128), "fence": (64, 64, 128),
                  "car": (64, 0, 128), "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192)}
SHOWN = 20  # mistakes of a kind that `check` prints
BLOCK = 1 << 20  # bytes of a download that are read at once


def voc_archives():
    """{file name: (URL, MD5)}, as torchvision has them."""
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT
    voc = DATASET_YEAR_DICT["2012"]
    return {voc["filename"]: (voc["url"], voc["md5"]), SBDataset.filename: (SBDataset.url, SBDataset.md5)}


def voc(args):
    """Fill --root with VOC 2012, SBD's labels beside VOC's own, and train_aug.txt. Does only what is missing.

    Errors: InputError for an archive that cannot be had or is not the published one, and for counts other than published.
    """
    root = folder("--root", args.root)
    lists, own_dir, merged = root / "ImageSets/Segmentation", root / "SegmentationClass", root / "SegmentationClassAug"
    mats = root / "sbd.part"
    (voc_name, voc_source), (sbd_name, sbd_source) = voc_archives().items()

    own = [i for name in ("train", "val") if (lists / f"{name}.txt").is_file() for i in data.read_ids(lists / f"{name}.txt")]
    have = data.index(own_dir, [".png"])
    if (len(own) < VOC_COUNTS["train"] + VOC_COUNTS["val"] or any(i not in have for i in own)
            or len(data.index(root / "JPEGImages", data.PICTURES)) < VOC_COUNTS["pictures"]):
        wanted = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
        unpack(fetch(voc_name, *voc_source, root, args.source), root, {f"VOCdevkit/VOC2012/{name}": name for name in wanted})
    train, val = (data.read_ids(lists / f"{name}.txt") for name in ("train", "val"))

    have = data.index(merged, [".png"])
    aug = data.read_ids(lists / "train_aug.txt") if (lists / "train_aug.txt").is_file() else []
    if not aug or any(i not in have for i in set(aug) - set(train)):
        wanted = {f"benchmark_RELEASE/dataset/{name}": f"{mats.name}/{name}" for name in ("cls", "train.txt", "val.txt")}
        unpack(fetch(sbd_name, *sbd_source, root, args.source), root, wanted)
        sbd = data.read_ids(mats / "train.txt") + data.read_ids(mats / "val.txt")
        aug = sorted({*sbd, *train} - set(val))
        todo = [i for i in aug if i not in train and i not in have]
        for _ in everywhere(convert_sbd, [(mats / f"cls/{i}.mat", merged / f"{i}.png") for i in todo], "converting SBD"):
            pass
    for i in train + val:  # VOC's own labels win
        if i not in have or not filecmp.cmp(own_dir / f"{i}.png", merged / f"{i}.png", shallow=False):
            copy(own_dir / f"{i}.png", merged / f"{i}.png")

    pictures = data.index(root / "JPEGImages", data.PICTURES)
    for i in aug + val:
        if i not in pictures:
            raise InputError(f"{root}/JPEGImages/{i}.jpg: not there, but a list has {i}; get the published {voc_name}")
    for name, ids in (("train", train), ("val", val), ("train_aug", aug)):
        if len(ids) != VOC_COUNTS[name]:
            raise InputError(f"{root}: {name} has {len(ids):,} pictures, published are {VOC_COUNTS[name]:,}; remove {lists} "
                             "and run the same command again")
    if not (lists / "train_aug.txt").is_file():
        replace(lists / "train_aug.txt", lambda f: f.write_text("\n".join(aug) + "\n"))
    shutil.rmtree(mats, ignore_errors=True)
    print(f"{root}: train_aug {len(aug):,} pictures ({len(train):,} of them with VOC's own labels, the others with SBD's), "
          f"val {len(val):,}" + (f"; {root / 'archives'} may be deleted" if (root / "archives").is_dir() else ""))


def fetch(name, url, md5, root, source):
    """Path of the archive `name`, from the folder `source` or downloaded to `root`/archives; it is the published one.

    A download goes on where one was cut off. Errors: InputError.
    """
    from torchvision.datasets.utils import check_md5
    path = (Path(source) if source else root / "archives") / name
    part = path.with_name(f"{name}.part")
    try:
        if path.is_file():
            if not check_md5(path, md5):
                raise InputError(f"{path}: is not the published file, whose MD5 is {md5}; remove it and run the same command "
                                 "again")
            return path
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); mend its permissions") from None
    if source:
        raise InputError(f"--from {source}: {name} is not there; get it from {url}, or leave --from out")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    download(url, part)
    if not check_md5(part, md5):
        part.unlink()
        raise InputError(f"{url}: gave a file that is not the published one, whose MD5 is {md5}; run the same command again, "
                         f"or put a good {name} into a folder and name that with --from")
    part.rename(path)
    return path


def download(url, part):
    """Append to the file `part` what it lacks of `url`. Errors: InputError."""
    size = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    total, why = 0, "the connection ended early"
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            length = int(answer.headers.get("Content-Length") or 0)
            if answer.status != 206:  # the server starts anew
                if length < size:
                    raise InputError(f"{url}: gives {length} bytes, fewer than {part} has; if that is the file, remove this")
                size = 0
            total = size + length
            blocks = iter(lambda: answer.read(BLOCK), b"")
            with writing(part):
                file = open(part, "ab" if size else "wb", buffering=0)
            with file:
                for block in progress(blocks, math.ceil(length / BLOCK), f"{url.rsplit('/', 1)[-1]}, MB"):
                    with writing(part):
                        size += file.write(block)
    except urllib.error.HTTPError as e:
        if e.code != 416:  # else there is nothing behind `size`
            raise InputError(f"{url}: {e.code} {e.reason}; get the file elsewhere and name its folder with --from") from None
    except (OSError, http.client.HTTPException) as e:
        total, why = math.inf, getattr(e, "reason", None) or e or type(e).__name__
    if size < total:
        raise InputError(f"{url}: the download stopped at {size / 1e6:.1f} MB ({' '.join(str(why).split())}); run the same "
                         "command again and it goes on from there")


def unpack(archive, root, wanted):
    """Write what `archive`, a tar, holds under the names of `wanted` ({name there: name below root}); skips what is there.

    Every file is whole or not there. Errors: InputError for a damaged archive, and for one with a link, an absolute path or
    ".." in it, of which nothing from there on is written.
    """
    print(f"unpacking {archive}", flush=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or {"..", "\\"} & {*path.parts, *member.name} or not (member.isfile() or member.isdir()):
                    raise InputError(f"{archive}: holds {member.name!r}, a link or a path that leads elsewhere, and is not "
                                     "unpacked further; get the published file")
                top = next((p for p in (path, *path.parents) if str(p) in wanted), None)
                if top is None or member.isdir():
                    continue
                target = root / wanted[str(top)] / path.relative_to(top)
                if not target.is_file() or target.stat().st_size != member.size:
                    with writing(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member).read()
                    replace(target, lambda f: f.write_bytes(content))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise InputError(f"{archive}: cannot be unpacked ({e}); remove it and run the same command again") from None


def copy(file, target):
    """Copy `file` to `target`, whole or not at all. Errors: InputError."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, lambda f: shutil.copyfile(file, f))


def save_label(ids, palette, target):
    """Class ids (H,W) uint8 as a mode P PNG at `target`, whole or not at all. Errors: InputError."""
    image = Image.fromarray(ids).convert("P")
    image.putpalette(palette)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, lambda f: image.save(f, "PNG"))


def convert_sbd(job):
    """(.mat of SBD, target): GTcls.Segmentation, (H,W) uint8 of 0..20, to an index PNG. Errors: InputError."""
    from scipy.io import loadmat
    mat, target = job
    try:
        ids = np.ascontiguousarray(loadmat(mat)["GTcls"][0]["Segmentation"][0], np.uint8)
    except Exception as e:  # whatever a reader of a foreign format meets
        raise InputError(f"{mat}: is no label of SBD ({type(e).__name__}); remove it and run the same command again") from None
    save_label(ids, data.voc_palette(), target)


class Each(torch.utils.data.Dataset):
    """function(item), item by item."""

    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, n):
        return self.function(self.items[n])


def everywhere(function, items, what):
    """Yield function(item) in order, worked out on all cores, with a progress bar."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = torch.utils.data.DataLoader(Each(function, items), batch_size=None, num_workers=cores, collate_fn=same)
    return progress(loader, len(items), what)


def same(x):
    return x


def cityscapes(args):
    """Look a Cityscapes folder over and write its lists and classes.txt; label ids are mapped when a label is read.

    Errors: InputError where a picture has no label or a split has no picture.
    """
    from torchvision.datasets import Cityscapes
    root = folder("--root", args.root)
    if not (root / "leftImg8bit").is_dir() or not (root / "gtFine").is_dir():
        raise InputError(f"--root {root}: needs the folders leftImg8bit and gtFine, from leftImg8bit_trainvaltest.zip and "
                         "gtFine_trainvaltest.zip of the Cityscapes site; unpack them there")
    classes = sorted((c.train_id, c.name.replace(" ", "_"), c.color) for c in Cityscapes.classes if 0 <= c.train_id < 255)
    lists, said = {}, []
    for name, published in CITYSCAPES_COUNTS.items():
        pictures = [f.name.removesuffix("_leftImg8bit.png") for f in
                    sorted((root / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))]
        labels = [sorted((root / "gtFine" / name).glob(f"*/*_gtFine_{kind}.png")) for kind in ("labelTrainIds", "labelIds")]
        known = {f.name.split("_gtFine_")[0] for files in labels for f in files}
        lacking = [i for i in pictures if i not in known]
        if lacking:
            raise InputError(f"{root}/gtFine/{name}: {len(lacking)} of {len(pictures)} pictures have no label, {lacking[0]} is "
                             "the first; unpack gtFine_trainvaltest.zip again")
        if not pictures:
            raise InputError(f"{root}/leftImg8bit/{name}: holds no CITY/*_leftImg8bit.png; unpack leftImg8bit_trainvaltest.zip")
        lists[name] = pictures
        said.append(f"{name} {len(pictures):,} pictures (published: {published:,}), {len(labels[0]):,} labels of train ids, "
                    f"{len(labels[1]):,} of label ids")
    write_lists(root, lists, {name: colour for _, name, colour in classes})
    print(f"{root}: " + "; ".join(said) + f"; {len(classes)} classes")


def write_lists(root, lists, classes):
    """Write ImageSets/Segmentation/NAME.txt of {NAME: ids} and classes.txt of {name: (R, G, B)}. Errors: InputError."""
    with writing(root):
        (root / data.LIST_DIRS[0]).mkdir(parents=True, exist_ok=True)
    for name, ids in lists.items():
        replace(root / data.LIST_DIRS[0] / f"{name}.txt", lambda f: f.write_text("\n".join(ids) + "\n"))
    lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in classes.items()]
    replace(root / "classes.txt", lambda f: f.write_text("".join(lines)))


def camvid(args):
    """SegNet's folder (train/ and trainannot/, val/, test/; 12 label values, the last one void) to VOC layout at --root.

    Errors: InputError.
    """
    source, root = Path(args.source), folder("--root", args.root)
    lists, jobs = {}, []
    for name in ("train", "val", "test"):
        pictures, labels = (data.index(source / f"{name}{kind}", [".png"]) for kind in ("", "annot"))
        if set(pictures) != set(labels):
            odd = min(set(pictures) ^ set(labels))
            raise InputError(f"--from {source}: {odd} is in only one of {name}/ and {name}annot/; add the other file")
        if pictures:
            lists[name] = sorted(pictures)
        twice = [i for other in lists if other != name for i in lists[other] if i in pictures]
        if twice:
            raise InputError(f"--from {source}: {twice[0]} is in {name}/ and in another part; rename one")
        jobs += [(pictures[i], labels[i], root) for i in pictures]
    if not {"train", "val"} <= set(lists):
        raise InputError(f"--from {source}: needs train/, trainannot/, val/ and valannot/ with *.png, as SegNet's CamVid has")
    for _ in everywhere(convert_camvid, jobs, "converting"):
        pass
    write_lists(root, lists, CAMVID_CLASSES)
    print(f"{root}: " + ", ".join(f"{name} {len(ids)} pictures" for name, ids in lists.items()) + ", 11 classes")


def convert_camvid(job):
    """(picture, label, root): copies the picture and writes the label with 255 for SegNet's 11. Errors: InputError."""
    picture, label, root = job
    with data.reading(label):
        ids = np.array(Image.open(label))
    if ids.ndim != 2 or ids.max() > len(CAMVID_CLASSES):
        raise InputError(f"{label}: is no index picture of 0..11; take SegNet's CamVid folder")
    palette = data.voc_palette()
    palette[:3 * len(CAMVID_CLASSES)] = sum(CAMVID_CLASSES.values(), ())
    copy(picture, root / "JPEGImages" / Path(picture).name)
    ids = np.where(ids == len(CAMVID_CLASSES), data.IGNORE, ids).astype(np.uint8)
    save_label(ids, palette, root / "SegmentationClassAug" / Path(label).name)


def inspect(sample):
    """(picture path, Label or None) -> (size or None, digest of the pixels, pixels of each label value (256,), mistakes)."""
    path, label = sample
    size, digest, counts, wrong = None, "", [0] * 256, []
    try:
        picture = data.read_picture(path)
        size, digest = picture.size, hashlib.sha256(picture.tobytes()).hexdigest()
        if label:
            counts = np.bincount(data.read_label(label, size).ravel(), minlength=256).tolist()
    except InputError as e:
        wrong.append(str(e))
    return size, digest, counts, wrong


def check(args):
    """Read every picture and label once, on all cores; print counts, sizes, classes and what is wrong.

    Exit status 1 if anything is wrong. Errors: InputError where there is no data set.
    """
    dataset, note = data.open_data(args.data)
    wrong = {"bad files": [], "in a list, but not there": [], "label without a picture": [], "both in train and val": [],
             "class that no training label shows": []}
    lists = []
    for names in (data.TRAIN_LISTS, ["val"]):
        try:
            lists.append(dataset.ids(*names))
        except InputError as e:
            wrong["bad files"].append(str(e))
            lists.append([])
    train, val = lists
    ids = sorted(dataset.pictures)
    for i in train + val:
        wrong["in a list, but not there"] += [f"{folder}/{i}" for folder, files in (
            (dataset.picture_dir, dataset.pictures), (dataset.label_dir, dataset.labels)) if i not in files]
    wrong["label without a picture"] = [dataset.labels[i] for i in sorted(dataset.labels) if i not in dataset.pictures]

    samples = [dataset.samples([i], labels=i in dataset.labels)[0] for i in ids]
    sizes, digests, counts = Counter(), {}, {}
    for i, (size, digest, count, bad) in zip(ids, everywhere(inspect, samples, "reading")):
        sizes.update([size] if size else [])
        digests[i], counts[i] = digest, np.array(count)
        wrong["bad files"] += bad
    first = {digests[i]: i for i in reversed(train) if digests.get(i)}
    wrong["both in train and val"] = [i if i in train else f"{i} of val has the pixels of {first[digests[i]]} of train"
                                      for i in val if i in set(train) or digests.get(i) in first]

    print(f"{note}data {dataset.name}: {len(ids):,} pictures, {len(dataset.labels):,} labels, {len(dataset.classes)} classes; "
          f"{len(train):,} training, {len(val):,} validation pictures")
    print("sizes: " + ", ".join(f"{w}x{h} {n:,}" for (w, h), n in sizes.most_common(8))
          + (f" and {len(sizes) - 8} others" if len(sizes) > 8 else ""))
    shares = []
    for part in (train, val):
        total = sum((counts[i] for i in part if i in counts), np.zeros(256, int))
        shares.append(100 * total / max(1, total.sum()))
    print(f"{'share of pixels, percent':28}   train     val   labels with it")
    for value, name in [*enumerate(dataset.classes), (data.IGNORE, "void")]:
        with_it = sum(bool(c[value]) for c in counts.values())
        print(f"{value:4} {name:23} {shares[0][value]:7.2f} {shares[1][value]:7.2f} {with_it:16,}")
        if not shares[0][value] and value != data.IGNORE:
            wrong["class that no training label shows"].append(f"{value}, {name} (255 is void, not a class)")
    for kind, found in wrong.items():
        for line in found[:SHOWN]:
            print(f"wrong, {kind}: {line}")
        if len(found) > SHOWN:
            print(f"wrong, {kind}: and {len(found) - SHOWN:,} more")
    total = sum(map(len, wrong.values()))
    print(f"{total:,} mistakes" if total else "nothing is wrong")
    sys.exit(total > 0)


def split(args):
    """Write and print the lists of a split, and say what was rounded and which protocol it is. Errors: InputError."""
    dataset, note = data.open_data(args.data)
    ids = dataset.ids(args.list) if args.list else dataset.train_ids()
    labelled, unlabelled = data.split_ids(ids, args.split, args.split_seed)
    out = folder("--out", args.out or dataset.root / data.LIST_DIRS[0])
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    files, of = [], f"{Path(args.list).stem}_" if args.list else ""
    for kind, part in (("labelled", labelled), ("unlabelled", unlabelled)):
        files.append(out / f"{kind}_{of}{args.split}_seed{args.split_seed}.txt")
        replace(files[-1], lambda f: f.write_text("".join(f"{i}\n" for i in part)))
    print("\n".join(labelled + unlabelled))
    print(f"{len(labelled):,} labelled above, and in {files[0]}\n{len(unlabelled):,} unlabelled behind them, and in {files[1]}")
    print(f"{note}protocol: {args.split:g} of the {len(ids):,} pictures of {args.list or 'the training list'}, "
          f"{args.split * len(ids):.6g} rounded to {len(labelled):,} (halves to the even number), seed {args.split_seed}")
    try:
        fine = set(dataset.ids("train")) if len(ids) > len(dataset.ids("train")) else set()
    except InputError:  # the folder has train_aug.txt only
        fine = set()
    if fine:
        print(f"{len(fine & set(labelled)):,} of the labelled are of the {len(fine):,} in train.txt, whose labels are VOC's "
              "own and finer than SBD's")


class Torchvision(torch.utils.data.Dataset):
    """The Stream's transform with torchvision's, for comparison; pictures as tensors or as PIL images."""

    def __init__(self, samples, size, args, tensors):
        from torchvision import tv_tensors
        from torchvision.transforms import v2
        fill = {tv_tensors.Image: data.PADDING, Image.Image: data.PADDING, tv_tensors.Mask: data.IGNORE}
        self.samples, self.tensors, self.mask = samples, tensors, tv_tensors.Mask
        # ScaleJitter takes (W,H), whatever its documentation says; with the pictures' own size its factor is the scale
        self.transform = v2.Compose([v2.ScaleJitter(size, args.scale), v2.RandomHorizontalFlip(),
                                     v2.RandomCrop(args.crop, pad_if_needed=True, fill=fill)])

    def __getitem__(self, n):
        from torchvision import io, tv_tensors
        from torchvision.transforms.v2.functional import pil_to_tensor
        path, label = self.samples[n % len(self.samples)]
        ids = Image.open(label.path)  # torchvision's reader makes colours of index PNGs
        ids = np.array(ids) if ids.mode in ("L", "P") else data.read_label(label, ids.size)
        ids = self.mask(torch.from_numpy(ids))
        if self.tensors:
            return self.transform(tv_tensors.Image(io.decode_image(path, "RGB")), ids)
        picture, ids = self.transform(Image.open(path).convert("RGB"), ids)
        return pil_to_tensor(picture), ids


def bench(args):
    """Pictures a second that one worker brings, Stream and torchvision in turn, medians of --rounds. Errors: InputError."""
    if min(args.rounds, args.pictures, args.crop) < 1 or not 0 < args.scale[0] <= args.scale[1] < math.inf:
        raise InputError("--rounds, --pictures, --crop: they are at least 1; --scale is MIN MAX with 0 < MIN <= MAX")
    dataset, note = data.open_data(args.data)
    samples = dataset.samples(dataset.train_ids())
    size = data.read_picture(samples[0][0]).size
    settings = argparse.Namespace(crop=args.crop, scale=args.scale, input_scale=1, seed=0, drop_last=False, batch_size=4)
    cases = {"data.py": data.Stream(samples, settings, "bench"),
             "torchvision v2, tensors": Torchvision(samples, size, settings, True),
             "torchvision v2, PIL": Torchvision(samples, size, settings, False)}
    print(f"{note}data {dataset.name}, the first picture {size[0]}x{size[1]}, crop {args.crop}, scale {args.scale[0]:g} to "
          f"{args.scale[1]:g}, one worker, batches of 4")
    rates = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, stream in cases.items():
            batches = iter(torch.utils.data.DataLoader(stream, 4, sampler=range(args.pictures + 4), num_workers=1))
            next(batches)  # the worker has started
            began = time.perf_counter()
            count = sum(len(pixels) for pixels, _ in batches)
            rates[name].append(count / (time.perf_counter() - began))
    for name, rate in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["data.py"], rate)]
        print(f"{name:24} {statistics.median(rate):6.1f} pictures/s" + (
            f"   data.py is {statistics.median(ratios):.2f} times as fast" if name != "data.py" else ""))


def shapes(args):
    data.make_shapes(data.SHAPES_ROOT)
    print(f"shapes is in {data.SHAPES_ROOT}")


def main(args):
    args.run(args)


def flags():
    p = Parser(__doc__)
    commands = p.add_subparsers(metavar="COMMAND", required=True)

    def command(run, help):
        p = commands.add_parser(run.__name__, description=run.__doc__, help=help)
        p.set_defaults(run=run)
        return p

    p_voc = command(voc, "VOC 2012 and SBD: download, convert, merge")
    p_voc.add_argument("--root", default=data.VOC_ROOT, help=f"where to (default {data.VOC_ROOT}; 2 GB, and 3.5 of archives)")
    p_voc.add_argument("--from", dest="source", metavar="DIR", help="folder of the archives, instead of downloading them")
    p_city = command(cityscapes, "lists for a Cityscapes folder")
    p_city.add_argument("--root", required=True, help="folder that holds leftImg8bit and gtFine")
    p_cam = command(camvid, "SegNet's CamVid folder to VOC layout")
    p_cam.add_argument("--from", dest="source", metavar="DIR", required=True, help="folder that holds train, trainannot, ...")
    p_cam.add_argument("--root", default="data/camvid", help="where to (default data/camvid)")
    command(shapes, "write the generated set")
    p_check = command(check, "read every file of a data set")
    p_split = command(split, "write and print the lists of a split")
    p_bench = command(bench, "pictures a second of one worker")
    for p_data in (p_check, p_split, p_bench):
        p_data.add_argument("--data", metavar="ROOT", help="data set, as in training")
    p_split.add_argument("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    p_split.add_argument("--split-seed", type=int, default=0, help="which pictures are labelled (default 0)")
    p_split.add_argument("--list", help="list to split; default: the training list. `train` is the protocol of 1,464 on VOC: "
                         "give its labelled list to a training with --labelled-ids")
    p_split.add_argument("--out", metavar="DIR", help="where the lists are written; default: ROOT/ImageSets/Segmentation")
    p_bench.add_argument("--crop", type=int, default=321, help="side of a crop in pixels (default 321)")
    p_bench.add_argument("--scale", type=float, nargs=2, default=[0.5, 1.5], metavar=("MIN", "MAX"), help="default 0.5 1.5")
    p_bench.add_argument("--pictures", type=int, default=200, help="pictures a round (default 200)")
    p_bench.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    return p
