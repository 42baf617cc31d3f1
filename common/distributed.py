"""Device and rank of this process, DistributedDataParallel, sums and means over all ranks, stop signals."""
import atexit
import os
import signal
import sys

from common.console import InputError

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RANKS_HERE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))  # on this machine
stop_reason = None  # name of the signal that asked this process to stop


def init_device(gpu):
    """Join the process group, if there is one, and return the torch.device of this rank; only rank 0 prints from here.

    gpu: CUDA device, or that of another accelerator (under torchrun that of the local rank, 0 if a scheduler shows each
    task only its own); -1, or none there: the CPU.
    """
    device = torch.device("cpu")
    if gpu >= 0 and torch.accelerator.is_available():
        count = torch.accelerator.device_count()
        gpu = int(os.environ["LOCAL_RANK"]) % count if WORLD_SIZE > 1 else gpu
        device = torch.device(torch.accelerator.current_accelerator().type, gpu)
        if gpu >= count:
            raise InputError(f"--gpu {gpu}: this machine has {count} {device.type} devices, numbered from 0")
        torch.accelerator.set_device_index(gpu)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        dist.init_process_group("gloo" if device.type == "cpu" else backend)
        atexit.register(dist.destroy_process_group)
        if RANK:
            sys.stdout = open(os.devnull, "w")
    return device


def describe_device(device, gpu=-1):
    """Return the device's name and the number of ranks, for a person. gpu: what --gpu asked for."""
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{device}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    if gpu >= 0 and device.type == "cpu":
        has_driver = torch.version.cuda and os.path.exists("/dev/nvidia0") and "CUDA_VISIBLE_DEVICES" not in os.environ
        name += f" (driver too old for torch built with CUDA {torch.version.cuda})" if has_driver else " (no CUDA here)"
    return name + f", {WORLD_SIZE} ranks" * (WORLD_SIZE > 1)


class SyncBatchNorm(torch.nn.BatchNorm2d):
    """nn.BatchNorm1d or 2d with the batch statistics of all ranks, which have images of one number and size.

    torch.nn.SyncBatchNorm waits for the GPU three times a layer, because it drops ranks without images.
    """

    def _check_input_dim(self, x):  # of PyTorch, called by super().forward: any number of dimensions is fine
        pass

    def forward(self, x):  # (N,C,...)
        y = self.normalise(x) if self.training else super().forward(x)
        return self.act(y) if hasattr(self, "act") else y  # timm's BatchNormAct2d has an activation

    def normalise(self, x):
        y, mean, var = NormaliseByAllRanks.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            count = WORLD_SIZE * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y


class NormaliseByAllRanks(torch.autograd.Function):
    """Batch norm of x (N,C,...); returns it, and mean and biased variance (C,) over all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = x if x.is_cuda else x.to(weight.dtype)  # on the CPU the statistics have the dtype of x
        stats = torch.stack(torch.batch_norm_update_stats(wide, None, None, 0))  # (2,C): mean and variance, this rank's
        ranks = stats.new_zeros(WORLD_SIZE, *stats.shape)
        ranks[RANK] = stats
        all_reduce_sum(ranks)  # gathers them
        # the mean of the squares less the square of the mean would have no digit of a small variance
        mean, var = ranks[:, 0].mean(0), ranks[:, 1].mean(0) + ranks[:, 0].var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0, eps, True), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        x, weight, mean, var = ctx.saved_tensors
        grad, *sums = torch.ops.aten.native_batch_norm_backward(  # as if mean and variance were constants
            upstream, x, weight, mean, var, None, None, False, ctx.eps, [True] * 3)
        # sums: of upstream * normalised x, of upstream; what mean and variance add is the same formula of x
        scale = weight * (var + ctx.eps).rsqrt() / (WORLD_SIZE * x.numel() / x.shape[1])  # (C,)
        slope, offset = all_reduce_sum(torch.stack(sums)) * scale
        return grad - torch.batch_norm(x, slope, offset, mean, var, False, 0, ctx.eps, True), *sums, None


def prepare_model(model, compile=False):
    """Return the model ready for training: with DDP, batch norm over all ranks, and torch.compile."""
    for module in model.modules() if WORLD_SIZE > 1 else ():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)) and module.training:
            module.__class__ = SyncBatchNorm  # keeps parameters, buffers and their names
    if compile:
        model.compile()
    if WORLD_SIZE == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # after the first broadcast; the argument's name differs between versions
    return parallel


def all_reduce_sum(x):
    """Sum a tensor over all ranks, in place, and return it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def global_mean(value, count):
    """Return the mean over all ranks of `value`, itself a mean over `count` pixels (0-dim tensor) of this rank.

    If pixels have weights, `count` is their sum.

    Each rank's value is scaled so that DDP's average of gradients equals the gradient of the global mean; the average
    of the returned values over the ranks is the global mean too.
    """
    if WORLD_SIZE == 1:
        return value
    total = all_reduce_sum(count.clone())
    return value * (WORLD_SIZE * count / total.where(total != 0, 1))


def broadcast_buffers(model):
    """Copy rank 0's buffers (running statistics of batch norm) to all ranks."""
    for buffer in model.buffers() if WORLD_SIZE > 1 else ():
        dist.broadcast(buffer, 0)


def install_signal_handlers():
    """From here on SIGTERM and SIGINT (Ctrl-C) only set `stop_reason`; see stop_requested."""
    global stop_reason
    stop_reason = None

    def on_signal(number, _):
        global stop_reason
        stop_reason = signal.Signals(number).name
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def stop_requested():
    """Return why to stop, or None; all ranks call this at the same places and agree."""
    if WORLD_SIZE > 1 and not all_reduce_sum(torch.tensor(int(stop_reason is not None))):
        return None  # even if a signal arrived during the sum: all ranks follow the sum
    return stop_reason or ("another rank" if WORLD_SIZE > 1 else None)
