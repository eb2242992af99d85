"""Every backend attends as defined: softmax of scaled products over the positions that are seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hetis.runtime.attention import paged_compiled
from hetis.runtime.attention.backends import Backend, CompiledBackend, TorchBackend, choose_backend
from hetis.runtime.attention.device import DeviceStep, LocalDevice
from hetis.runtime.attention.kv import DeviceError, KvShape, PagePool, SequenceKey
from hetis.runtime.transport.frames import bytes_of

BACKENDS = [TorchBackend, CompiledBackend]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.03, "float16": 0.004}


def shape_of(*, r: int, d: int, window: int, dtype: str) -> KvShape:
    return KvShape(
        layers=2, head_dim=d, queries_per_group=r, page_tokens=16, dtype=dtype, scale=0.3, windows=(0, window)
    )


def defined(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, window: int, scale: float
) -> torch.Tensor:
    """Outputs [r, d] of one virtual sequence, k and v [tokens, d], in float64."""
    first = max(0, position + 1 - window) if window else 0
    k, v = (x[first : position + 1].double() for x in (k, v))
    return torch.softmax(scale * q.double() @ k.T, dim=-1) @ v


def check(
    make: Callable[[PagePool], Backend],
    r: int,
    d: int,
    window: int,
    dtype: str,
    lengths: list[int],
    *,
    device: str = "cpu",
) -> None:
    shape = shape_of(r=r, d=d, window=window, dtype=dtype)
    generator = torch.Generator().manual_seed(len(lengths) + r)
    pool = PagePool("d", shape, 3 + sum(shape.pages(length) for length in lengths), device)
    backend = make(pool)
    kinds = {"generator": generator, "dtype": torch.float64}
    whole = [torch.randn(2, 2, length, d, **kinds).to(shape.torch_dtype) for length in lengths]
    keys = [SequenceKey(i, 0, 0) for i in range(len(lengths))]
    for key, kv in zip(keys, whole, strict=True):
        if kv.shape[2] > 1:
            pool.extend([key], [0], [kv.shape[2] - 1])
            pool.write(key, 0, kv[0, :, :-1], kv[1, :, :-1])
    pool.extend(keys, [length - 1 for length in lengths], lengths)
    positions = np.array(lengths) - 1
    backend.plan(pool.rows(keys), positions)
    for layer in (0, 1):
        q = torch.randn(len(keys), r, d, **kinds).to(shape.torch_dtype)
        new = torch.stack([kv[:, layer, -1] for kv in whole])
        out = backend.attend(layer, torch.cat((q, new), dim=1).to(device)).cpu()
        assert out.dtype == shape.torch_dtype
        for i, kv in enumerate(whole):
            wanted = defined(q[i], kv[0, layer], kv[1, layer], lengths[i] - 1, shape.windows[layer], shape.scale)
            torch.testing.assert_close(out[i].double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("r", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_outputs_are_as_defined(make: Callable[[PagePool], Backend], r: int, dtype: str) -> None:
    check(make, r, 24, 19, dtype, [1, 15, 16, 17, 31, 32, 33, 100, 5])


def test_float16_is_computed_by_torch() -> None:
    check(TorchBackend, 3, 16, 0, "float16", [1, 40, 17])
    assert choose_backend(PagePool("d", shape_of(r=1, d=8, window=0, dtype="float16"), 1)).name == "torch"
    assert choose_backend(PagePool("d", shape_of(r=1, d=8, window=0, dtype="bfloat16"), 1)).name == "compiled"


@pytest.mark.gpu
@pytest.mark.parametrize("r", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu_outputs_are_as_defined(r: int, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    check(choose_backend, r, 64, 19, dtype, [1, 15, 16, 17, 31, 32, 33, 100, 5], device="cuda")
    check(TorchBackend, r, 64, 19, dtype, [1, 15, 16, 17, 31, 32, 33, 100, 5], device="cuda")


@given(
    r=st.integers(1, 8),
    d=st.integers(1, 40),
    window=st.integers(0, 50),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
)
@settings(max_examples=40)
def test_the_compiled_backend_is_right_for_any_shape(r: int, d: int, window: int, lengths: list[int]) -> None:
    check(CompiledBackend, r, d, window, "float32", lengths)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_numbers_that_a_channel_brings_give_the_bits_that_a_tensor_gives(dtype: str) -> None:
    shape = shape_of(r=2, d=8, window=0, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    steps = torch.randn(4, 1, 4, 8, generator=generator).to(shape.torch_dtype)
    outputs = []
    for is_tensor in (True, False):
        device = LocalDevice("d", shape, 4)
        for position, qkv in enumerate(steps):
            zero, at = np.zeros(1, np.int64), np.array([position])
            device.begin(DeviceStep(epoch=1, number=0, requests=zero, incarnations=zero, heads=zero, positions=at))
            words = qkv.view(torch.uint8).numpy().view(shape.numpy_dtype)
            out = device.attend(0, qkv).wait() if is_tensor else device.attend_received(0, words)
        outputs.append(bytes(bytes_of(out)))
        assert len(outputs[-1]) == 2 * 8 * shape.item_bytes
    assert outputs[0] == outputs[1]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
@example([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])  # NaNs, which rounding would make infinite, or 0
@example([0x7F7FFFFF, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000])
def test_bfloat16_is_rounded_as_torch_rounds(bits: list[int]) -> None:
    floats = torch.from_numpy(np.array([bits], np.uint32).view(np.float32))
    words = torch.empty(floats.shape, dtype=torch.bfloat16)
    paged_compiled._narrow(floats.numpy(), words.view(torch.uint16).numpy())
    torch.testing.assert_close(words, floats.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("at", range(7))
def test_a_key_that_outweighs_all_others_is_found_wherever_it_is(at: int) -> None:
    shape = shape_of(r=1, d=1, window=0, dtype="float32")
    pool = PagePool("d", shape, 2)
    key = SequenceKey(0, 0, 0)
    pool.extend([key], [0], [7])
    k, v = torch.zeros(7, 1), torch.arange(7.0)[:, None]
    k[at] = 1e6
    pool.write(key, 0, k[:6].expand(2, 6, 1), v[:6].expand(2, 6, 1))
    backend = CompiledBackend(pool)
    backend.plan(pool.rows([key]), np.array([6]))
    assert backend.attend(0, torch.stack((torch.ones(1, 1), k[6:], v[6:]), dim=1)).item() == pytest.approx(at, abs=1e-6)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    shape = shape_of(r=1, d=1, window=0, dtype="float32")
    pool = PagePool("d", shape, 2)
    key = SequenceKey(0, 0, 0)
    pool.extend([key], [0], [3])
    k = torch.tensor([[[1e6], [-1e6]]]).expand(2, 2, 1)
    pool.write(key, 0, k, torch.tensor([[[7.0], [1.0]]]).expand(2, 2, 1))
    backend = CompiledBackend(pool)
    backend.plan(pool.rows([key]), np.array([2]))
    out = backend.attend(0, torch.tensor([[[1.0], [0.0], [0.0]]]))
    assert out.item() == 7.0


def test_a_sequence_gives_the_same_bits_alone_and_among_others() -> None:
    shape = shape_of(r=3, d=16, window=0, dtype="float32")
    results = []
    for others in (0, 5):
        device = LocalDevice("d", shape, 100)
        generator = torch.Generator().manual_seed(3)
        k, v = (torch.randn(1, 2, 50, 16, generator=generator) for _ in range(2))
        device.adopt(9, 0, [2], 0, k, v)
        for other in range(others):
            device.adopt(other, 0, [0], 0, *(torch.randn(1, 2, 20 + other, 16) for _ in range(2)))
        numbers = np.array([*range(others), 9])
        heads, positions = np.array([0] * others + [2]), np.array([*range(20, 20 + others), 50])
        device.begin(
            DeviceStep(
                epoch=1,
                number=0,
                requests=numbers,
                incarnations=np.zeros_like(numbers),
                heads=heads,
                positions=positions,
            )
        )
        qkv = torch.cat((torch.randn(others, 5, 16), torch.randn(1, 5, 16, generator=generator)))
        results.append(device.attend(1, qkv).wait()[-1])
    assert torch.equal(results[0], results[1])


def test_nothing_is_attended_to_outside_a_step() -> None:
    device = LocalDevice("d", shape_of(r=1, d=4, window=0, dtype="float32"), 4)
    with pytest.raises(DeviceError, match="d: no step was begun"):
        device.attend(0, torch.zeros(0, 3, 4))
