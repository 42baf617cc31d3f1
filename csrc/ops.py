"""The operators on full-resolution logits, each with its definition in plain PyTorch (`*_reference`).

Bilinear interpolation uses `align_corners=True` throughout. Half types are computed in float32, float64 in float64.

Raises:
    ValueError: a wrong shape, dtype or device, or more than 255 classes; the message names the argument. On the CPU
        also a label outside 0..K-1 that is not `ignore`. On CUDA such a label makes the loss NaN and the first cell of
        the matrix negative (`mean_iou` then raises), because reading a value would synchronise.
"""
import os
from collections import defaultdict
from functools import cache

from common.console import InputError

import torch
import torch.nn.functional as F

from csrc import autograd, build, checks

# dtypes that the kernels take
SUPPORTED = defaultdict(set, cpu={torch.float32, torch.bfloat16}, cuda={torch.float32, torch.bfloat16, torch.float16})
HALF = torch.tensor(0.5)
SEG_OPS = os.environ.get("SEG_OPS", "auto")


@torch.compiler.assume_constant_result
def in_use(device="cpu"):
    """Return "kernel", or "reference" with a reason, for tensors on "cpu" or "cuda"; the first call builds the kernels.

    Raises InputError if SEG_OPS has an unknown value, or is "kernel" and they cannot be built.
    """
    return _choose(device)


def describe(device="cpu"):
    """Return in_use(device) and how long the build took, if there was one, for the first line of a command."""
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
            raise InputError(f"SEG_OPS=kernel: {e}; fix that, or use SEG_OPS=reference") from None
        return f"reference ({e})"
    return "kernel"


def _uses_kernel(x, *dtypes, size=None):
    """Return whether the kernels support x's device and these dtypes; False if x is empty or has the size `size`."""
    device, shape = x.device.type, x.shape
    fits = 0 not in shape and shape[2:] != size and SUPPORTED[device].issuperset(dtypes)
    return fits and in_use(device) == "kernel"


def _call_kernel(kernel, *args, name="target"):
    """Call a kernel; a label outside 0..K-1 raises a ValueError that calls the argument `name`, not "target"."""
    try:
        return kernel(*args)
    except (RuntimeError, ValueError) as e:  # RuntimeError since torch 2.15
        raise (ValueError(str(e).replace("target", name)) if ", outside 0.." in str(e) else e) from None


def masked_cross_entropy(logits, target=None, confidence=None, *, valid=None, threshold=0.5, size=None, ignore=255,
                         divide="kept", weight=None):
    """Return (loss, kept): the cross entropy of upsampled logits over the selected pixels, and how many these are.

    The loss is a float32 scalar (float64 for float64 logits), 0 with zero gradient if no pixel is selected; kept is an
    int64 scalar. With target=None this is the self-training loss of Hung et al. 2018, eq. 5.

    Args:
        logits: (N,K,h,w) at any resolution; the only differentiable argument.
        target: (N,H,W) uint8 or int64, or None: the argmax of the upsampled logits, the lowest class on a tie.
        confidence: (N,1,a,b) logits at any resolution; a pixel is selected if sigmoid(upsampled) > threshold, never if
            that is NaN. The kernels compare logits, not rounded sigmoids.
        valid: (N,H,W) bool, False on padding.
        size: (H,W); default: that of target, else that of valid.
        divide: "kept" divides by the number of selected pixels; "all" by that of valid pixels that are not `ignore`.
        weight: (K,) float32, as in F.cross_entropy: a pixel's loss is multiplied by the weight of its label, and the
            sum is divided by the sum of these weights instead of the number of pixels.
    """
    if divide not in ("kept", "all"):
        raise ValueError(f"divide must be 'kept' or 'all', got {divide!r}")
    size = checks.upsampling(logits, size, valid, confidence, target)
    checks.weights(weight, logits.shape[1], logits.device)
    if not _uses_kernel(logits, logits.dtype, getattr(confidence, "dtype", logits.dtype), size=size):
        return masked_cross_entropy_reference(logits, target, confidence, valid=valid, threshold=threshold, size=size,
                                              ignore=ignore, divide=divide, weight=weight)
    if target is None:
        target, ignore = upsample_argmax(logits, size), -1
    labels, counts = _label_map(target, confidence, valid, threshold, logits.shape[1], ignore)
    kept, divisor = counts.select(0, 0), None
    if weight is None:
        divisor = (kept if divide == "kept" else counts[1]).clamp(min=1)
    else:
        weight = weight.detach().contiguous()
        if divide == "all":
            divisor = sum_of_weights(_label_map(target, None, valid, None, logits.shape[1], ignore)[0], weight)
            divisor = divisor.where(divisor != 0, 1)
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    loss = autograd.CrossEntropy.apply(logits, labels, with_grad, weight, divisor)
    return (loss if _can_read_values(loss) else loss.where(counts[2] == 0, torch.nan)), kept


def select_labels(labels, confidence, *, valid=None, threshold=0.5):
    """Return labels (N,H,W) uint8, 255 on pixels that masked_cross_entropy would not select.

    labels: (N,H,W) uint8 or int64. confidence (None: all pixels are confident), valid, threshold: as there.
    """
    checks.tensor(labels, "labels", (None, None, None), checks.IDS, labels.device)
    checks.masks(len(labels), labels.shape[1:], labels.device, valid, confidence)
    if not _uses_kernel(labels, getattr(confidence, "dtype", torch.float32)):
        return select_labels_reference(labels, confidence, valid=valid, threshold=threshold)
    return _label_map(labels, confidence, valid, threshold, 255, 255, name="labels")[0]


def _label_map(target, confidence, valid, threshold, num_classes, ignore, name="target"):
    """Return labels (N,H,W) uint8, 255 if not selected, and the numbers of pixels (selected, not ignored, invalid)."""
    limit = HALF
    if confidence is not None:
        confidence, limit = confidence.detach().float().contiguous(), torch.ones(()) * threshold
    target, valid = target.contiguous(), valid if valid is None else valid.contiguous()
    return _call_kernel(torch.ops.seg_ops.label_map, target, confidence, valid, limit, num_classes, ignore, name=name)


def sum_of_weights(labels, weight):
    """Return the sum (float32 scalar) of the weights (K,) float32 of labels (N,H,W) that are not 255."""
    pixels = confusion_matrix(labels, labels, len(weight)).diagonal()  # (K,)
    return (pixels * weight.double()).sum().float()


def upsample_softmax(logits, size=None, dtype=None, valid=None):
    """Return class probabilities (N,K,H,W), channels last, of logits (N,K,h,w) upsampled to `size` (default: valid's).

    valid: (N,H,W) bool; if False, probabilities and gradient are 0. dtype: default the active autocast's, else logits'.
    """
    size = checks.upsampling(logits, size, valid)
    dtype = dtype or autocast_dtype(logits, logits.dtype)
    if not _uses_kernel(logits, logits.dtype, dtype, size=size):
        return upsample_softmax_reference(logits, size, dtype, valid)
    valid = valid if valid is None else valid.contiguous()
    return torch.ops.seg_ops.upsample_softmax(logits, valid, *size, dtype).permute(0, 3, 1, 2)


def upsample_argmax(logits, size):
    """Return the argmax (N,H,W) uint8 of logits (N,K,h,w) upsampled to `size`, the lowest class on a tie."""
    size = checks.upsampling(logits, size)
    if not _uses_kernel(logits, logits.dtype, size=size):
        return upsample_argmax_reference(logits, size)
    return torch.ops.seg_ops.upsample_argmax(logits.detach(), *size)


def pseudo_labels(logits, size, confidence, valid=None):
    """Return upsample_argmax(logits, size), but 255 if the probability is not above `confidence`, or valid is False.

    confidence: a number, or (K,) float32, the limit of each predicted class. valid: (N,H,W) bool. NaN is above none.
    """
    size = checks.upsampling(logits, size, valid)
    if isinstance(confidence, torch.Tensor):
        checks.tensor(confidence, "confidence", (logits.shape[1],), (torch.float32,), logits.device)
    if not _uses_kernel(logits, logits.dtype, size=size):
        return pseudo_labels_reference(logits, size, confidence, valid)
    limits = torch.ones(logits.shape[1], device=logits.device) * confidence
    valid = valid if valid is None else valid.contiguous()
    return torch.ops.seg_ops.upsample_argmax(logits.detach(), *size, limits.detach(), valid)


def confusion_matrix(prediction, target, num_classes=None, *, ignore=255, out=None):
    """Return the confusion matrix (K,K) int64, rows truth, columns prediction, of pixels that are not `ignore`.

    prediction: (N,K,h,w) logits, of which the upsampled argmax is taken, or (N,H,W) uint8 or int64 class ids, for which
    num_classes is required. target: (N,H,W) uint8 or int64. out: a matrix to add to and return.
    """
    num_classes = checks.confusion(prediction, target, num_classes, out)
    size = target.shape[1:]
    if prediction.is_floating_point() and not _uses_kernel(prediction, prediction.dtype, size=size):
        prediction = upsample_argmax(prediction, size)
    if not _uses_kernel(target):
        return confusion_matrix_reference(prediction, target, num_classes, ignore=ignore, out=out)
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=target.device)
    prediction = prediction.detach() if prediction.is_floating_point() else prediction.contiguous()
    _call_kernel(torch.ops.seg_ops.confusion_matrix, prediction, target.contiguous(), ignore, matrix)
    return matrix if out is None else out.add_(matrix)


def mean_iou(matrix, absent="exclude"):
    """Return (miou, per_class) of a confusion matrix: a float and a (K,) float64 tensor, fractions in 0..1.

    IoU = diagonal / (row + column - diagonal), as in the VOC devkit. A class absent from truth and prediction is NaN in
    per_class; the mean leaves it out ("exclude") or takes it as 0 ("zero").
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be (K,K), got {tuple(matrix.shape)}")
    if absent not in ("exclude", "zero"):
        raise ValueError(f"absent must be 'exclude' or 'zero', got {absent!r}")
    matrix = matrix.cpu().double()
    if (matrix < 0).any():
        raise ValueError("matrix has a negative cell: a label outside 0..K-1 was counted")
    true = matrix.diagonal()
    per_class = true / (matrix.sum(0) + matrix.sum(1) - true)  # 0/0 is NaN: absent
    mean = per_class.nanmean() if absent == "exclude" else per_class.nan_to_num(0).mean()
    return mean.item(), per_class


def masked_cross_entropy_reference(logits, target=None, confidence=None, *, valid=None, threshold=0.5, size=None,
                                   ignore=255, divide="kept", weight=None):
    size = checks.upsampling(logits, size, valid, confidence, target)
    checks.weights(weight, logits.shape[1], logits.device)
    upsampled = _upsample(logits, size)  # (N,K,H,W)
    if target is None:
        target, ignore = upsampled.argmax(1), -1  # (N,H,W)
    selected = target.long() != ignore  # as uint8 an ignore of 300 would be 44
    labels, wrong = _in_range(target, selected, logits.shape[1], "target")
    if valid is not None:
        selected = selected & valid
    counted = selected  # with divide="all"
    if confidence is not None:
        selected = selected & (_upsample(confidence.detach(), size)[:, 0].sigmoid() > threshold)
    counted = selected if divide == "kept" else counted
    weight = weight if weight is None else weight.detach().to(upsampled.dtype)
    divisor = counted.sum() if weight is None else weight[labels].where(counted, 0).sum()
    # where() and not a product: a NaN on a pixel that is not selected must reach neither the loss nor the gradient
    upsampled = upsampled.where(selected[:, None], 0)
    labels = labels.where(selected, -100)  # the ignore_index below
    loss = F.cross_entropy(upsampled, labels, weight, ignore_index=-100, reduction="sum")
    loss = loss / divisor.where(divisor != 0, 1)
    return loss.where(~wrong, torch.nan), selected.sum()


def select_labels_reference(labels, confidence, *, valid=None, threshold=0.5):
    labels, _ = _in_range(labels, labels.long() != 255, 255, "labels", otherwise=255)
    if confidence is not None:
        labels = labels.where(_upsample(confidence.detach(), labels.shape[1:])[:, 0].sigmoid() > threshold, 255)
    return (labels if valid is None else labels.where(valid, 255)).to(torch.uint8)


def upsample_softmax_reference(logits, size=None, dtype=None, valid=None):
    upsampled = _upsample(logits, checks.upsampling(logits, size, valid))
    dtype = dtype or autocast_dtype(logits, logits.dtype)
    if valid is None:
        return upsampled.softmax(1).to(dtype)
    # masked before and after: a NaN of a pixel that is not valid reaches neither the result nor the gradient
    return upsampled.where(valid[:, None], 0).softmax(1).where(valid[:, None], 0).to(dtype)


def upsample_argmax_reference(logits, size):
    return _upsample(logits, size).max(1).indices.to(torch.uint8)  # two to five times faster than argmax


def pseudo_labels_reference(logits, size, confidence, valid=None):
    upsampled = _upsample(logits.detach(), size)
    ids, largest = upsampled.argmax(1), upsampled.softmax(1).amax(1)  # (N,H,W)
    limits = upsampled.new_ones(upsampled.shape[1]) * confidence
    selected = largest > limits[ids]
    return ids.where(selected if valid is None else selected & valid, 255).to(torch.uint8)


def confusion_matrix_reference(prediction, target, num_classes=None, *, ignore=255, out=None):
    num_classes = checks.confusion(prediction, target, num_classes, out)
    if prediction.is_floating_point():
        prediction = upsample_argmax_reference(prediction, target.shape[1:])
    cells = num_classes * num_classes
    selected = target.long() != ignore
    truth, wrong = _in_range(target, selected, num_classes, "target")
    guess, wrong_guess = _in_range(prediction, selected, num_classes, "prediction")
    cell = (truth * num_classes + guess).where(selected, cells)  # one more cell, for ignored pixels
    matrix = cell.new_zeros(cells + 1).scatter_add_(0, cell.flatten(), torch.ones_like(cell).flatten())
    matrix = matrix[:-1].view(num_classes, num_classes)
    matrix[0, 0] -= (wrong | wrong_guess).to(torch.int64) << 44  # below any count; sums of many do not wrap
    return matrix if out is None else out.add_(matrix)


def autocast_dtype(x, otherwise):
    """Return the dtype of the autocast that is active on x's device, `otherwise` if none is."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else otherwise


def _upsample(x, size):
    x = x if x.dtype == torch.float64 else x.float()
    if x.shape[2:] == tuple(size):
        return x  # interpolate() would turn an infinite neighbour into NaN: 0 * inf
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def _in_range(x, selected, k, name, otherwise=0):
    """Return x as int64, `otherwise` if not selected or outside 0..k-1, and whether any was outside (CPU: raise)."""
    x = x.long()
    outside = ((x < 0) | (x >= k)) & selected
    if _can_read_values(x) and outside.any():
        raise ValueError(f"{name} holds {x[outside][0].item()}, outside 0..{k - 1} and not ignored")
    return x.where(selected & ~outside, otherwise), outside.any()


def _can_read_values(x):
    """Return whether a value can be read without synchronising."""
    return x.device.type == "cpu"
