"""Reading checkpoint files, ours and published ones, and loading their weights into a network."""
import re
import textwrap
import zipfile
from pathlib import Path

from common.console import InputError
from common.layouts import VOC_CLASSES, voc_palette

import numpy as np
import torch
from safetensors.torch import load_file

COCO_FILE = Path("data/MS_DeepLab_resnet_pretrained_COCO_init.pth")  # of --init coco: DeepLabv2 trained on MS-COCO
# Args that are assumed for files which do not record them.
OLDER_ARGS = {"norm": "imagenet", "caffe": False, "aspp_branches": 4, "input_scale": 1, "palette": voc_palette(),
              "class_weights": "none"}
# Entries of a checkpoint other than the registered parts.
METADATA = {"step", "args", "classes", "rng", "miou", "minutes"}


def read_checkpoint(path, flag, mmap=False, initial=False):
    """Return our checkpoint dict; published DeepLabv2 and ResNet files are converted to it.

    mmap: leave the tensors in the file if its format allows that. initial: of other files with a state dict, such as
    those of timm or DINOv2, return {"backbone": state dict, "args": ...}. Raises an InputError, which names `flag`, if
    the file is none of these.
    """
    scalar = np.float64().__reduce__()[0]  # the 2017 reproduction has one, under either numpy name
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    advice = "name the last.pt or best.pt of a training run, or a published file (recipes/README.md)"
    advice += ", or weights of the backbone (docs/backbones.md)" * initial
    try:
        with open(path, "rb"), torch.serialization.safe_globals([*allowed, np.dtype, type(np.dtype("f8"))]):
            checkpoint = load_file(path) if str(path).endswith(".safetensors") else torch.load(
                path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as e:  # the unpickler raises nearly anything on a file that is no checkpoint
        why = e.strerror if isinstance(e, OSError) and e.strerror else "damaged, or not a file of torch.save"
        raise InputError(f"{flag} {path}: {why}; {advice}") from None
    ours = isinstance(checkpoint, dict) and {"seg", "args", "classes", "step"} <= set(checkpoint)
    found = checkpoint if ours else convert_published(checkpoint)
    if initial and found is None:
        parts = checkpoint if isinstance(checkpoint, dict) else {}
        weights = parts.get("state_dict", parts.get("model", parts))
        if weights and is_state_dict(weights):
            return {"backbone": weights, "args": OLDER_ARGS}
    types = {"args": dict, "classes": (list, tuple), "step": int}
    if (found is None or not is_state_dict(found["seg"]) or any(not isinstance(found[k], types[k]) for k in types)
            or found["args"].get("norm", "none") not in ("imagenet", "caffe", "none")):
        raise InputError(f"{flag} {path}: not a supported checkpoint; {advice}")
    return found | {"args": OLDER_ARGS | found["args"]}


def part_names(checkpoint):
    """Return the names of the parts (networks, optimisers) in a checkpoint; older files have None for missing ones."""
    return {name for name, part in checkpoint.items() if name not in METADATA and part is not None}


def is_state_dict(x):
    return isinstance(x, dict) and all(isinstance(k, str) and isinstance(w, torch.Tensor) for k, w in x.items())


def convert_published(theirs):
    """Return our checkpoint dict made from the weights in a published file, or None if the file is unknown.

    Known are DeepLabv2 on Caffe's ResNet, by the authors (a plain state dict; the first 2 of their 4 branches run), by
    the 2017 reproduction (a dict with epoch and miou) and for MS-COCO, and torchvision's ImageNet ResNets.
    """
    is_of_2017 = isinstance(theirs, dict) and {"epoch", "state_dict", "miou"} <= set(theirs)
    weights = theirs["state_dict"] if is_of_2017 else theirs
    if not is_state_dict(weights):
        return None
    is_plain = not is_of_2017 and not any(k.startswith("Scale.") for k in weights)
    weights = {k.removeprefix("module.").removeprefix("Scale."): w for k, w in weights.items()}
    depths = tuple(len({k.split(".")[1] for k in weights if k.startswith(f"layer{n}.")}) for n in "1234")
    backbone = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}.get(depths)
    caffe = any(k.startswith("layer5.") for k in weights)
    has_bottlenecks, has_fc = "layer1.0.conv3.weight" in weights, "fc.weight" in weights
    if not backbone or has_bottlenecks == (backbone == "resnet18") or caffe == has_fc:
        return None
    seg = {name.replace("layer5.conv2d_list", "head") if name.startswith("layer5.") else f"backbone.{name}": w
           for name, w in weights.items() if not name.startswith("fc.")}
    classes = next((len(w) for k, w in seg.items() if k.startswith("head.") and w.dim()), 0)
    args = {"backbone": backbone, "stride": 8, "bn": "train", "caffe": caffe, "aspp_branches": 2 if is_plain else 4,
            "norm": "imagenet" if is_of_2017 or not caffe else "caffe"}
    return {"seg": seg, "args": args, "step": 0,
            "classes": VOC_CLASSES if classes == len(VOC_CLASSES) else [f"class {n}" for n in range(classes)]}


def read_initial_weights(init, mmap=False):
    """Return the checkpoint dict that --init names; None for "imagenet" and "none", which need no file."""
    if init in ("imagenet", "none"):
        return None
    if init == "coco" and not COCO_FILE.is_file():
        raise InputError(f"--init coco: {COCO_FILE} is missing; put the file there or name it with --init FILE")
    return read_checkpoint(COCO_FILE if init == "coco" else init, "--init", mmap, initial=True)


def load_weights(seg, theirs, where, new_classifier=False):
    """Load the state dict `theirs` into `seg`, without classifier branches that `seg` does not have.

    where: flag and file, for messages. new_classifier: keep the classifier of `seg` if the file has none, or one for
    another number of classes. Raises an InputError if keys are missing, unexpected or of another shape.
    """
    ours = seg.state_dict()
    skipped = {k for k in ours if k.endswith("num_batches_tracked") and k not in theirs}  # which old files lack
    unused = {k for k in theirs if re.match(r"head\.\d", k) and k not in ours}
    bias = theirs.get("head.0.bias")
    if new_classifier and (not any(k.startswith("head.") for k in theirs) or
                           (bias is not None and bias.shape != ours["head.0.bias"].shape)):
        print(f"{where}: the file has no classifier for these classes; the classifier is initialised randomly")
        skipped |= {k for k in ours if k.startswith("head.")}
    elif unused:
        print(f"{where}: {len(seg.head)} of its {len(seg.head) + len(unused) // 2} branches are used")
    try:
        seg.load_state_dict({k: w for k, w in theirs.items() if k not in unused} | {k: ours[k] for k in skipped})
    except RuntimeError as e:
        why = textwrap.shorten(str(e).partition("\n")[2], 400)
        raise InputError(f"{where}: does not fit this network: {why}; use the flags it was trained with") from None
