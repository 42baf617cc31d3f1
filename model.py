"""Networks and what belongs to them: DeepLabv2, the discriminator, optimisers, losses, pseudo-labels, loading."""
import contextlib
import os
import re
import textwrap

from common import distributed, encoders
from common.args import number
from common.checkpoint import load_weights, read_checkpoint, read_initial_weights
from common.console import InputError
from common.layouts import read_lines, voc_palette
from common.run import HealthyRange

import torch
import torch.nn as nn
import torch.nn.functional as F

from csrc import ops

# Mean and standard deviation of R, G, B in 0..1. Caffe networks expect BGR.
NORMS = {"caffe": ((122.67892 / 255, 116.66877 / 255, 104.00699 / 255), [1 / 255] * 3), "none": ([0.0] * 3, [1.0] * 3)}

# Defaults of the discriminator's flags. With the paper's it recognises all predictions on small data within 60 steps.
DISC_PAPER, DISC_SMALL = dict(d_lr=1e-4, d_smooth=0.0), dict(d_lr=3e-5, d_smooth=0.1)


class DeepLabV2(nn.Module):
    """DeepLabv2 (Chen et al. 2016): a dilated backbone and the sum of dilated 3x3 classifiers.

    Images (N,3,stride*m+1,stride*n+1) -> logits (N,K,m+1,n+1) at the corners of the grid, as align_corners=True
    assumes. uint8 images are normalised inside; floating-point input counts as normalised.

    backbone: a name of ours or of timm (common/encoders.py). init: "imagenet", "none" (random weights), or {name:
    tensor}, the backbone's weights by timm or DINOv2. bn, norm, branches (2 or 4 classifiers), input_scale,
    freeze_backbone: see the flags in common/args.py.
    caffe: a ResNet with its stride in the first 1x1 convolution of a bottleneck, as in the MS-COCO weights.
    """

    def __init__(self, backbone="resnet101", num_classes=21, stride=8, init="imagenet", bn="train", norm="imagenet",
                 branches=4, caffe=False, input_scale=1, freeze_backbone=False):
        super().__init__()
        encoder = encoders.describe_encoder(backbone, stride)
        self.backbone = encoders.create_encoder(backbone, encoder.options, init)
        if caffe and hasattr(self.backbone, "layer4"):
            encoders.move_strides(self.backbone)
        self.stride, self.at_centres = encoder.stride, encoder.at_centres
        self.num_classes, self.input_scale = num_classes, input_scale
        self.bn, self.norm, self.freeze_backbone = bn, norm, freeze_backbone
        self.classes, self.palette = [f"class {n}" for n in range(num_classes)], voc_palette()
        self.fast_in_bf16 = all(m.groups == 1 for m in self.backbone.modules() if isinstance(m, nn.Conv2d))
        # the same extent in pixels as at stride 8
        rates = [max(1, r * 8 // self.stride) for r in (6, 12, 18, 24)[:branches]]
        self.head = nn.ModuleList(
            encoders.DilatedConv2d(encoder.channels, num_classes, 3, padding=r, dilation=r) for r in rates)
        for conv in self.head:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        config = self.backbone.pretrained_cfg
        mean, std = (config["mean"], config["std"]) if norm == "imagenet" else NORMS[norm]
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        self.backbone.requires_grad_(not freeze_backbone)
        for module in self.batch_norms():
            module.requires_grad_(bn == "train" and not freeze_backbone)
        self.to(memory_format=torch.channels_last).train()

    def forward(self, x):  # (N,3,H,W)
        x = self.features(x if x.is_floating_point() else self.normalise(x))  # (N,C,h,w)
        return sum(conv(x) for conv in self.head)  # (N,K,h,w)

    def features(self, x):
        """Return the backbone's features (N,C,m+1,n+1) of normalised images (N,3,stride*m+1,stride*n+1)."""
        if self.at_centres:
            return encoders.to_corners(encoders.feature_map(self.backbone, x[..., :-1, :-1]))
        return encoders.feature_map(self.backbone, x)

    def normalise(self, images):
        """Normalise RGB images (N,3,H,W) with values in 0..255; return float32."""
        x = (images - self.mean) / self.std
        return (x.flip(1) if self.norm == "caffe" else x).contiguous(memory_format=torch.channels_last)

    def batch_norms(self):
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextlib.contextmanager
    def fixed_statistics(self):
        """Context: batch norm that trains uses batch statistics but does not update the running statistics."""
        for layer in self.batch_norms():
            layer.track_running_stats = False
        yield
        for layer in self.batch_norms():
            layer.track_running_stats = True

    def train(self, mode=True):
        super().train(mode)
        for module in self.batch_norms() if self.bn == "frozen" else ():
            module.eval()
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def load_state_dict(self, weights, *args, **kwargs):
        """Load weights, also those of checkpoints that have the same layers in the same order under older names."""
        ours, theirs = ([k for k in x if k.startswith("backbone.") and not k.endswith("num_batches_tracked")]
                        for x in (self.state_dict(), weights))
        if any(re.match(r"backbone\.\d", k) for k in theirs) and len(ours) == len(theirs):
            counts = {k: w for k, w in self.state_dict().items() if k.endswith("num_batches_tracked")}
            weights = counts | {new: weights[old] for new, old in zip(ours, theirs)} | {
                k: w for k, w in weights.items() if not re.match(r"backbone\.\d", k)}
        return super().load_state_dict(weights, *args, **kwargs)


class Discriminator(nn.Module):
    """Fully convolutional discriminator (Hung et al. 2018, section 3.2): probabilities (N,K,H,W) -> (N,1,h,w).

    h = H // 32. A high logit says that the map looks like a label map there; `bce` upsamples the logits.
    """

    fast_in_bf16 = True

    def __init__(self, num_classes=21):
        super().__init__()
        layers = []
        for c_in, c_out in zip((num_classes, 64, 128, 256, 512), (64, 128, 256, 512, 1)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1]).to(memory_format=torch.channels_last)

    def forward(self, x):  # (N,K,H,W)
        return self.layers(x)  # (N,1,h,w)


def autocast(network, amp=None):
    """Return torch.autocast to bfloat16 for a network.

    amp=None enables it on CUDA devices that support it (speed not measured), and on CPUs with AMX, where resnet18 is
    1.7 times as fast as in float32, unless network.fast_in_bf16 is False (efficientnet_lite0: 0.7 times).
    """
    device = next(network.parameters()).device
    if amp is None:
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        amp = has_amx and getattr(network, "fast_in_bf16", True)
        amp = amp if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def network_defaults(init, backbone, stride):
    """Return {"caffe": ..., "norm": ..., "stride": ...} that the backbone and the weights named by --init expect.

    stride: the output stride asked for, or None. Raises an InputError if the backbone cannot have it.
    """
    initial = read_initial_weights(init, mmap=True)
    args = initial["args"] if initial else {"caffe": False, "norm": "imagenet"}
    stride = encoders.describe_encoder(backbone, stride).stride
    return {"caffe": bool(args["caffe"]), "norm": args["norm"], "stride": stride}


def create_segmenter(classes, palette, backbone, init, stride, bn, norm, branches, input_scale, freeze_backbone=False):
    """Return a DeepLabV2 with initial weights; the arguments are a data set's, and the flags of common/args.py."""
    initial = read_initial_weights(init)
    caffe = bool(initial and initial["args"]["caffe"])
    start = initial.get("backbone", "none") if initial else init
    try:
        seg = DeepLabV2(backbone, len(classes), stride, start, bn, norm, branches, caffe, input_scale, freeze_backbone)
    except (RuntimeError, KeyError) as e:  # timm fails to load weights of another network
        raise InputError(f"--init {init}: does not fit {backbone}: {textwrap.shorten(str(e), 199)}") from None
    seg.classes, seg.palette = list(classes), palette
    if initial and "seg" in initial:
        load_weights(seg, initial["seg"], f"--init {init}", new_classifier=True)
        if init != "coco" and caffe and initial["args"]["aspp_branches"] < branches:
            print(f"--init {init}: if it is the authors', only 2 branches were trained; add --aspp-branches 2")
    if backbone not in encoders.TIMM_NAMES:
        trained = [p for p in seg.backbone.parameters() if p.requires_grad]
        offset, unused = encoders.trace_feature(seg.eval().features, seg.stride, trained)
        for parameter in unused:  # of layers behind the features
            parameter.requires_grad_(False)
        has_attention = any("attn" in name for name, _ in seg.backbone.named_modules())  # it spreads the gradient
        if offset > seg.stride / 4 and not has_attention:
            print(f"warning: the features of {backbone} lie about {offset:.0f} pixels beside the corners of the cells, "
                  "where the losses take them to be; see docs/backbones.md for networks without a shift")
    return seg.train()


def load_segmenter(path, checkpoint=None):
    """Return the DeepLabV2 of a checkpoint file, ours or published, in eval mode. checkpoint: its dict, if known."""
    checkpoint = checkpoint or read_checkpoint(path, "--ckpt")
    args = checkpoint["args"]
    if not checkpoint["classes"]:
        raise InputError(f"--ckpt {path}: an ImageNet classifier without a segmentation head; use it with --init")
    try:
        seg = DeepLabV2(args["backbone"], len(checkpoint["classes"]), args["stride"], "none", args["bn"], args["norm"],
                        args["aspp_branches"], args["caffe"], args["input_scale"])
    except (InputError, KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise InputError(f"--ckpt {path}: its args do not describe a network; train again") from None
    load_weights(seg, checkpoint["seg"], f"--ckpt {path}")
    seg.classes, seg.palette = list(checkpoint["classes"]), args["palette"]
    return seg.eval()


def seg_optimizer(seg, lr, head_lr=10, nesterov=True, weight_decay=1e-4):
    """Return SGD for the trainable parameters: the backbone at `lr`, the classifier at head_lr times that."""
    backbone = [p for p in seg.backbone.parameters() if p.requires_grad]
    groups = [{"params": backbone, "lr": lr}, {"params": [*seg.head.parameters()], "lr": head_lr * lr}]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay, fused=True)


def disc_optimizer(disc, lr, optim="adam", betas=(0.9, 0.999), momentum=0.5, weight_decay=None):
    """Return Adam as in the paper, or the SGD of the 2017 reproduction. weight_decay: default 0, for SGD 1e-4."""
    if optim == "adam":
        return torch.optim.Adam(disc.parameters(), lr, betas=betas, weight_decay=weight_decay or 0, fused=True)
    weight_decay = 1e-4 if weight_decay is None else weight_decay
    return torch.optim.SGD(disc.parameters(), lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def set_poly_lr(step, iters, decay_every, *optimizers, power=0.9):
    """Set the learning rates of a step (1, 2, ...) to initial * (1 - (step-1)/iters)^power.

    They change every `decay_every` steps; 0 keeps them constant.
    """
    done = (step - 1) - (step - 1) % decay_every if decay_every else 0
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - done / iters) ** power


def class_weights(spec, pixels, classes, device="cpu"):
    """Return the weights of the classes in the loss on labels, (K,) float32, or None. Raises InputError.

    spec: the value of --class-weights. "none"; "balanced": 1 / sqrt(p), with p a class's fraction of `pixels`, at least
    0.001 (SalsaNext, Cortinhal et al. 2020); else a file with a line `name weight` for each class.
    pixels: (K,) int64, the labelled pixels of each class.
    """
    if spec == "none":
        return None
    if spec == "balanced":
        weights = (pixels.double() / pixels.sum().clamp(min=1)).clamp(min=1e-3).rsqrt()
    elif os.path.isfile(spec):
        weights = torch.tensor(read_class_weights(spec, classes))
    else:
        raise InputError(f"--class-weights {spec}: neither none nor balanced nor a file; correct it")
    print("class weights:", ", ".join(f"{name} {w:.3g}" for name, w in zip(classes, weights.tolist())))
    return weights.float().to(device)


def read_class_weights(file, classes):
    """Return the weight of each class from a file with a line `name weight` for each; a name may contain spaces."""
    weights = {}
    for line in read_lines(file):
        name, _, value = " ".join(line.split()).rpartition(" ")
        try:
            weight = float(value)
        except ValueError:
            weight = -1
        if not name or not 0 <= weight <= 1e6:
            raise InputError(f"{file}: the line {line!r} is not a class and its weight from 0 to 1e6; correct it")
        if name not in classes or name in weights:
            raise InputError(f"{file}: the class of the line {line!r} is " + (
                "there twice; keep one" if name in weights else f"none of {', '.join(classes)}; correct it"))
        weights[name] = weight
    if missing := [name for name in classes if name not in weights]:
        raise InputError(f"{file}: no weight of the class {missing[0]!r}; add a line {missing[0] + ' 1'!r}")
    if not any(weights.values()):
        raise InputError(f"{file}: all weights are 0; give at least one class a larger weight")
    return [weights[name] for name in classes]


# The losses are means over the pixels of all ranks; see distributed.global_mean.

def cross_entropy(logits, target, weight=None):
    """Return the mean cross entropy of logits (N,K,h,w) over the pixels of target (N,H,W) uint8 that are not 255.

    weight: (K,) float32; then the mean is weighted, as in F.cross_entropy.
    """
    loss, count = ops.masked_cross_entropy(logits, target, weight=weight)
    if weight is not None and distributed.WORLD_SIZE > 1:
        count = ops.sum_of_weights(target, weight)
    return distributed.global_mean(loss, count)


def pseudo_label_loss(logits, pseudo, valid, divide="kept"):
    """Return (cross entropy against pseudo-labels, fraction of valid pixels that have one), 0-dim.

    logits: (N,K,h,w). pseudo: (N,H,W) uint8, 255 if none. valid: (N,H,W) bool, False on padding. divide: "kept": the
    cross entropy is a mean over the selected pixels; "all": over all valid pixels.
    """
    loss, count = ops.masked_cross_entropy(logits, pseudo)
    total = valid.sum()
    loss = distributed.global_mean(*((loss, count) if divide == "kept" else (loss * count / total, total)))
    return loss, distributed.global_mean(count / total, total)


def bce(d_logits, target, valid):
    """Return the mean binary cross entropy of the discriminator's upsampled logits (Hung et al. 2018, eq. 1 and 4).

    d_logits: (N,1,h,w). target: the probability of "label map" that the loss asks for: 1 (or 1 - smoothing) for label
    maps, 0 for predictions, 1 for predictions in the adversarial loss. valid: (N,H,W) bool, the pixels of the mean.
    """
    logits = F.pad(d_logits, (0, 0, 0, 0, 1, 0))  # (N,2,h,w): sigmoid(z) is the softmax of the two logits (0, z)
    loss = 0
    for label, weight in ((1, target), (0, 1 - target)):
        if weight:
            labels = torch.full_like(valid, label, dtype=torch.uint8)
            mean, count = ops.masked_cross_entropy(logits, labels, valid=valid)
            loss = loss + weight * mean
    return distributed.global_mean(loss, count)


def disc_flags(parser):
    """Add the flags of the discriminator and return the parser."""
    add = parser.add_argument_group("discriminator").add_argument
    add("--d-optim", choices=["adam", "sgd"], default="adam", help="optimiser of the discriminator D (default adam)")
    add("--d-lr", type=number(), help="initial learning rate of D (paper: 1e-4; small data: 3e-5)")
    add("--d-betas", type=number(below=1), nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="betas of Adam "
        "(default 0.9 0.999: paper; the authors' code has 0.9 0.99)")
    add("--d-momentum", type=number(below=1), default=0.5, help="momentum of SGD (default 0.5)")
    add("--d-decay", type=number(), help="weight decay of D (default 0 for Adam, 1e-4 for SGD)")
    add("--d-smooth", type=number(below=1), help="label smoothing of D's real targets (paper: 0; small data: 0.1)")
    return parser


def healthy_loss_d(d_smooth):
    """Return the HealthyRange of loss_d: 0.69 is a discriminator that guesses, near 0 is one that always wins."""
    minimum = torch.special.entr(torch.tensor([d_smooth, 1 - d_smooth])).sum().item() / 2  # of a perfect discriminator
    return HealthyRange(0.05 + minimum, 0.7, "the discriminator recognises every prediction: lower --d-lr or raise "
                        "--d-smooth", "the discriminator is worse than chance: lower --d-lr")


def one_hot(target, num_classes):
    """Return labels (N,H,W) as one-hot maps (N,K,H,W), 0 at 255, in autocast's dtype, else float32."""
    dtype = ops.autocast_dtype(target, torch.float32)
    rows = torch.eye(num_classes + 1, num_classes, dtype=dtype, device=target.device)
    return F.embedding(target.clamp(max=num_classes).int(), rows).permute(0, 3, 1, 2)  # channels last, as D is


@torch.no_grad()
def class_confidence(logits, valid):
    """Return the mean probability of the predictions of each class, (K,), relative to the most confident class.

    The mean is over the positions of logits (N,K,h,w), on all ranks, at which the class is predicted and valid (N,H,W)
    is True; 1 for a class that is predicted nowhere. After FlexMatch (Zhang 2021) and FreeMatch (Wang 2023).
    """
    stride = (valid.shape[1] - 1) // (logits.shape[2] - 1)
    confidence, ids = logits.float().softmax(1).max(1)  # (N,h,w)
    is_class = F.one_hot(ids, logits.shape[1]) * valid[:, ::stride, ::stride, None]  # (N,h,w,K)
    sums = [(is_class * confidence[..., None]).sum((0, 1, 2)), is_class.sum((0, 1, 2))]
    total, count = distributed.all_reduce_sum(torch.stack(sums))
    mean = total / count.clamp(min=1)
    return (mean / mean.max()).where(count > 0, 1)  # between positions upsampling may predict another class
