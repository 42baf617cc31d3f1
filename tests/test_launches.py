"""How many kernels a training step launches on a GPU, counted with fake tensors: nothing is computed.

The tensors are fake ones of the CPU, because the backward pass of fake CUDA tensors asks the driver for a context. What
differs on CUDA is replaced: CUDA's path of the operators, of which values cannot be read, and nn.Conv2d.
"""
import copy
import importlib

from common import run

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
from csrc import autograd, ops

NO_KERNEL = {"view", "_unsafe_view", "expand", "permute", "transpose", "t", "select", "slice", "split", "unbind",
             "squeeze", "unsqueeze", "alias", "detach", "as_strided", "empty", "empty_like", "new_empty"}


class Counter(TorchDispatchMode):
    """Collects the names of the operators that launch kernels. A _foreach operator or fused optimiser counts once."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [name] * (function.namespace != "prim" and name not in NO_KERNEL)
        return function(*args, **kwargs or {})


def to_fake(module, mode):
    """Replace parameters and buffers by fake ones."""
    for part in module.modules():
        for name, x in part._parameters.items():
            part._parameters[name] = x if x is None else torch.nn.Parameter(mode.from_tensor(x.detach()))
        for name, x in part._buffers.items():
            part._buffers[name] = mode.from_tensor(x)
    return module


@pytest.fixture
def count(blocks, tmp_path, monkeypatch):
    """count(script, *flags) -> names of the kernels of a script's second step: ResNet-101, bfloat16, ten images."""
    autograd.register()
    monkeypatch.setattr(ops, "_choose", lambda device: "kernel")
    monkeypatch.setattr(ops, "_can_read_values", lambda x: False)
    monkeypatch.setattr(model.DilatedConv2d, "forward", torch.nn.Conv2d.forward)
    network = model.DeepLabV2("resnet101", 4, init="none")
    monkeypatch.setattr(torch.nn.Module, "to", lambda network, device: network)

    def batches(samples, name, **_):
        while True:
            pixels = torch.zeros(10, 65, 65, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            yield pixels, torch.zeros(10, 65, 65, dtype=torch.uint8 if name == "labelled" else torch.bool)
    monkeypatch.setattr(data, "batches", batches)

    def names(script, *flags):
        counter, module = Counter(), importlib.import_module(script)

        class FakeRun(run.Run):
            def steps(self, evaluate):
                yield 1
                with counter:
                    yield 2

            def log(self, *_, **__):
                pass

            end_step = log
        monkeypatch.setattr(module, "Run", FakeRun)
        words = f"--data {blocks} --out {tmp_path}/out --gpu -1 --crop 65 --batch-size 10 --init none --amp --workers 0"
        words = [*words.split(), "--backbone", "resnet101", "--stride", "8", "--class-weights", "none", *flags]
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        seg = to_fake(copy.deepcopy(network), mode)
        monkeypatch.setattr(model, "create_segmenter", lambda *_: seg)
        with mode:
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
