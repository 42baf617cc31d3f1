"""How many kernels a training step launches on a GPU, counted with meta tensors: nothing is computed.

Not with fake CUDA tensors: their backward pass asks the driver for a context. Meta tensors have no autocast.
"""
import contextlib
import importlib

from common import distributed, run

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
from csrc import autograd, ops

NO_KERNEL = {"view", "_unsafe_view", "expand", "permute", "transpose", "t", "select", "slice", "split", "unbind",
             "squeeze", "unsqueeze", "alias", "detach", "as_strided", "empty", "empty_like", "new_empty", "device"}


class Counter(TorchDispatchMode):
    """Collects the names of the operators that launch kernels. A _foreach operator or fused optimiser counts once."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [name] * (name not in NO_KERNEL)
        return function(*args, **kwargs or {})


@pytest.fixture
def count(blocks, tmp_path, monkeypatch):
    """count(script, *flags) -> names of the kernels of a script's second step: ResNet-101, ten images."""
    autograd.register()
    device = torch.device("meta")
    monkeypatch.setattr(ops, "_choose", lambda device: "kernel")
    monkeypatch.setitem(ops.SUPPORTED, "meta", {torch.float32})
    monkeypatch.setattr(distributed, "init_device", lambda gpu: device)
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **more: sgd(*args, foreach=True, **more))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    def batches(samples, name, **_):
        while True:
            pixels = torch.zeros(10, 65, 65, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
            yield pixels, pixels[:, 0].to(torch.uint8 if name == "labelled" else torch.bool)
    monkeypatch.setattr(data, "batches", batches)

    def names(script, *flags):
        counter, module = Counter(), importlib.import_module(script)

        class CountingRun(run.Run):
            def steps(self, evaluate):
                yield 1
                with counter:
                    yield 2

            def log(self, *_, **__):
                pass

            end_step = log
        monkeypatch.setattr(module, "Run", CountingRun)
        words = f"--data {blocks} --out {tmp_path}/out --gpu -1 --crop 65 --batch-size 10 --init none --workers 0"
        words = [*words.split(), "--backbone", "resnet101", "--stride", "8", "--class-weights", "none", *flags]
        module.main(module.flags().parse_args(words))
        return counter.names
    return names


def test_launches_of_train_match(count, monkeypatch):
    """At most 1.1 times those of train_base.py, and the teacher's forward pass.

    The student sees two batches, labelled and strong. So train_base.py is counted with two passes of its network.
    """
    forward, teacher = model.DeepLabV2.forward, []

    def forward_twice(self, x):
        with Counter() as counter:
            logits = forward(self, x)
        teacher[:] = counter.names
        return logits + forward(self, x)
    match = count("train_match", "--u-start", "0")
    monkeypatch.setattr(model.DeepLabV2, "forward", forward_twice)
    base = count("train_base")
    assert len(teacher) > 300 and len(match) <= 1.1 * len(base) + len(teacher)
