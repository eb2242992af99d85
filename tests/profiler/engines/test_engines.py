"""The host time that an engine adds to an iteration, in the cost model and in the file form."""

from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hetis.formats import catalogue
from hetis.formats.documents import dump
from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile
from hetis.profiler.engines import ENGINES, PLUGINS, UNHIDDEN, for_engine
from hetis.profiler.possible import doubts_of, implausible_fits
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cost import DeviceCost, intra_link, rank_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Mixed, Op, Profile, Provenance, Source
from hetis.solver.workload import LengthBin, moments_of

GPU = catalogue.find_gpu("H100-SXM-80GB").gpu
TABLE = Path(__file__).parents[4] / "shared" / "data" / "profiles" / "vidur_cpu_overheads.csv.gz"
PARTS = ("schedule_ms", "prepare_inputs_e2e_ms", "sampler_e2e_ms", "process_model_outputs_ms")


def cost(profile: Profile) -> DeviceCost:
    model = catalogue.find_model("Llama-3.1-8B").model
    shape = rank_shape(model, 1)
    assert shape is not None
    moments = moments_of([LengthBin(prompt_tokens=100, output_tokens=100, weight=1.0)], block_tokens=16)
    return DeviceCost(model, profile, moments, shape, intra_link(GPU, None))


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_sequence_takes_the_host_its_time_once(engine: str) -> None:
    bare, hosted = cost(modelled_profile(GPU)), cost(for_engine(modelled_profile(GPU), GPU, engine))
    rarely = cost(for_engine(modelled_profile(GPU), GPU, engine, stream_interval=4))
    host = ENGINES[engine]
    for sequences in (1, 7, 256):
        assert hosted.head_s(sequences) - bare.head_s(sequences) == pytest.approx(sequences * host.sequence_s)
        assert rarely.head_s(sequences) - bare.head_s(sequences) == pytest.approx(sequences * host.sequence_s / 4)
        assert hosted.step_s(sequences) == pytest.approx(host.step_s)
    assert hosted.dense_s(100) == bare.dense_s(100)


def test_a_profile_under_an_engine_is_a_profile_like_any_other() -> None:
    hosted = for_engine(for_engine(modelled_profile(GPU), GPU, "sglang"), GPU, "vllm")
    assert sum(fit.op in (Op.STEP, Op.SAMPLE) for fit in hosted.fits) == 2  # those of the engine named last
    assert parse_profile(*parse_text(dump(hosted), "p.yaml")) == hosted
    assert list(implausible_fits(hosted, GPU)) == []
    assert not [doubt for doubt in doubts_of(hosted) if doubt.startswith(("step", "sample"))]


@pytest.mark.parametrize(
    ("gpu", "engine", "factor"),
    [
        ("A100-SXM-80GB", "vllm", 2.0), ("L4", "vllm", 2.0), ("RTX-4090", "vllm", 2.0), ("RTX-5090", "vllm", 2.0),
        ("H100-SXM-80GB", "vllm", 1.0), ("T4", "vllm", 1.0), ("A100-SXM-80GB", "sglang", 1.0),
    ],
)  # fmt: skip
def test_decode_attention_beside_a_chunk_is_slower_where_the_engine_has_flash_attention_2(
    gpu: str, engine: str, factor: float
) -> None:
    kind = catalogue.find_gpu(gpu).gpu
    profile = for_engine(for_engine(modelled_profile(kind), kind, "vllm"), kind, engine)
    heads, latent = catalogue.find_model("Llama-3.1-8B").model, catalogue.find_model("DeepSeek-V3").model
    of_heads, of_latents = (profile.fit(Op.DECODE_ATTENTION, model, 1) for model in (heads, latent))
    assert of_heads.mixed_factor == factor
    assert of_latents.mixed_factor == 1.0


def test_a_measured_factor_of_mixed_batches_stays() -> None:
    kind, of_tables = catalogue.find_gpu("RTX-4090").gpu, Provenance(source=Source.FITTED, origin="tables")
    mixed = Mixed(factor=1.3, provenance=of_tables)
    bare = modelled_profile(kind)
    measured = [replace(fit, mixed=mixed) if fit.op is Op.DECODE_ATTENTION else fit for fit in bare.fits]
    profile = for_engine(replace(bare, fits=tuple(measured)), kind, "vllm")
    found = profile.fit(Op.DECODE_ATTENTION, catalogue.find_model("Llama-3.1-8B").model, 1)
    assert found.mixed == mixed


def test_engines_that_nobody_measured_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match="no host times are known for engine 'steam'; known: vllm, sglang"):
        for_engine(modelled_profile(GPU), GPU, "steam")
    with pytest.raises(InvalidProblemError, match="stream_interval is 0, must be >= 1"):
        for_engine(modelled_profile(GPU), GPU, "vllm", stream_interval=0)


@pytest.mark.skipif(not TABLE.exists(), reason=f"{TABLE} is not here: vLLM's host times were NOT compared with it")
def test_host_times_of_vllm_that_waits_for_them_are_those_of_the_table() -> None:
    with gzip.open(TABLE, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == "A100"]
    batch = np.array([float(row["batch_size"]) for row in rows])
    seconds = np.array([sum(float(row[part]) for part in PARTS) for row in rows]) * 1e-3
    slope, fixed = np.polyfit(batch, seconds, 1)
    assert UNHIDDEN.step_s == pytest.approx(fixed, rel=0.005)
    assert UNHIDDEN.sequence_s == pytest.approx(slope, rel=0.005)


def test_the_plugin_takes_what_was_measured_on_a_host() -> None:
    """8.9 ms of a step of 32 layers and 32 requests with all heads local (docs/vllm.md)."""
    plugin = PLUGINS["vllm-hetis"]
    assert 32 * plugin.local_s + plugin.step_s + 32 * plugin.sequence_s == pytest.approx(20.0e-3 - 11.1e-3, rel=0.01)
    assert plugin.exchange_s == pytest.approx((plugin.exchange_low_s * plugin.exchange_high_s) ** 0.5, rel=0.01)


def test_vllm_that_schedules_ahead_hides_most_of_its_host() -> None:
    ahead, waiting = (
        for_engine(modelled_profile(GPU), GPU, "vllm", schedules_ahead=is_ahead) for is_ahead in (True, False)
    )
    assert cost(waiting).step_s(64) == pytest.approx(UNHIDDEN.step_s) != cost(ahead).step_s(64)
