"""Rooflines of every catalogue architecture: complete, monotone, and close to measurements."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.catalogue import gpus, models
from hetis.profiler.roofline import from_json, matrix_flops, modelled_profile, shipped_efficiencies
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.profile import Op, Piece, Source
from tests.models import model_of
from tools.efficiency_file import to_json

SHARED = Path(__file__).parents[3] / "shared" / "data"
A100 = GpuType(
    name="A100-SXM-80GB",
    architecture="Ampere",
    memory_bytes=80 * 2**30,
    mem_bytes_per_s=2039e9,
    fp16_flops=312e12,
    nvlink_bytes_per_s=300e9,
)
H100 = replace(
    A100,
    name="H100-SXM-80GB",
    architecture="Hopper",
    mem_bytes_per_s=3350e9,
    fp16_flops=989e12,
    fp8_flops=1979e12,
    nvlink_bytes_per_s=450e9,
)
L40S = GpuType(
    name="L40S",
    architecture="Ada",
    memory_bytes=48 * 2**30,
    mem_bytes_per_s=864e9,
    fp16_flops=362e12,
    fp8_flops=733e12,
)
P100 = GpuType(
    name="P100-PCIe-12GB",
    architecture="Pascal",
    memory_bytes=12 * 2**30,
    mem_bytes_per_s=549e9,
    fp16_flops=18.7e12,
    pcie_bytes_per_s=16e9,
)
LLAMA = model_of(
    name="Llama-2-70B",
    num_layers=80,
    hidden=8192,
    intermediate=28672,
    q_heads=64,
    kv_heads=8,
    head_dim=128,
    vocab=32000,
)
ARCHITECTURES = (
    "Ada", "Ada GeForce", "Ampere", "Ascend", "Battlemage", "Blackwell", "CDNA", "CDNA2", "CDNA3", "CDNA4", "GCN",
    "Gaudi2", "Gaudi3", "Hopper", "Pascal", "RDNA3", "RDNA4", "RTX Blackwell", "TPU", "Turing", "Volta",
)  # fmt: skip
BLACKWELLS = ("Blackwell", "RTX Blackwell")
MODELLED = [op for op in Op if op not in (Op.SAMPLE, Op.EXPERTS)]  # those two come from an engine: `for_engine`


def seconds(gpu: GpuType, op: Op, model: ModelSpec = LLAMA, **work: float) -> float:
    fit = modelled_profile(gpu).fit(op, model, 1)
    return fit.seconds(**work)


def dense_s(gpu: GpuType, tokens: int, tp: int = 1) -> float:
    """Return dense(T) of docs/cost-model.md."""
    params = LLAMA.dense_layer_params() / tp
    num_bytes = 2 * params + 8 * LLAMA.hidden * 2 * tokens
    return seconds(gpu, Op.DENSE, flops=2 * tokens * params, num_bytes=num_bytes, tokens=tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gpu", [A100, L40S], ids=["nvlink", "pcie"])
def test_every_architecture_has_a_whole_profile(architecture: str, gpu: GpuType) -> None:
    profile = modelled_profile(replace(gpu, name="any", architecture=architecture))
    assert {fit.op for fit in profile.fits} == set(MODELLED)
    for fit in profile.fits:
        assert fit.provenance.source is Source.MODELLED
        assert fit.provenance.origin.startswith("roofline of any, ")
        # Piece refuses negative and infinite values; a piece of zeros alone would make work free.
        assert all(piece != Piece() for piece in fit.pieces)
        assert fit.op is Op.STEP or fit.op is Op.TRANSFER or fit.provenance.held_out_mape is not None


def test_the_shipped_file_covers_the_catalogue() -> None:
    assert tuple(shipped_efficiencies().architectures) == ARCHITECTURES
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here: the catalogue's architectures were not compared")
    with (SHARED / "gpus.csv").open(encoding="utf-8", newline="") as file:
        assert {row["architecture"] for row in csv.DictReader(file)} <= set(ARCHITECTURES)


def test_every_gpu_of_the_catalogue_gets_a_profile() -> None:
    for entry in gpus():
        profile = modelled_profile(entry.gpu)
        assert profile.gpu == entry.gpu.name
        assert profile.reserve_bytes < profile.usable_bytes < entry.gpu.memory_bytes


@pytest.mark.parametrize(("name", "share"), [("CDNA3", (0.511 * 0.600) ** 0.5), ("CDNA4", 0.622)])
def test_amd_gpus_reach_less_of_their_peak(name: str, share: float) -> None:
    """Published shares of 16-bit peaks: MI300X 51.1% and MI325X 60.0%, MI355X 62.2%, and H100 80.3%."""
    architectures = shipped_efficiencies().architectures
    for op, efficiency in architectures["Hopper"].ops.items():
        for theirs, hopper in zip(architectures[name].ops[op].pieces, efficiency.pieces, strict=True):
            assert theirs.flop == pytest.approx(hopper.flop * 0.803 / share, rel=0.01)
            assert replace(theirs, flop=hopper.flop) == hopper


@pytest.mark.parametrize(
    ("name", "four_bits", "rate"),  # bytes per weight with scales of 16 (NVFP4) and 32 weights (MXFP4), and data sheets
    [
        ("B200-SXM-180GB", 0.5625, 9e15),
        ("B300-SXM-288GB", 0.5625, 9e15),  # kernels do not reach the 1.5 times of Blackwell Ultra's data sheet
        ("GB300-per-GPU", 0.5625, 10e15),
        ("RTX-PRO-6000-Server-96GB", 0.5625, 1871e12),
        ("RTX-5090", 0.5625, 1676e12),  # eight-bit products with fp32 accumulation are halved, these are not
        ("MI355X-288GB", 0.53125, 10.07e15),
        ("H100-SXM-80GB", None, None),
        ("MI325X-256GB", None, None),
    ],
)
def test_four_bit_products_have_their_own_rate_where_the_architecture_multiplies_them(
    name: str, four_bits: float | None, rate: float | None
) -> None:
    gpu = next(entry.gpu for entry in gpus() if entry.gpu.name == name)
    fits = {fit.scope.weight_bytes: fit for fit in modelled_profile(gpu).fits if fit.op is Op.DENSE}
    assert set(fits) == {None, 1.0} | ({four_bits} - {None})
    if four_bits is not None and rate is not None:
        assert matrix_flops(gpu, four_bits) == pytest.approx(rate, rel=0.01)
        assert gpu.fp8_flops is not None
        if gpu.architecture == "CDNA4":  # no kernels of its own are known: the share of the peak of eight-bit ones
            quicker = rate / gpu.fp8_flops
            assert fits[four_bits].pieces[0].flop_s * quicker == pytest.approx(fits[1.0].pieces[0].flop_s, rel=0.01)


@pytest.mark.parametrize("gpu", ["MI355X-288GB", "B200-SXM-180GB"])
def test_integer_weights_are_multiplied_in_16_bits_though_they_take_as_many_bytes(gpu: str) -> None:
    profile = modelled_profile(next(entry.gpu for entry in gpus() if entry.gpu.name == gpu))
    plain = profile.fit(Op.DENSE, LLAMA, 1)
    for name in ("int4", "awq-int4", "gptq-int4"):
        for weight_bytes in (0.53125, 0.5625):
            assert profile.fit(Op.DENSE, replace(LLAMA, weights=name, weight_bytes=weight_bytes), 1) == plain
    mxfp4 = replace(LLAMA, weights="mxfp4", weight_bytes=0.53125)
    assert (profile.fit(Op.DENSE, mxfp4, 1) == plain) == (gpu != "MI355X-288GB")


@pytest.mark.parametrize("gpu", ["MI355X-288GB", "B200-SXM-180GB"])
@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "openai/gpt-oss-120b"])
def test_a_model_whose_experts_alone_are_mxfp4_is_multiplied_in_16_bits(name: str, gpu: str) -> None:
    """Its activations have 16 bits, so its products have, too."""
    profile = modelled_profile(next(entry.gpu for entry in gpus() if entry.gpu.name == gpu))
    oss = next(entry.model for entry in models() if entry.model.name == name)
    assert oss.weights == "mxfp4"
    assert profile.fit(Op.DENSE, oss, 1) == profile.fit(Op.DENSE, replace(oss, weights="", weight_bytes=2.0), 1)


def test_weights_of_four_bits_in_another_format_are_not_multiplied_in_four() -> None:
    blackwell = next(entry.gpu for entry in gpus() if entry.gpu.name == "B200-SXM-180GB")
    assert matrix_flops(blackwell, 0.5) == blackwell.fp8_flops
    assert matrix_flops(blackwell, None) == blackwell.fp16_flops


def test_an_rtx_4090_reaches_more_of_its_peaks_than_an_l40s() -> None:
    """By public measurements: 179.2 of 165.2 TFLOPS where an H200 NVL reaches 853.3 of 835.5, and 921 of 1,008 GB/s."""
    architectures = shipped_efficiencies().architectures
    dense = {name: architectures[name].ops["dense"].pieces for name in ("Ada", "Hopper", "Ada GeForce")}
    flop, hopper = (max(piece.flop for piece in dense[name]) for name in ("Ada GeForce", "Hopper"))
    assert flop == pytest.approx(hopper * (853.3 / 835.5) / (179.2 / 165.2), rel=0.01)
    assert max(piece.byte for piece in dense["Ada GeForce"]) == pytest.approx(1008 / 921, rel=0.01)
    compute, memory = flop / max(p.flop for p in dense["Ada"]), 1008 / 921 / max(p.byte for p in dense["Ada"])
    for op, efficiency in architectures["Ada"].ops.items():
        for theirs, ada in zip(architectures["Ada GeForce"].ops[op].pieces, efficiency.pieces, strict=True):
            assert (theirs.fixed_s, theirs.wire) == (ada.fixed_s, ada.wire)
            assert (theirs.flop, theirs.byte) == pytest.approx((ada.flop * compute, ada.byte * memory), rel=0.01)
            assert theirs.head_bytes == pytest.approx(ada.head_bytes * memory, rel=0.01)
    ours = {entry.gpu.name for entry in gpus() if entry.gpu.architecture == "Ada GeForce"}
    named = {entry.gpu.name for entry in gpus() if re.match(r"RTX-40\d\d(?!-Ada)", entry.gpu.name)}
    assert ours == named >= {"RTX-4090"}


def test_rtx_blackwell_has_its_own_kernels() -> None:
    """A board with GDDR7 reaches more of its four-bit peak than B200, whose memory is four times as fast per product.

    Shares of the peaks at large sizes by aiconfigurator-core's tables, single products: 63% and 44% in NVFP4.
    """
    architectures = shipped_efficiencies().architectures
    own = architectures["RTX Blackwell"].ops
    assert {name for name, op in own.items() if not op.measured_on} == {"all_reduce_nvlink"}
    assert all(op.measured_on in ((), ("RTX-PRO-6000-Server-96GB",)) for op in own.values())
    shares = [max(piece.flop for piece in architectures[name].ops["dense_nvfp4"].pieces) for name in BLACKWELLS]
    assert shares == [pytest.approx(1 / 0.44, rel=0.15), pytest.approx(1 / 0.63, rel=0.15)]
    ours = {entry.gpu.name for entry in gpus() if entry.gpu.architecture == "RTX Blackwell"}
    named = {entry.gpu.name for entry in gpus() if re.match(r"RTX-PRO-|RTX-50\d\d(?!-Ada)", entry.gpu.name)}
    assert ours == {*named, "GB10"} >= {"RTX-5090", "RTX-PRO-6000-Server-96GB"}


def test_the_shipped_file_survives_a_round_trip() -> None:
    assert from_json(to_json(shipped_efficiencies())) == shipped_efficiencies()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(
        InvalidProblemError, match=r"^X: no efficiencies for architecture 'Rubin'; known: Ada, Ada GeForce, Ampere, "
    ):
        modelled_profile(replace(A100, name="X", architecture="Rubin"))


@given(
    gpu=st.sampled_from([A100, H100, L40S, P100]),
    op=st.sampled_from(MODELLED),
    work=st.fixed_dictionaries(
        {
            "flops": st.floats(0, 1e15),
            "num_bytes": st.floats(0, 1e11),
            "tokens": st.floats(0, 1e5),
            "heads": st.floats(0, 1e5),
            "wire_s": st.floats(0, 1.0),
        }
    ),
    more=st.sampled_from(["flops", "num_bytes", "tokens", "heads", "wire_s"]),
    factor=st.floats(1, 10),
)
def test_more_work_never_takes_less_time(
    gpu: GpuType, op: Op, work: dict[str, float], more: str, factor: float
) -> None:
    assert seconds(gpu, op, LLAMA, **{**work, more: work[more] * factor}) >= seconds(gpu, op, LLAMA, **work) > 0


# vidur_layer_ops.csv.gz, Llama-2-70B, one token: the four projections, both norms, rope, activation and residual.
@pytest.mark.parametrize(
    ("gpu", "tp", "measured_s"), [(A100, 1, 1.118e-3), (A100, 4, 0.311e-3), (H100, 1, 0.625e-3), (H100, 4, 0.179e-3)]
)
def test_a_decode_layer_of_llama_takes_what_vidur_measured(gpu: GpuType, tp: int, measured_s: float) -> None:
    assert dense_s(gpu, 1, tp) == pytest.approx(measured_s, rel=0.15)


# aic_*_generation_attention.csv.gz: 8 query and 1 KV heads (Llama-70B at TP 8), batch 64, context 8192.
@pytest.mark.parametrize(("gpu", "measured_s"), [(A100, 185.6e-6), (H100, 101.4e-6), (L40S, 376.3e-6)])
def test_decode_attention_takes_what_was_measured(gpu: GpuType, measured_s: float) -> None:
    batch, context = 64, 8192
    predicted_s = seconds(
        gpu,
        Op.DECODE_ATTENTION,
        heads=8 * batch,
        num_bytes=batch * context * LLAMA.kv_bytes_per_token_group(),
        flops=batch * LLAMA.decode_attention_flops(context, 8),
    )
    assert predicted_s == pytest.approx(measured_s, rel=0.15)


def test_mla_meets_the_compute_roof() -> None:
    """128 query heads share one latent: 242 FLOPs per byte, above what an A100's memory can feed."""
    kv_bytes, flops_per_byte = 1e9, 2 * 128 * (2 * 512 + 64) / (2 * (512 + 64))
    assert seconds(A100, Op.DECODE_ATTENTION, num_bytes=kv_bytes, flops=kv_bytes * flops_per_byte) >= (
        1.5 * kv_bytes * flops_per_byte / A100.fp16_flops
    )


def test_the_link_decides_the_all_reduce() -> None:
    assert seconds(L40S, Op.ALL_REDUCE, wire_s=1e-3) > 2 * seconds(A100, Op.ALL_REDUCE, wire_s=1e-3)
    without_bridge = replace(A100, nvlink_bytes_per_s=None)
    assert seconds(without_bridge, Op.ALL_REDUCE, wire_s=1e-3) == seconds(L40S, Op.ALL_REDUCE, wire_s=1e-3)


def test_fp8_weights_run_on_fp8_units_where_there_are_any() -> None:
    fp8 = replace(LLAMA, weight_bytes=1.0)
    work = {"flops": 1e13, "num_bytes": 1e8, "tokens": 4096.0}
    assert seconds(H100, Op.DENSE, fp8, **work) < 0.8 * seconds(H100, Op.DENSE, LLAMA, **work)
    assert seconds(A100, Op.DENSE, fp8, **work) == seconds(A100, Op.DENSE, LLAMA, **work)


def test_a_p100_is_as_far_behind_as_hetis_measured() -> None:
    """Hetis (SC'25), A100-PCIe-80GB against P100-12GB: 24.5 times for prefill MLPs."""
    a100_pcie = replace(A100, name="A100-PCIe-80GB", mem_bytes_per_s=1935e9, nvlink_bytes_per_s=None)
    assert dense_s(P100, 4096) / dense_s(a100_pcie, 4096) == pytest.approx(24.5, rel=0.05)


def test_errors_of_unmeasured_gpus_are_those_of_gpus_never_seen() -> None:
    ampere = shipped_efficiencies().architectures["Ampere"].ops["dense"]
    for gpu, error in ((A100, ampere.held_out_mape), (replace(A100, name="A30"), ampere.transfer_mape)):
        fit = modelled_profile(gpu).fit(Op.DENSE, LLAMA, 1)
        assert fit.provenance.held_out_mape == error
    pascal = modelled_profile(P100).fit(Op.DENSE, LLAMA, 1)
    assert pascal.provenance.origin.endswith("; scaled from Ampere")


def test_reserve_fits_into_what_is_usable() -> None:
    for gpu in (A100, H100, L40S, P100):
        profile = modelled_profile(gpu)
        assert profile.reserve_bytes < profile.usable_bytes < gpu.memory_bytes


def test_reading_a_profile_loads_no_numpy() -> None:
    code = "import sys, hetis.profiler.roofline; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
