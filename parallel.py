"""Devices and processes: what this process computes on, and sums over the processes that torchrun started.

A loss is the mean over the pixels of all processes: each process multiplies the mean over its own by `share`, and gradients and
figures are then summed.
"""
import atexit
import contextlib
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cli import InputError
from csrc import build, ops

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def announce(data, gpu):
    """Pick the device, join the other processes, print a run's first line: data, device, ops in use -> the torch.device.

    Under torchrun a process takes the GPU of its local rank (--gpu -1: the CPU), and only the first one prints. Errors:
    InputError where there is no such device beside others that are, or SEG_OPS is wrong.
    """
    device = torch.device("cpu")
    if gpu >= 0 and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"]) if WORLD > 1 else gpu
        if gpu >= torch.cuda.device_count():
            raise InputError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA devices, from 0 on"
                             + (", and a process needs one of its own: lower --nproc_per_node" if WORLD > 1 else ""))
        torch.cuda.set_device(gpu)
        device = torch.device("cuda", gpu)
    try:
        path = ops.in_use(device.type) + build.note
    except ValueError as e:
        raise InputError(str(e)) from None
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if RANK:
            sys.stdout = open(os.devnull, "w")
    print(f"{data}; device {describe(device)}{' (no CUDA here)' if gpu >= 0 and device.type == 'cpu' else ''}"
          f"{f', {WORLD} processes' if WORLD > 1 else ''}; ops {path}", flush=True)
    return device


def describe(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def ready(net, device, args):
    """`net` on its device; on several GPUs with batch statistics of all of them; with --compile compiled."""
    net = net.to(device)
    if WORLD > 1 and device.type == "cuda" and args.bn != "frozen":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if args.compile:
        net.compile()
    return net


def total(x):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def share(count, args):
    """What a mean over `count` pixels (0-dim int64) of this process weighs in a loss of all, a number or a 0-dim tensor.

    Its part of the pixels that all processes count in this piece of the batch, over --accumulate, the number of pieces.
    """
    return (count / total(count.clone()).clamp(min=1) if WORLD > 1 else 1) / args.accumulate


def ddp(net):
    """The net as a training calls it: a backward pass sums its gradients over all processes while it goes on."""
    if WORLD > 1:
        net = DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True)
        net.register_comm_hook(None, add_up)
    return net


def add_up(_, bucket):
    """What DistributedDataParallel does with a bucket of gradients: sum them; by itself it would take their mean."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


@contextlib.contextmanager
def alone(*nets):
    """Of forward passes in here the gradients stay in this process until the next pass outside sums them with its own.

    Their backward passes come before that one's forward pass, which prepares the sum.
    """
    with contextlib.ExitStack() as stack:
        for net in nets if WORLD > 1 else ():
            stack.enter_context(net.no_sync())
        yield


def pieces(count, *nets):
    """Yields `count` times; gradients of the nets are summed over all processes in the last one of these pieces."""
    for left in reversed(range(count)):
        with alone(*nets if left else ()):
            yield


def level(net):
    """Give all processes the first one's buffers, the running statistics of batch norm."""
    if WORLD > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def same_start(done):
    """`done`, the updates behind a run. Errors: InputError where the processes do not agree on it."""
    found = torch.zeros(WORLD, dtype=torch.int64)
    found[RANK] = done
    if len(set(total(found).tolist())) > 1:
        raise InputError(f"--resume: the processes found checkpoints of steps {found.tolist()}; --out has to be a folder that "
                         "all machines share")
    return done


class Stopped(Exception):
    """A signal to stop came where nothing is computed that has to be whole."""


class Signals:
    """SIGTERM and SIGINT, which ask a training to stop after its step. SIGINT again ends a single process at once.

    SIGTERM again does nothing: several processes may get it from a scheduler and from torchrun.
    """

    def __init__(self):
        self.name, self.breaks_off = None, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number, _):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT and WORLD == 1 else signal.SIG_IGN)
        self.name = signal.Signals(number).name
        if self.breaks_off:
            self.breaks_off = False  # once: another signal finds the training saving
            raise Stopped

    @contextlib.contextmanager
    def breaking_off(self):
        """In here a signal, also one that has come already, raises Stopped at once; several processes go on to the end."""
        self.breaks_off = WORLD == 1  # several would have to agree on the place
        try:
            if self.name and self.breaks_off:
                raise Stopped
            yield
        finally:
            self.breaks_off = False

    def heard(self):
        """Name of the signal that any process has heard, or None. The hosts ask each other: no device waits."""
        if WORLD > 1 and not total(torch.tensor(int(bool(self.name)))):
            return None  # also where one came during the sum: the next sum tells all
        if WORLD > 1 and not self.name:
            self.name = "a signal to another process"
        return self.name
