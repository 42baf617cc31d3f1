"""Device and rank of this process, DistributedDataParallel, sums and means over all ranks, stop signals."""
import atexit
import os
import signal
import sys

from common.console import InputError

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
stop_reason = None  # name of the signal that asked this process to stop


def init_device(gpu):
    """Join the process group, if there is one, and return the torch.device of this rank; only rank 0 prints from here.

    gpu: CUDA device (under torchrun that of the local rank, 0 if a scheduler shows each task only its own); -1, or no
    CUDA: the CPU.
    """
    device = torch.device("cpu")
    if gpu >= 0 and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count() if WORLD_SIZE > 1 else gpu
        if gpu >= torch.cuda.device_count():
            raise InputError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0")
        torch.cuda.set_device(gpu)
        device = torch.device("cuda", gpu)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if RANK:
            sys.stdout = open(os.devnull, "w")
    return device


def describe_device(device, gpu=-1):
    """Return the device's name and the number of ranks, for a person. gpu: what --gpu asked for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    if gpu >= 0 and device.type == "cpu":
        has_driver = torch.version.cuda and os.path.exists("/dev/nvidia0") and "CUDA_VISIBLE_DEVICES" not in os.environ
        name += f" (driver too old for torch built with CUDA {torch.version.cuda})" if has_driver else " (no CUDA here)"
    return name + f", {WORLD_SIZE} ranks" * (WORLD_SIZE > 1)


def prepare_model(model, compile=False):
    """Return the model ready for training: with DDP, SyncBatchNorm on several GPUs, and torch.compile."""
    trains_bn = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    if WORLD_SIZE > 1 and next(model.parameters()).is_cuda and trains_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, with the same parameters
    if compile:
        model.compile()
    if WORLD_SIZE == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


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
