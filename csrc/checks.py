"""Checks of the arguments of the operators in ops.py; each raises a ValueError that names the argument."""
import torch

IDS, FLOATS = (torch.uint8, torch.int64), (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(x, name, shape, dtypes, device):
    """Check shape, dtype and device. shape: sizes, None for any; only the batch size may be 0."""
    found = x.shape
    fits = len(found) == len(shape) and 0 not in found[1:] and (
        shape.count(None) == len(shape) or all(m in (n, None) for n, m in zip(found, shape)))
    if not fits or x.dtype not in dtypes or x.device != device:
        sizes = ",".join("*" if m is None else str(m) for m in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be ({sizes}) {kinds} on {device}, got {tuple(x.shape)} {x.dtype} on {x.device}")


def logits(x, name="logits"):
    tensor(x, name, (None, None, None, None), FLOATS, x.device)
    if x.shape[1] > 255:
        raise ValueError(f"{name} must have at most 255 classes, got {x.shape[1]}")


def weights(x, num_classes, device):
    """Check weights of classes, (K,) float32; optional."""
    if x is not None:
        tensor(x, "weight", (num_classes,), (torch.float32,), device)


def masks(n, size, device, valid, confidence=None):
    """Check valid (N,H,W) bool and confidence (N,1,a,b), each optional."""
    if valid is not None:
        tensor(valid, "valid", (n, *size), (torch.bool,), device)
    if confidence is not None:
        tensor(confidence, "confidence", (n, 1, None, None), FLOATS, device)


def upsampling(x, size, valid=None, confidence=None, target=None):
    """Check logits x (N,K,h,w) and tensors of the upsampled size; return (H,W): size, or target's, or valid's."""
    logits(x)
    if target is not None:
        tensor(target, "target", (x.shape[0], None, None), IDS, x.device)
        if size is not None and tuple(size) != tuple(target.shape[1:]):
            raise ValueError(f"size {tuple(size)} is not the target's {tuple(target.shape[1:])}")
        size = target.shape[1:]
    elif size is None and valid is not None:
        size = valid.shape[-2:]
    if size is None or len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (H,W), both at least 1, or be given by target or valid; got {size}")
    if valid is not None or confidence is not None:
        masks(len(x), size, x.device, valid, confidence)
    return tuple(size)


def confusion(prediction, target, num_classes, out):
    is_logits = prediction.is_floating_point()
    if is_logits:
        logits(prediction, "prediction")
        if num_classes not in (None, prediction.shape[1]):
            raise ValueError(f"num_classes {num_classes} is not the {prediction.shape[1]} channels of prediction")
        num_classes = prediction.shape[1]
    if num_classes is None or not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes must be in 1..255 if prediction has class ids, got {num_classes}")
    tensor(target, "target", (len(prediction) if is_logits else None, None, None), IDS, prediction.device)
    if not is_logits:
        tensor(prediction, "prediction", target.shape, IDS, target.device)
    if out is not None:
        tensor(out, "out", (num_classes, num_classes), (torch.int64,), target.device)
    return num_classes
