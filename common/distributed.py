"""Devices and ranks: the device of this process, DistributedDataParallel, sums and means over all ranks, stop signals.

A loss is the mean over the pixels of all ranks, but DistributedDataParallel averages the gradients of the ranks.
`global_mean` scales each rank's loss so that the two agree.
"""
import atexit
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.console import InputError

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
stop_reason = None  # name of the signal that asked this process to stop


def init_device(gpu):
    """Join the process group, if there is one, and return the torch.device of this rank.

    gpu: CUDA device; under torchrun the local rank's is used instead; -1, or no CUDA: the CPU. From here on only rank 0
    prints.

    Raises:
        InputError: if CUDA is available, but not this device.
    """
    device = torch.device("cpu")
    if gpu >= 0 and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"]) if WORLD_SIZE > 1 else gpu
        if gpu >= torch.cuda.device_count():
            raise InputError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0"
                             + ("; each rank needs its own: lower --nproc_per_node" if WORLD_SIZE > 1 else ""))
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
    missing = " (no CUDA here)" if gpu >= 0 and device.type == "cpu" else ""
    return name + missing + (f", {WORLD_SIZE} ranks" if WORLD_SIZE > 1 else "")


def prepare_model(model, compile=False):
    """Return the model as the training loop calls it; `model` stays the one to save and to evaluate.

    On several ranks its gradients, if it has any, are averaged, and on several GPUs its batch norm is synchronised,
    unless it is frozen.
    """
    trains_bn = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
    parameters = list(model.parameters())
    if WORLD_SIZE > 1 and parameters[0].is_cuda and trains_bn:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, with the same parameters
    if compile:
        model.compile()
    if WORLD_SIZE == 1 or not any(p.requires_grad for p in parameters):
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def all_reduce_sum(x):
    """Sum a tensor over all ranks, in place, and return it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def global_mean(value, count):
    """Return the mean over all ranks of `value`, itself a mean over `count` pixels (0-dim tensor) of this rank.

    On each rank it is scaled so that DDP's average of gradients equals the gradient of the global mean; the average of
    the returned values over the ranks is the global mean too.
    """
    if WORLD_SIZE == 1:
        return value
    return value * (WORLD_SIZE * count / all_reduce_sum(count.clone()).clamp(min=1))


def all_gather(value):
    """Return the list of every rank's value, any object that pickles."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model):
    """Copy rank 0's buffers (running statistics of batch norm) to all ranks."""
    for buffer in model.buffers() if WORLD_SIZE > 1 else ():
        dist.broadcast(buffer, 0)


def install_signal_handlers():
    """From here on SIGTERM and SIGINT (Ctrl-C) only set `stop_reason`; see stop_requested."""
    global stop_reason
    stop_reason = None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def _on_signal(number, _):
    global stop_reason
    stop_reason = signal.Signals(number).name


def stop_requested():
    """Return why to stop, or None; all ranks call this at the same places and all get an answer of the same kind."""
    if WORLD_SIZE > 1 and not all_reduce_sum(torch.tensor(int(stop_reason is not None))):
        return None  # even if a signal arrived during the sum: all ranks follow the sum
    return stop_reason or ("another rank" if WORLD_SIZE > 1 else None)
