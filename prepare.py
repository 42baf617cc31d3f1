"""Download and convert data sets, check them, and write the lists of a split.

    python prepare.py voc                                VOC 2012 and SBD, merged: 10,582 train, 1,449 val
    python prepare.py cityscapes --root DIR              lists for a Cityscapes folder
    python prepare.py camvid --from DIR                  SegNet's CamVid folder to VOC layout
    python prepare.py import SOURCE... --out DIR         label exports of other tools, to a folder of one's own
    python prepare.py check --data ROOT                  read every file; exit status 1 if anything is wrong
    python prepare.py split --data ROOT --split 0.125    the lists of a split
    python prepare.py next --data ROOT --ckpt FILE --out DIR    the images to label next, with predictions to correct
"""
import csv
import filecmp
import hashlib
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path

from common import exporters, importers, layouts
from common.args import POSITIVE_INT, Parser
from common.checkpoint import read_checkpoint
from common.console import (
    InputError,
    catch_read_errors,
    catch_write_errors,
    launch,
    output_folder,
    write_atomically,
)

import numpy as np
from PIL import Image

import data

VOC_COUNTS = {"train": 1464, "val": 1449, "train_aug": 10582, "images": 17125}  # published
CITYSCAPES_COUNTS = {"train": 2975, "val": 500}
# colours as SegNet draws them
CAMVID_CLASSES = {"sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
                  "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign_symbol": (192, 128, 128),
                  "fence": (64, 64, 128), "car": (64, 0, 128), "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192)}
SHOWN = 20  # problems of a kind that `check` prints


def voc_archives():
    """Return [(file name, URL, MD5)] of VOC 2012 and SBD, as torchvision has them."""
    from torchvision.datasets import SBDataset, voc
    return [[voc.DATASET_YEAR_DICT["2012"][key] for key in ("filename", "url", "md5")],
            [SBDataset.filename, SBDataset.url, SBDataset.md5]]


def voc(args):
    """Download VOC 2012 and SBD to --root, merge their labels, and write train_aug.txt; files that exist are kept."""
    root = output_folder("--root", args.root)
    lists, own_dir, merged = root / layouts.LIST_DIRS[0], root / "SegmentationClass", root / "SegmentationClassAug"
    voc_archive, sbd_archive = voc_archives()

    if (not all((lists / f"{name}.txt").is_file() for name in ("train", "val"))
            or len(layouts.index_files(own_dir, [".png"])) < VOC_COUNTS["train"] + VOC_COUNTS["val"]
            or len(layouts.index_files(root / "JPEGImages", layouts.IMAGE_SUFFIXES)) < VOC_COUNTS["images"]):
        unpack(fetch(*voc_archive, root, args.source), "VOCdevkit/VOC2012/",
               ("JPEGImages/", "SegmentationClass/", "ImageSets/Segmentation/"), root)
    train, val = (layouts.read_ids(lists / f"{name}.txt") for name in ("train", "val"))

    have = layouts.index_files(merged, [".png"])
    aug = layouts.read_ids(lists / "train_aug.txt") if (lists / "train_aug.txt").is_file() else []
    if not aug or not have.keys() >= set(aug) - set(train):
        sbd, wanted = root / "sbd.part", ("cls/", "train.txt", "val.txt")
        unpack(fetch(*sbd_archive, root, args.source), "benchmark_RELEASE/dataset/", wanted, sbd)
        aug = sorted({*layouts.read_ids(sbd / "train.txt"), *layouts.read_ids(sbd / "val.txt"), *train} - set(val))
        jobs = [(sbd / f"cls/{i}.mat", merged / f"{i}.png") for i in aug if i not in train and i not in have]
        map_in_parallel(convert_sbd, jobs, "converting SBD")
        shutil.rmtree(sbd)
    for i in train + val:  # VOC's own labels win
        if i not in have or not filecmp.cmp(own_dir / f"{i}.png", merged / f"{i}.png", shallow=False):
            write_atomically(merged / f"{i}.png", lambda f: shutil.copyfile(own_dir / f"{i}.png", f))

    for name, ids in (("train", train), ("val", val), ("train_aug", aug)):
        if len(ids) != VOC_COUNTS[name]:
            raise InputError(f"{root}: {name} has {len(ids):,} images, {VOC_COUNTS[name]:,} are published; remove "
                             f"{lists} and run the same command again")
    write_atomically(lists / "train_aug.txt", lambda f: f.write_text("\n".join(aug) + "\n"))
    print(f"{root}: train_aug {len(aug):,} images ({len(train):,} of them with VOC's own labels), val {len(val):,}; "
          f"{root / 'archives'}, if it is there, may be deleted")


def fetch(name, url, md5, root, source):
    """Return the path of the archive `name`, in `source` or, downloaded, in `root`/archives; checks its MD5."""
    from torchvision.datasets.utils import check_integrity, download_url
    path = (Path(source) if source else root / "archives") / name
    if source and not check_integrity(path, md5):
        raise InputError(f"--from {source}: no {name} with the MD5 {md5}; get it from {url}, or leave --from out")
    try:
        if not source:
            download_url(url, path.parent, name, md5)  # replaces a file there that is not the published one
    except (OSError, RuntimeError, HTTPException) as e:
        raise InputError(f"{path}: cannot be downloaded from {url} ({e}); run the same command again, or get the file, "
                         f"whose MD5 is {md5}, elsewhere and name its folder with --from") from None
    return path


def unpack(archive, base, wanted, root):
    """Unpack to `root` the files of a tar archive below `base` whose names start with one of `wanted`.

    Files that exist are skipped, and so are links and paths with "..".
    """
    print(f"unpacking {archive}", flush=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                target = root / member.name.removeprefix(base)
                if (member.isfile() and member.name.startswith(tuple(base + name for name in wanted))
                        and ".." not in target.parts
                        and not (target.is_file() and target.stat().st_size == member.size)):
                    content = tar.extractfile(member).read()
                    write_atomically(target, lambda f: f.write_bytes(content))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise InputError(f"{archive}: cannot be unpacked ({e}); remove it and run the same command again") from None


def write_label(target, ids, palette):
    """Write class ids (H,W) uint8 to `target` as a PNG of mode P."""
    image = Image.fromarray(ids).convert("P")
    image.putpalette(palette)
    write_atomically(target, lambda f: image.save(f, "PNG"))


def write_lists(root, lists, classes):
    """Write ImageSets/Segmentation/NAME.txt for {NAME: ids} and classes.txt for {name: (R, G, B)}."""
    files = {root / layouts.LIST_DIRS[0] / f"{name}.txt": ids for name, ids in lists.items()}
    files[root / "classes.txt"] = [f"{name} {r} {g} {b}" for name, (r, g, b) in classes.items()]
    for file, lines in files.items():
        write_atomically(file, lambda f: f.write_text("\n".join(lines) + "\n"))


def map_in_parallel(function, items, what):
    """Return [function(item)] in order, computed on all cores, with a progress bar."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        return data.map_in_parallel(function, items, what, cores)
    except BaseException:
        data.kill_workers()  # they would go on writing
        raise


def convert_sbd(job):
    """Convert (.mat file of SBD, target): GTcls.Segmentation, (H,W) uint8 in 0..20, to an index PNG."""
    from scipy.io import loadmat
    mat, target = job
    ids = np.ascontiguousarray(loadmat(mat)["GTcls"][0]["Segmentation"][0], np.uint8)
    write_label(target, ids, layouts.voc_palette())


def cityscapes(args):
    """Check a Cityscapes folder and write its lists and classes.txt; label ids are mapped when a label is read."""
    from torchvision.datasets import Cityscapes
    root = output_folder("--root", args.root)
    files = (layouts.index_cityscapes(root / "leftImg8bit", "_leftImg8bit.png"),
             layouts.index_cityscapes(root / "gtFine", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"))
    lists = {}
    for name in CITYSCAPES_COUNTS:
        lists[name], labels = ([i for i, f in found.items() if Path(f).parts[-3] == name] for found in files)
        if not lists[name] or not {*labels} >= {*lists[name]}:
            raise InputError(f"--root {root}: {len({*labels} & {*lists[name]})} of {len(lists[name])} images of {name} "
                             "have a label; unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there")
    classes = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < layouts.IGNORE), key=lambda c: c.train_id)
    write_lists(root, lists, {c.name.replace(" ", "_"): c.color for c in classes})
    summary = [f"{name} {len(ids):,} images (published: {CITYSCAPES_COUNTS[name]:,})" for name, ids in lists.items()]
    print(f"{root}: {'; '.join(summary)}; {len(classes)} classes")


def camvid(args):
    """Convert SegNet's CamVid folder (train/, trainannot/, val/, ...; label 11 is void) to VOC layout."""
    source, root = Path(args.source), output_folder("--root", args.root)
    lists, jobs = {}, []
    for name in ("train", "val", "test"):
        images, labels = (layouts.index_files(source / f"{name}{kind}", [".png"]) for kind in ("", "annot"))
        if unpaired := set(images) ^ set(labels):
            raise InputError(f"--from {source}: {min(unpaired)} is in only one of {name}/ and {name}annot/")
        if repeated := [i for ids in lists.values() for i in ids if i in images]:
            raise InputError(f"--from {source}: {repeated[0]} is in {name}/ and in another part")
        if images:
            lists[name] = sorted(images)
        jobs += [(images[i], labels[i], root) for i in images]
    if not {"train", "val"} <= set(lists):
        raise InputError(f"--from {source}: needs train/, trainannot/, val/ and valannot/ of SegNet's CamVid")
    map_in_parallel(convert_camvid, jobs, "converting")
    write_lists(root, lists, CAMVID_CLASSES)
    print(f"{root}: " + ", ".join(f"{name} {len(ids)} images" for name, ids in lists.items()) + ", 11 classes")


def convert_camvid(job):
    """Convert (image, label, root): copy the image and write the label with 255 for SegNet's 11."""
    image, label, root = job
    with catch_read_errors(label):
        ids = np.array(Image.open(label))
    if ids.ndim != 2 or ids.max() > len(CAMVID_CLASSES):
        raise InputError(f"{label}: is not an index image with values in 0..11; use SegNet's CamVid folder")
    palette = [*sum(CAMVID_CLASSES.values(), ()), *layouts.voc_palette()[3 * len(CAMVID_CLASSES):]]
    write_atomically(root / "JPEGImages" / Path(image).name, lambda f: shutil.copyfile(image, f))
    ids = np.where(ids == len(CAMVID_CLASSES), layouts.IGNORE, ids).astype(np.uint8)
    write_label(root / "SegmentationClassAug" / Path(label).name, ids, palette)


def import_(args):
    """Bring the labels of annotation tools and folders of masks to images/, labels/, classes.txt and lists/."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, it leaves no files behind
    importers.import_labels(args, map_in_parallel)


def inspect(sample):
    """Read a Sample; return (size or None, digest, data.Inspection or None, error or "")."""
    try:
        image = data.read_image(sample.image)
    except InputError as e:
        return None, "", None, str(e)
    return image.size, hashlib.sha256(image.tobytes()).hexdigest(), sample.label and data.inspect_label(sample), ""


def check(args):
    """Read every image and label; print counts, sizes, classes and problems. Exit status 1 if there are problems."""
    dataset = layouts.open_dataset(args.data)
    lists, bad_lists = {"train": [], "val": []}, []
    for name, names in ("train", layouts.TRAIN_LISTS), ("val", ["val"]):
        try:
            lists[name] = dataset.ids(*names)
        except InputError as e:
            bad_lists.append(str(e))
    train, val = lists.values()
    ids = sorted(dataset.images)
    samples = {i: dataset.samples([i], labels=i in dataset.labels)[0] for i in ids}
    sizes, digests, inspections, bad = zip(*map_in_parallel(inspect, list(samples.values()), "reading"))
    sizes, digests = Counter(filter(None, sizes)), dict(zip(ids, digests))
    inspections = {i: inspection for i, inspection in zip(ids, inspections) if inspection}
    bad_labels, warnings = [x.error for x in inspections.values() if x.error], []
    for part in (train, val):
        known = [i for i in part if i in inspections]
        found = data.find_problems([samples[i] for i in known], [inspections[i] for i in known], dataset)
        bad_labels, warnings = bad_labels + found[0], warnings + found[1]
    bad_labels, warnings = dict.fromkeys(bad_labels), dict.fromkeys(warnings)
    first = {digests[i]: i for i in reversed(train) if digests.get(i)}
    problems = {
        "bad files": [*bad_lists, *filter(None, bad), *bad_labels],
        "in a list, but not there": [f"{folder}/{i}" for i in train + val for folder, files in (
            (dataset.image_dir, dataset.images), (dataset.label_dir, dataset.labels)) if i not in files],
        "both in train and val": [i if i in train else f"{i} of val has the pixels of {first[digests[i]]} of train"
                                  for i in val if i in set(train) or digests.get(i) in first]}

    print(f"{dataset.note}data {dataset.name}: {len(ids):,} images, {len(dataset.labels):,} labels, "
          f"{len(dataset.classes)} classes; {len(train):,} training, {len(val):,} validation images")
    print("most common sizes: " + ", ".join(f"{w}x{h} {n:,}" for (w, h), n in sizes.most_common(8)))
    counts = {i: inspection.counts for i, inspection in inspections.items()}
    totals = [sum((counts[i] for i in part if i in counts), np.zeros(256, int)) for part in (train, val)]
    shares = [100 * total / max(1, total.sum()) for total in totals]
    print(f"{'share of pixels, percent':28}   train     val   label maps")
    for value, name in [*enumerate(dataset.classes), (layouts.IGNORE, "void")]:
        label_maps = sum(bool(c[value]) for c in counts.values())
        print(f"{value:4} {name:23} {shares[0][value]:7.2f} {shares[1][value]:7.2f} {label_maps:16,}")
    print(*(f"warning: {text}" for text in warnings), sep="\n", end="\n" * bool(warnings))
    for kind, found in problems.items():
        for line in found[:SHOWN] + [f"and {len(found) - SHOWN:,} more"] * (len(found) > SHOWN):
            print(f"problem, {kind}: {line}")
    print(f"{sum(map(len, problems.values())):,} problems" if any(problems.values()) else "no problems found")
    sys.exit(any(problems.values()))


def split(args):
    """Write and print the lists of a split, and how it was made."""
    dataset = layouts.open_dataset(args.data)
    ids = dataset.ids(args.list) if args.list else dataset.train_ids()
    labelled, unlabelled = layouts.split_ids(ids, args.split, args.split_seed)
    out = output_folder("--out", args.out or dataset.root / layouts.LIST_DIRS[0])
    prefix = f"{Path(args.list).stem}_" if args.list else ""
    for kind, part in (("labelled", labelled), ("unlabelled", unlabelled)):
        file = out / f"{kind}_{prefix}{args.split}_seed{args.split_seed}.txt"
        write_atomically(file, lambda f: f.write_text("".join(f"{i}\n" for i in part)))
        print(*part, f"{len(part):,} {kind} above, and in {file}", sep="\n")
    print(f"{dataset.note}protocol: {args.split:g} of the {len(ids):,} images of {args.list or 'the training list'},"
          f" {args.split * len(ids):.6g} rounded to {len(labelled):,} (halves to even), seed {args.split_seed}")


def next_(args):
    """Choose the images to label next, and write them with their predictions to a folder for an annotation tool."""
    import predict  # the other commands need no networks
    out, dataset, folder = Path(args.out), layouts.open_dataset(args.data), args.unlabelled
    if not args.out or os.path.lexists(out):
        raise InputError(f"--out {args.out}: exists; name a new folder")
    classes = list(read_checkpoint(args.ckpt, "--ckpt")["classes"])
    if classes != dataset.classes:
        raise InputError(f"--ckpt {args.ckpt}: its classes are {', '.join(classes)}, those of {dataset.root} "
                         f"{', '.join(dataset.classes)}; name a checkpoint that was trained on this data")
    folders = [x for x in (folder or dataset.unlabelled_folder,) if x]
    found = predict.find_images(folders) + ([] if folder else [Path(x) for x in dataset.images.values()])
    paths = [path for path in found if path.stem not in dataset.labels]
    if len(paths) < args.count:
        raise InputError(f"--count {args.count}: {folder or dataset.root} has {len(paths)} images without labels "
                         f"({len(found) - len(paths)} are labelled already); lower it, or name more with --unlabelled")
    with catch_write_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent)
    with work as work:
        new, predictions = Path(work) / "new", Path(work) / "predictions"
        predict.main(predict.flags().parse_args(["--ckpt", args.ckpt, "--gpu", str(args.gpu), "--rank", "--out",
                                                 str(predictions), "--", *map(str, paths)]))
        with open(predictions / "ranking.csv", newline="") as file:
            chosen = [Path(row["image"]) for row in csv.DictReader(file)][:args.count]
        with catch_write_errors(out):
            (new / "images").mkdir(parents=True)
            for path in chosen:
                (os.symlink if args.link else shutil.copy2)(path.absolute(), new / "images" / path.name)
            for name in ("ranking.csv", "ranking.html"):
                shutil.copy2(predictions / name, new)
            labels = [predictions / f"{path.stem}.png" for path in chosen]
            if args.format == "palette":
                (new / "labels").mkdir()
                for label in labels:
                    shutil.copy2(label, new / "labels")
            else:
                name = f"predictions{exporters.SUFFIXES[args.format]}"
                exporters.WRITERS[args.format](new / name, chosen, labels, classes, dataset.palette)
            os.replace(new, out)
    background = f" --background {classes[0]}" * (args.format == "coco")
    print(f"{out}: {len(chosen)} of {len(paths)} images without labels, and their predictions; when they are labelled: "
          f"python prepare.py import EXPORT --add {dataset.root}{background}")


def main(args):
    args.run(args)


def flags():
    p = Parser(__doc__)
    commands = p.add_subparsers(metavar="COMMAND", required=True)

    def command(run):
        p = commands.add_parser(run.__name__.strip("_"), description=run.__doc__, help=run.__doc__)
        p.set_defaults(run=run)
        return p.add_argument

    flag = command(voc)
    flag("--root", default=layouts.VOC_ROOT, help=f"destination (default {layouts.VOC_ROOT}; 2 GB, archives 3.5 GB)")
    flag("--from", dest="source", metavar="DIR", help="folder of the archives, instead of downloading them")
    flag = command(cityscapes)
    flag("--root", required=True, help="folder that holds leftImg8bit and gtFine")
    flag = command(camvid)
    flag("--from", dest="source", metavar="DIR", required=True, help="folder that holds train, trainannot, ...")
    flag("--root", default="data/camvid", help="destination (default data/camvid)")
    flag = command(import_)
    flag("source", nargs="+", metavar="SOURCE", help="folders, .zip files or COCO .json files of images and labels")
    flag("--out", metavar="DIR", help="new folder for the data set")
    flag("--add", metavar="DIR", help="data set to add to, instead of --out; its classes are matched by name")
    flag("--labels", metavar="DIR", help="folder of the label maps, if it is not found, or several could be it")
    flag("--classes", metavar="FILE", help="file of the class names (default: found in SOURCE)")
    flag("--background", metavar="NAME", help="name of class 0, the pixels without annotation (default background). If "
         "given, images that a COCO file lists without annotations are this class; else they stay unlabelled")
    flag("--kind", choices=importers.MASK_KINDS + importers.SHAPE_KINDS, help="kind of labels (default: recognised)."
         " levels: grey levels in order are the classes; colour: the colours in the file of class names")
    flag("--only", metavar="A,B", help="classes to keep (default all); the others become background")
    flag("--others", choices=["background", "void"], default="background", help="what --only makes of the others "
         "(default background; void is ignored)")
    flag("--merge", action="append", metavar="NEW=A+B", help="classes to join into one; can be given several times")
    flag("--link", action="store_true", help="link to the images instead of copying them")
    command(check)("--data", metavar="ROOT", help="data set (default data/VOC2012 if it is there, else shapes)")
    flag = command(split)
    flag("--data", metavar="ROOT", help="data set (default data/VOC2012 if it is there, else shapes)")
    flag("--split", type=float, default=0.5, help="labelled fraction, above 0 and at most 1 (default 0.5)")
    flag("--split-seed", type=int, default=0, help="random seed of the split (default 0)")
    flag("--list", help="list to split (default: the training list; on VOC `train` has 1,464 images)")
    flag("--out", metavar="DIR", help="folder for the lists (default ROOT/ImageSets/Segmentation)")
    flag = command(next_)
    flag("--data", metavar="ROOT", required=True, help="data set with classes.txt, in which some images have no label")
    flag("--unlabelled", metavar="DIR", help="folder of the images to choose from (default: ROOT/unlabelled and the "
         "images without labels)")
    flag("--ckpt", required=True, metavar="FILE", help="last.pt or best.pt of a training on ROOT")
    flag("--count", type=POSITIVE_INT, default=20, help="images to choose (default 20)")
    flag("--format", choices=["palette", *exporters.WRITERS], default="cvat", help="of the predictions: cvat "
         "(default, predictions.zip), coco (predictions.json), or palette (a folder labels)")
    flag("--out", metavar="DIR", required=True, help="new folder")
    flag("--link", action="store_true", help="link to the images instead of copying them")
    flag("--gpu", type=int, default=0, help="CUDA device (default 0); -1 is the CPU")
    return p


if __name__ == "__main__":
    launch(main, flags)
