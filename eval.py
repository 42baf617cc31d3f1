"""Score a checkpoint as the VOC devkit does, and draw what it predicts.

    python eval.py --ckpt out/semi/last.pt --out out/semi/pictures
    python eval.py --ckpt out/semi/last.pt --images holiday/*.jpg --out predictions
"""
import torch
import torch.nn.functional as F

import common
import data
import model
from csrc import ops


def predict(seg, picture, args):
    """Logits (N,K,h,w) of uint8 pictures (N,3,H,W) that are padded to stride / input_scale * k+1."""
    x = seg.normalise(picture)
    if args.input_scale != 1:
        size = [round((n - 1) * args.input_scale) + 1 for n in x.shape[2:]]
        x = F.interpolate(x, size, mode="bilinear", align_corners=True, antialias=True)
    with common.autocast(args.amp, x.device, args.backbone):
        return seg(x)


@torch.inference_mode()
def evaluate(seg, samples, args, device):
    """One confusion matrix over all `samples` at their labels' own sizes -> (mIoU in 0..1, per class (K,))."""
    was, num_classes = seg.training, seg.num_classes
    seg.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    loader = torch.utils.data.DataLoader(data.Whole(samples, num_classes, round(args.stride / args.input_scale)), num_workers=args.workers)
    for picture, target in common.progress(loader, len(loader), "evaluation"):  # (1,3,H,W), (1,H,W) uint8
        logits = predict(seg, picture.to(device), args)  # (1,K,h,w)
        ops.confusion_matrix(logits, target.to(device), out=matrix)
    seg.train(was)
    return ops.mean_iou(matrix)
