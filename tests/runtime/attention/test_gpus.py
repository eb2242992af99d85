"""KV and attention on simulated GPUs, which refuse what real ones refuse."""

from __future__ import annotations

import pytest
import torch

from hetis.runtime.attention.device import LocalDevice
from tests.runtime.attention.test_ranges import LAYERS, MIXED, Case, defined, run
from tests.runtime.fake_gpus import FakeGpus

CASE = Case(**MIXED, r=3, d=16, page_tokens=16, window=19, soft_cap=30.0, dtype="float32")
PAGES = sum(CASE.shape().pages(tokens) for tokens in CASE.tokens)


def test_a_device_on_a_gpu_never_mixes_memories_and_computes_what_is_defined() -> None:
    shape, numbers = CASE.shape(), CASE.numbers()
    with FakeGpus(2):
        own = [rows.to("cuda:1") for rows in numbers]
        found = [out.cpu() for out in run(LocalDevice("gpu", shape, PAGES, device="cuda:1"), CASE, own)]
    for rows, out in zip(numbers, found, strict=True):
        for layer in range(LAYERS):
            wanted = defined(rows[layer], shape, layer)
            torch.testing.assert_close(out[layer].double(), wanted, rtol=1e-5, atol=1e-5)


def test_indices_go_to_a_gpu_once_per_step_however_many_layers_there_are() -> None:
    with FakeGpus(1) as gpus:
        device = LocalDevice("gpu", CASE.shape(), PAGES, device="cuda:0")
        own = [x.to("cuda:0") for x in CASE.numbers()]  # where a rank has them: on its GPU
        steps = layers = 0
        begin, attend = device.begin, device.attend

        def counted_begin(step):  # type: ignore[no-untyped-def]
            nonlocal steps
            steps += 1
            begin(step)

        def counted_attend(layer, qkv):  # type: ignore[no-untyped-def]
            nonlocal layers
            before = gpus.to_gpus
            found = attend(layer, qkv)
            layers += 1
            assert layer == 0 or gpus.to_gpus == before, "of the first layer at most"
            return found

        device.begin, device.attend = counted_begin, counted_attend  # type: ignore[method-assign]
        before = gpus.to_gpus
        run(device, CASE, own)
        assert layers > steps > 0
        assert gpus.to_gpus > before


def test_the_gpus_that_are_none_refuse_what_real_ones_refuse() -> None:
    with FakeGpus(2):
        here, there, cpu = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"), torch.ones(2)
        for mixed in (lambda: here + there, lambda: torch.cat([here, cpu]), lambda: cpu.mul_(here)):
            with pytest.raises(RuntimeError, match="tensors on"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        with pytest.raises(RuntimeError, match="cuda:2 is not there"):
            cpu.to("cuda:2")
        assert (here[torch.tensor([0])].device, here.sum().tolist()) == (torch.device("cuda:0"), 2)
        assert torch.equal((here + there.to(here)).cpu(), torch.tensor([2.0, 2.0]))
