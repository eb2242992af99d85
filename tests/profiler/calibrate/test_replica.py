"""A replica is priced like the simulator's timing, and refused where that is impossible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measuring.instances import NO_LIMITS, fleet
from hetis.formats.catalogue import find_gpu
from hetis.formats.models.document import load_model
from hetis.profiler.calibrate.observed import Observation, ObservedWork
from hetis.profiler.calibrate.replica import CalibratedReplica
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.engines import for_engine
from hetis.simulator.timing import StageTiming
from hetis.solver.check.replica_shapes import StageShape
from hetis.solver.cost import intra_link
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import DraftShape
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op
from hetis.solver.workload import LengthBin, Workload
from tests.solver.instances import mixed_by

GPU = "H100-SXM-80GB"
LATENT = str(Path(__file__).parents[2] / "formats" / "huggingface" / "deepseek-ai__DeepSeek-V2-Lite.json")
LINK = intra_link(find_gpu(GPU).gpu, None)


def price_s(replica: CalibratedReplica, work: ObservedWork) -> float:
    return replica.price(Observation(kind=work.kind, seconds=1.0, parts=((1.0, work),))).seconds


@given(
    model=st.sampled_from(["Llama-3.1-8B", "gemma-2-9b", LATENT, "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3.5-27B"]),
    tp=st.sampled_from([1, 2, 4]),
    decoding=st.integers(0, 300),
    context=st.integers(1, 9000),
    chunk=st.integers(0, 8192),
    past=st.integers(0, 8192),
    factor=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_an_iteration_costs_what_the_simulator_says(
    model: str, tp: int, decoding: int, context: int, chunk: int, past: int, factor: float
) -> None:
    """The simulator has separate formulas, which docs/cost-model.md derives."""
    if not decoding + chunk:
        return
    spec, shipped = load_model(model), shipped_profile(GPU)
    assert shipped is not None
    profile, mixed = for_engine(shipped, find_gpu(GPU).gpu, "vllm"), mixed_by(factor)
    fits = (replace(fit, mixed=mixed) if fit.op is Op.DECODE_ATTENTION else fit for fit in profile.fits)
    profile = replace(profile, fits=tuple(fits))
    problem = PlacementProblem(
        cluster=fleet("node", (1, 4, GPU)),
        model=spec,
        workload=Workload(name="w", bins=(LengthBin(prompt_tokens=100, output_tokens=100, weight=1),)),
        profiles={GPU: profile},
        objective=NO_LIMITS,
    )
    layers = spec.num_layers - spec.prefix_layers
    stage = StageShape(gpu=GPU, tp=tp, copies=1, layers=layers, intra_link=LINK, hop_link=LINK)
    attended = decoding * spec.attended_tokens(float(context))
    pairs = chunk * spec.attended_tokens((chunk + 1) / 2 + past)
    read = spec.read_tokens((chunk + 1) / 2 + past) + chunk / 2 if chunk else 0.0
    expected = StageTiming(problem, stage, is_first=True, is_last=True).seconds(
        decoding, attended, chunk, pairs, read, decoding + (1 if chunk else 0)
    )
    work = ObservedWork(
        decoding=decoding, attended_tokens=decoding * context, prompts=1 if chunk else 0, chunk_tokens=chunk,
        past_tokens=past if chunk else 0,
    )  # fmt: skip
    assert price_s(CalibratedReplica(spec, profile, tp=tp, link=LINK), work) == pytest.approx(expected, rel=1e-9)


def test_several_equal_prompts_attend_to_themselves_alone() -> None:
    """Two prompts of 1000 tokens make half the (query, key) pairs of one prompt of 2000."""
    profile = shipped_profile(GPU)
    assert profile is not None
    replica = CalibratedReplica(load_model("Llama-3.1-8B"), profile, tp=1, link=LINK)
    one, two = (replica._prefill_s(ObservedWork(prompts=n, chunk_tokens=2000.0)) for n in (1.0, 2.0))
    assert two < one


def test_a_model_that_drafts_is_refused() -> None:
    profile = shipped_profile(GPU)
    assert profile is not None
    model = replace(load_model("Llama-3.1-8B"), draft=DraftShape(tokens=1, acceptance=0.5))
    with pytest.raises(
        InvalidProblemError, match="drafts tokens: calibrate with a server without speculative decoding"
    ):
        CalibratedReplica(model, profile, tp=1, link=LINK)


def test_the_mean_of_parts_is_weighted() -> None:
    profile = shipped_profile(GPU)
    assert profile is not None
    replica = CalibratedReplica(load_model("Llama-3.1-8B"), profile, tp=1, link=LINK)
    light, heavy = ObservedWork(decoding=1.0, attended_tokens=1.0), ObservedWork(prompts=1.0, chunk_tokens=4000.0)
    both = Observation(kind=light.kind, seconds=1.0, parts=((0.75, light), (0.25, heavy)))
    expected = 0.75 * price_s(replica, light) + 0.25 * price_s(replica, heavy)
    assert replica.price(both).seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "tp", "said"),
    [
        ("Llama-2-70B", 1, "of weights on each of 1 H100-SXM-80GB, which has room for"),
        ("Llama-3.1-8B", 3, "--tp is 3, must divide the 32 query heads of meta-llama/Meta-Llama-3.1-8B"),
    ],
)
def test_a_replica_that_cannot_be_is_refused(model: str, tp: int, said: str) -> None:
    profile = shipped_profile(GPU)
    assert profile is not None
    with pytest.raises(InvalidProblemError, match=said):
        CalibratedReplica(load_model(model), profile, tp=tp, link=LINK)
