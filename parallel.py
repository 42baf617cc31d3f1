"""Devices and processes: what this process computes on, and means over the processes that torchrun started.

A loss is the mean over the pixels of all processes, while DistributedDataParallel takes the mean of their gradients:
`mean` scales each process's loss so that the two agree.
"""
import atexit
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cli import InputError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
heard = None  # name of the signal that asked this process to stop, or the InputError that made it


def start(gpu):
    """Join the other processes -> the torch.device of this one: GPU `gpu`, or that of its local rank; -1: the CPU.

    Only the first process prints from here on. Errors: InputError where there are GPUs, but not this one.
    """
    device = torch.device("cpu")
    if gpu >= 0 and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"]) if WORLD > 1 else gpu
        if gpu >= torch.cuda.device_count():
            raise InputError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA devices, from 0 on"
                             + (", and a process needs one of its own: lower --nproc_per_node" if WORLD > 1 else ""))
        torch.cuda.set_device(gpu)
        device = torch.device("cuda", gpu)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if RANK:
            sys.stdout = open(os.devnull, "w")
    return device


def describe(device, gpu=-1):
    """Words for the device, which --gpu asked for `gpu`, and the number of processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    lacking = " (no CUDA here)" if gpu >= 0 and device.type == "cpu" else ""
    return name + lacking + (f", {WORLD} processes" if WORLD > 1 else "")


def ready(net, device, args):
    """`net` on its device; on several GPUs with batch statistics of all of them; with --compile compiled."""
    net = net.to(device)
    if WORLD > 1 and device.type == "cuda" and args.bn != "frozen":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if args.compile:
        net.compile()
    return net


def ddp(net):
    """The net as a training calls it: a backward pass takes the mean of its gradients over all processes."""
    if WORLD == 1:
        return net
    return DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True)


def total(x):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def mean(value, count):
    """The mean over the pixels of all processes, where `value` is that over the `count` (0-dim) of this process.

    In each process it is scaled so that the mean over the processes, of it or of its gradients, is that mean.
    """
    return value * (WORLD * count / total(count.clone()).clamp(min=1)) if WORLD > 1 else value


def broadcast_buffers(net):
    """Give all processes the first one's buffers, the running statistics of batch norm."""
    for buffer in net.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)


def listen():
    """From here on SIGTERM and SIGINT ask to stop: `heard` names the one that came."""
    global heard
    heard = None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hear)


def hear(number, _):
    global heard
    heard = signal.Signals(number).name


def stopping():
    """`heard` of this or another process, or None; all of them ask at the same places. No device waits."""
    if WORLD > 1 and not total(torch.tensor(int(heard is not None))):
        return None  # also where one came during the sum: all processes take the same answer
    return heard or ("another process" if WORLD > 1 else None)
