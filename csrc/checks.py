"""The arguments of the operators in ops.py: ValueError in one line that names the argument where one is wrong."""
import torch


def size_of(size, valid=None):
    """(H,W): `size`, or where that is None that of the mask `valid`."""
    size = valid.shape[-2:] if size is None and valid is not None else size
    if size is None:
        raise ValueError("size=(H,W) is needed where neither target nor valid has it")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (H,W), both at least 1, got {tuple(size)}")
    return tuple(size)


def valid_mask(valid, shape, like):
    if valid is not None and (valid.dtype != torch.bool or valid.shape != shape or valid.device != like.device):
        raise ValueError(f"valid must be {tuple(shape)} bool on {like.device}, got {tuple(valid.shape)} {valid.dtype} "
                         f"on {valid.device}")


def pseudo_labels(logits, size, confidence, valid):
    floating(logits, "logits")
    size, (n, k), c = size_of(size, valid), logits.shape[:2], confidence
    valid_mask(valid, (n, *size), logits)
    if isinstance(c, torch.Tensor) and (c.shape != (k,) or c.dtype != torch.float32 or c.device != logits.device):
        raise ValueError(f"confidence must be a number or ({k},) float32 on {logits.device}, got {tuple(c.shape)} "
                         f"{c.dtype} on {c.device}")
    return size


def cross_entropy(logits, target, confidence, valid, size, divide):
    floating(logits, "logits")
    if divide not in ("kept", "all"):
        raise ValueError(f"divide must be 'kept' or 'all', got {divide!r}")
    if target is not None:
        integers(target, "target", logits)
        if size is not None and tuple(size) != tuple(target.shape[-2:]):
            raise ValueError(f"size {tuple(size)} is not the target's {tuple(target.shape[-2:])}")
    size = size_of(size if target is None else target.shape[-2:], valid)
    n = logits.shape[0]
    valid_mask(valid, (n, *size), logits)
    if confidence is not None:
        floating(confidence, "confidence")
        if confidence.shape[:2] != (n, 1) or confidence.device != logits.device:
            raise ValueError(f"confidence must be ({n},1,a,b) on {logits.device}, got {tuple(confidence.shape)} on "
                             f"{confidence.device}")
    return size


def confusion(prediction, target, num_classes, out):
    if prediction.is_floating_point():
        floating(prediction, "prediction")
        if num_classes not in (None, prediction.shape[1]):
            raise ValueError(f"num_classes {num_classes} is not the {prediction.shape[1]} channels of prediction")
        num_classes = prediction.shape[1]
    elif num_classes is None:
        raise ValueError("num_classes is needed where prediction holds class ids")
    else:
        integers(prediction, "prediction", target)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes must be in 1..255, got {num_classes}")
    integers(target, "target", prediction)
    shape, device = (num_classes, num_classes), target.device
    if out is not None and (out.shape != shape or out.dtype != torch.int64 or out.device != device):
        raise ValueError(f"out must be {shape} int64 on {device}, got {tuple(out.shape)} {out.dtype} on {out.device}")
    return num_classes


def floating(x, name):
    if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape[1:] or x.shape[1] > 255:
        raise ValueError(f"{name} must be (N,K,h,w) floating point with 1 <= K <= 255, got {tuple(x.shape)} {x.dtype}")


def integers(x, name, like):
    if x.dim() != 3 or x.dtype not in (torch.uint8, torch.int64) or x.shape[0] != like.shape[0] or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be ({like.shape[0]},H,W) uint8 or int64, got {tuple(x.shape)} {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the other argument on {like.device}")
