"""The operators that touch full-resolution logits, each beside its definition in plain PyTorch (`*_reference`).

Bilinear interpolation is `align_corners=True` throughout; K <= 255 classes; half types are computed in float32 and
float64 in float64. Wrong shapes, dtypes and devices raise ValueError naming the argument. A label outside 0..K-1 that
is not `ignore` raises ValueError on the CPU; on CUDA, where looking would synchronise, it makes the loss NaN and the
first cell of the matrix negative, on which `mean_iou` raises.
"""
import os
from functools import cache

import torch
import torch.nn.functional as F

from common.console import InputError
from csrc import build, checks

SEG_OPS = os.environ.get("SEG_OPS", "auto")


@torch.compiler.assume_constant_result
def in_use(device="cpu"):
    """The path that tensors on "cpu" or "cuda" take: "kernel", or "reference" with the reason behind it.

    Kernels take float32 and bfloat16, on CUDA float16 too. Builds them on the first call, of which build.note tells.
    Errors: InputError where SEG_OPS is wrong, or asks for kernels that do not build.
    """
    return _choose(device)


def describe(device="cpu"):
    """Return in_use(device) and what the build of the kernels reported, for the first line of a command."""
    return in_use(device) + build.note


@cache
def _choose(device="cpu"):
    if SEG_OPS not in ("auto", "reference", "kernel"):
        raise InputError(f"SEG_OPS={SEG_OPS}: it must be auto, reference or kernel")
    if SEG_OPS == "reference" or device not in ("cpu", "cuda"):
        return "reference"
    try:
        build.load(device)
    except RuntimeError as e:
        if SEG_OPS == "kernel":
            raise InputError(f"SEG_OPS=kernel: {e}; mend that, or use SEG_OPS=reference") from None
        return f"reference ({e})"
    return "kernel"


def _kernel(x, *dtypes):
    """Whether x, of which nothing is empty, and these dtypes go to the kernels."""
    device = x.device.type
    known = (torch.float32, torch.bfloat16, torch.float16)[:3 if device == "cuda" else 2]
    return 0 not in x.shape and in_use(device) == "kernel" and all(d in known for d in dtypes)


def _kernel_resizes(logits, size, *dtypes):
    return logits.shape[2:] != size and _kernel(logits, logits.dtype, *dtypes)


def _call(kernel, *args):
    try:
        return kernel(*args)
    except RuntimeError as e:  # from torch 2.15 on a kernel's ValueError is one
        raise (ValueError(str(e)) if ", outside 0.." in str(e) else e) from None


def masked_cross_entropy(logits, target=None, confidence=None, *, valid=None, threshold=0.5, size=None, ignore=255,
                         divide="kept"):
    """Cross entropy of upsampled logits over the pixels that count -> (loss, kept).

    logits      (N,K,h,w) at any resolution; the only input that gets a gradient
    target      (N,H,W) uint8 or int64, or None: the argmax of the upsampled logits, lowest class on a tie
    confidence  (N,1,a,b) logits at any resolution: a pixel counts where sigmoid(upsampled) > threshold; NaN does not
                (the kernels compare logits, so that no sigmoid rounds to the threshold)
    valid       (N,H,W) bool, False on padding
    size        (H,W); target's by default, else valid's
    divide      "kept": by the pixels counted; "all": by all that are valid and not `ignore`

    loss: float32 scalar (float64 for float64 logits), 0 with zero gradient where no pixel counts. kept: int64 scalar,
    pixels counted. With `target=None` this is the self-taught loss of Hung et al. 2018, eq. 5.
    """
    size = checks.cross_entropy(logits, target, confidence, valid, size, divide)
    if not _kernel_resizes(logits, size):
        return masked_cross_entropy_reference(logits, target, confidence, valid=valid, threshold=threshold, size=size,
                                              ignore=ignore, divide=divide)
    if target is None:
        target, ignore = upsample_argmax(logits, size), -1
    labels, counts = _label_map(target, confidence, valid, threshold, logits.shape[1], ignore)
    kept, everything, bad = counts.unbind()
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    total, _ = torch.ops.seg_ops.cross_entropy(logits, labels, with_grad)
    loss = total / (kept if divide == "kept" else everything).clamp(min=1)
    return (loss if _can_look(loss) else loss.where(bad == 0, torch.nan)), kept


def select_labels(labels, confidence, *, valid=None, threshold=0.5):
    """Return labels (N,H,W) uint8 or int64 as uint8, 255 where not valid or the confidence is not above the threshold.

    confidence: (N,1,a,b) logits at any resolution; the sigmoid of the upsampled logit is compared, and NaN is not above
    anything. valid: (N,H,W) bool. The cross entropy against the result is
    masked_cross_entropy(logits, labels, confidence, valid=valid, threshold=threshold).
    """
    checks.tensor(labels, "labels", (len(labels), None, None), checks.IDS, labels.device)
    checks.masks(len(labels), labels.shape[1:], labels.device, valid, confidence)
    if not _kernel(labels):
        return select_labels_reference(labels, confidence, valid=valid, threshold=threshold)
    return _label_map(labels, confidence, valid, threshold, 255, 255)[0]


def _label_map(target, confidence, valid, threshold, num_classes, ignore):
    """Return one byte a pixel, its class or 255 where it does not count, and (counted, valid, bad) pixels."""
    confidence = confidence if confidence is None else confidence.float()
    target, confidence, valid = (x if x is None else x.detach().contiguous() for x in (target, confidence, valid))
    limit = torch.ones(()) * threshold
    return _call(torch.ops.seg_ops.label_map, target, confidence, valid, limit, num_classes, ignore)


def upsample_softmax(logits, size=None, dtype=None, valid=None):
    """Class probabilities (N,K,H,W) of logits (N,K,h,w) upsampled to `size`, by default valid's; channels last.

    In the active autocast's dtype unless `dtype` is given, else in the logits'. Where valid (N,H,W) bool is False all K
    are 0, and so is their gradient.
    """
    checks.logits(logits)
    size = checks.size_of(size, valid)
    checks.masks(len(logits), size, logits.device, valid)
    dtype = dtype or autocast_dtype(logits, logits.dtype)
    if not _kernel_resizes(logits, size, dtype):
        return upsample_softmax_reference(logits, size, dtype, valid)
    valid = valid if valid is None else valid.contiguous()
    return torch.ops.seg_ops.upsample_softmax(logits, valid, *size, dtype).permute(0, 3, 1, 2)


def upsample_argmax(logits, size):
    """Class ids (N,H,W) uint8 of logits (N,K,h,w) upsampled to `size`: the most probable, the lowest class on a tie."""
    checks.logits(logits)
    size = checks.size_of(size)
    if logits.shape[2:] == size:
        return logits.max(1).indices.to(torch.uint8)  # two to five times faster than argmax
    if not _kernel_resizes(logits, size):
        return upsample_argmax_reference(logits, size)
    return torch.ops.seg_ops.upsample_argmax(logits.detach(), *size)


def pseudo_labels(logits, size, confidence, valid=None):
    """upsample_argmax, but 255 where the largest probability is not above `confidence`, or valid (N,H,W) is False.

    confidence: a number, or (K,) float32, of which that of the argmax counts. A NaN is above nothing.
    """
    size = checks.pseudo_labels(logits, size, confidence, valid)
    if not _kernel_resizes(logits, size):
        return pseudo_labels_reference(logits, size, confidence, valid)
    limits = torch.ones(logits.shape[1], device=logits.device) * confidence
    valid = valid if valid is None else valid.contiguous()
    return torch.ops.seg_ops.upsample_argmax(logits.detach(), *size, limits.detach(), valid)


def confusion_matrix(prediction, target, num_classes=None, *, ignore=255, out=None):
    """(K,K) int64 counts, rows truth, columns prediction; pixels whose target is `ignore` do not count.

    prediction: (N,K,h,w) logits, upsampled to the target and argmaxed on the way, or (N,H,W) class ids with
    `num_classes` given. target: (N,H,W) uint8 or int64. Adds into `out` where given, and returns it.
    """
    num_classes = checks.confusion(prediction, target, num_classes, out)
    if prediction.is_floating_point() and not _kernel_resizes(prediction, target.shape[1:]):
        prediction = upsample_argmax(prediction, target.shape[1:])
    if not _kernel(target):
        return confusion_matrix_reference(prediction, target, num_classes, ignore=ignore, out=out)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=target.device)
    prediction = prediction.detach() if prediction.is_floating_point() else prediction.contiguous()
    _call(torch.ops.seg_ops.confusion_matrix, prediction, target.contiguous(), ignore, matrix)
    return matrix if out is None else out.add_(matrix)


def mean_iou(matrix, absent="exclude"):
    """(miou, per_class) of a confusion matrix: a float and a (K,) float64 tensor, fractions in 0..1.

    IoU = diagonal / (row + column - diagonal), as the VOC devkit counts. A class absent from truth and prediction is
    NaN in per_class; the mean leaves it out ("exclude") or counts it as 0 ("zero").
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be (K,K), got {tuple(matrix.shape)}")
    if absent not in ("exclude", "zero"):
        raise ValueError(f"absent must be 'exclude' or 'zero', got {absent!r}")
    matrix = matrix.double().cpu()
    if (matrix < 0).any():
        raise ValueError("matrix has a negative cell: a label outside 0..K-1 was counted")
    true = matrix.diagonal()
    per_class = true / (matrix.sum(0) + matrix.sum(1) - true)  # 0/0 is NaN: absent
    mean = per_class.nanmean() if absent == "exclude" else per_class.nan_to_num(0).mean()
    return mean.item(), per_class


def masked_cross_entropy_reference(logits, target=None, confidence=None, *, valid=None, threshold=0.5, size=None,
                                   ignore=255, divide="kept"):
    size = checks.cross_entropy(logits, target, confidence, valid, size, divide)
    k = logits.shape[1]
    upsampled = _upsample(logits, size)  # (N,K,H,W)
    if target is None:
        labels = upsampled.argmax(1)  # (N,H,W)
        counts, bad = torch.ones_like(labels, dtype=torch.bool), labels.new_zeros((), dtype=torch.bool)
    else:
        counts = target.long() != ignore  # as bytes 300 would be 44
        labels, bad = _in_range(target, counts, k, "target")
    if valid is not None:
        counts = counts & valid
    everything = counts.sum()
    if confidence is not None:
        counts = counts & (_upsample(confidence.detach(), size)[:, 0].sigmoid() > threshold)
    kept = counts.sum()
    # where() and not a product: a NaN on a pixel that does not count must reach neither the loss nor the gradient
    upsampled = upsampled.where(counts[:, None], upsampled.new_zeros(()))
    labels = labels.where(counts, labels.new_full((), -100))  # cross_entropy's own "ignore"
    loss = F.cross_entropy(upsampled, labels, ignore_index=-100, reduction="sum")
    loss = loss / (kept if divide == "kept" else everything).clamp(min=1)
    return loss.where(~bad, torch.nan), kept


def select_labels_reference(labels, confidence, *, valid=None, threshold=0.5):
    labels, _ = _in_range(labels, labels.long() != 255, 255, "labels", otherwise=255)
    selected = _upsample(confidence.detach(), labels.shape[1:])[:, 0].sigmoid() > threshold
    return labels.where(selected if valid is None else selected & valid, 255).to(torch.uint8)


def upsample_softmax_reference(logits, size=None, dtype=None, valid=None):
    upsampled = _upsample(logits, checks.size_of(size, valid))
    dtype = dtype or autocast_dtype(logits, logits.dtype)
    if valid is None:
        return upsampled.softmax(1).to(dtype)
    zero = upsampled.new_zeros(())  # before and after: a NaN that is not valid reaches neither result nor gradient
    probabilities = upsampled.where(valid[:, None], zero).softmax(1)
    return probabilities.where(valid[:, None], zero).to(dtype)


def upsample_argmax_reference(logits, size):
    return _upsample(logits, size).argmax(1).to(torch.uint8)


def pseudo_labels_reference(logits, size, confidence, valid=None):
    upsampled = _upsample(logits.detach(), size)
    ids, largest = upsampled.argmax(1), upsampled.softmax(1).amax(1)  # (N,H,W)
    limits = upsampled.new_ones(upsampled.shape[1]) * confidence
    sure = largest > limits[ids]
    return ids.where(sure if valid is None else sure & valid, 255).to(torch.uint8)


def confusion_matrix_reference(prediction, target, num_classes=None, *, ignore=255, out=None):
    num_classes = checks.confusion(prediction, target, num_classes, out)
    if prediction.is_floating_point():
        prediction = upsample_argmax_reference(prediction, target.shape[1:])
    cells = num_classes * num_classes
    counts = target.long() != ignore
    truth, bad = _in_range(target, counts, num_classes, "target")
    guess, bad_guess = _in_range(prediction, counts, num_classes, "prediction")
    cell = (truth * num_classes + guess).where(counts, truth.new_full((), cells))  # one more cell for what is ignored
    matrix = torch.zeros(cells + 1, dtype=torch.int64, device=target.device)
    matrix.scatter_add_(0, cell.flatten(), torch.ones_like(cell).flatten())
    matrix = matrix[:-1].view(num_classes, num_classes)
    matrix[0, 0] -= (bad | bad_guess).to(torch.int64) << 44  # far below any count, and many of them do not wrap
    return matrix if out is None else out.add_(matrix)


def autocast_dtype(x, otherwise):
    """The dtype of the autocast that is active on x's device, `otherwise` where none is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else otherwise


def _upsample(x, size):
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[2:] == tuple(size):
        return x  # interpolation would multiply neighbours by 0, and infinite ones by that to NaN
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def _in_range(x, counts, k, name, otherwise=0):
    """int64 labels, `otherwise` if they do not count or are out of range, and whether any was: on the CPU an error."""
    x = x.long()
    outside = ((x < 0) | (x >= k)) & counts
    if _can_look(x) and outside.any():
        raise ValueError(f"{name} holds {x[outside][0].item()}, outside 0..{k - 1} and not ignored")
    return x.where(counts & ~outside, otherwise), outside.any()


def _can_look(x):
    """Whether reading a value costs no synchronisation with a device."""
    return x.device.type == "cpu"
