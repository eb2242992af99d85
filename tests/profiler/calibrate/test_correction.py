"""Corrections recover the truth, are judged on held-out data, and claim no more than the load reveals."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.catalogue import find_gpu
from hetis.formats.models.document import load_model
from hetis.profiler.calibrate.correction import STOOD_STILL, CalibrationResult, calibrate
from hetis.profiler.calibrate.observed import Observation, ObservedKind, ObservedWork
from hetis.profiler.calibrate.replica import CalibratedReplica
from hetis.profiler.defaults import default_profile
from hetis.profiler.linear import linear_fits
from hetis.profiler.possible import impossible
from hetis.solver.cluster import Link
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Mixed, Op, Profile, Provenance, Source
from tests.profiler.calibrate.truth import GPU, Truth, observed, replica, works


def values(found: CalibrationResult) -> dict[str, float]:
    return {one.name: one.after for one in found.parameters}


def fits_of(profile: Profile | None, op: Op) -> list[float]:
    """Return the first coefficients of the first pieces of every fit of an operator."""
    return [fit.pieces[0].fixed_s or fit.pieces[0].token_s for fit in profile.fits if fit.op is op]


@given(
    kernels=st.floats(0.3, 3.0),
    step_s=st.floats(1e-3, 5e-3),
    sequence_s=st.floats(1e-5, 5e-5),
    seed=st.integers(0, 1000),
)
def test_the_truth_is_recovered_within_its_interval(
    kernels: float, step_s: float, sequence_s: float, seed: int
) -> None:  # fmt: skip
    truth = Truth(kernels=kernels, step_s=step_s, sequence_s=sequence_s, noise=0.02)
    found = calibrate(observed(list(works(800, seed=seed)), truth, seed=seed), replica())
    for one, true in zip(found.parameters, (kernels, step_s, sequence_s), strict=True):
        assert one.margin is not None
        assert abs(one.after - true) <= 3 * one.margin + 0.01 * true, one
    assert found.judged[-1].after.mape < 0.03
    assert found.judged[-1].after.mape < found.judged[-1].before.mape


def test_the_corrected_profile_predicts_what_the_fit_predicted() -> None:
    """The parameters and the written profile agree, by the replica's own formulas."""
    seen = observed(list(works(400)), Truth(noise=0.0))
    found = calibrate(seen, replica())
    assert found.profile is not None
    again = CalibratedReplica(replica().model, found.profile, tp=1, link=replica()._cost.intra)
    predicted = np.array([again.price(one).seconds for one in seen.observations])
    measured = np.array([one.seconds for one in seen.observations])
    np.testing.assert_allclose(predicted, measured, rtol=2e-3)


def test_errors_are_of_what_the_fit_never_saw() -> None:
    """The judging half has other times than the fitted half, and its errors show that."""
    some = list(works(400))
    seen = observed(some, Truth(noise=0.0))
    slower = [
        replace(one, seconds=one.seconds * (1.5 if i * 40 // 400 % 2 else 1.0))
        for i, one in enumerate(seen.observations)
    ]
    found = calibrate(replace(seen, observations=tuple(slower)), replica())
    assert found.num_fitted == found.judged[-1].count == 200
    assert values(found)["kernels"] == pytest.approx(1.25, rel=0.01)
    assert found.judged[-1].after.bias == pytest.approx(1 / 1.5 - 1, abs=0.01)


def test_kinds_of_iterations_are_told_apart() -> None:
    found = calibrate(observed(list(works(800)), Truth()), replica())
    assert [one.kind for one in found.judged] == ["decode", "mixed", "prefill", ""]
    assert sum(one.count for one in found.judged[:-1]) == found.judged[-1].count


def test_a_constant_load_tells_one_parameter_and_the_others_stay() -> None:
    steady = [ObservedWork(decoding=32.0, attended_tokens=32 * 1000.0)] * 400
    found = calibrate(observed(steady, Truth()), replica())
    fitted = [one for one in found.parameters if one.margin is not None]
    assert len(fitted) == 1
    assert all(one.before == one.after for one in found.parameters if one.margin is None)
    assert found.judged[-1].after.mape < 0.04 < found.judged[-1].before.mape


def test_several_parameters_are_fitted_only_where_each_of_them_is_known() -> None:
    """Two dozen intervals of 20 to 40 requests on a busy host: many values of two parameters fit about as well."""
    for seed in range(50):
        batches = np.random.default_rng(seed).integers(20, 40, 24)
        steady = [ObservedWork(decoding=float(batch), attended_tokens=1000.0 * batch) for batch in batches]
        found = calibrate(observed(steady, Truth(noise=0.3), seed=seed, least=8), replica())
        assert sum(one.margin is not None for one in found.parameters) <= 1, seed


@pytest.mark.parametrize("batches", [(2, 4, 8, 16, 32, 64), (30, 31, 32), (1, 2, 3)])
def test_means_tell_one_parameter_in_whose_interval_the_truth_is(batches: tuple[int, ...]) -> None:
    """Scrapes of an engine whose host differs in both of its times from the profile, as do its kernels."""
    served = CalibratedReplica(
        load_model("Llama-3.1-8B"),
        default_profile(find_gpu(GPU).gpu)[1],
        tp=1,
        link=Link(bytes_per_s=450e9, latency_s=0.0),
    )
    truth = {"kernels": 1.25, "step": 2e-3, "sequence": 0.0}
    seen = []
    for batch in np.random.default_rng(1).choice(batches, 24):
        work = ObservedWork(decoding=float(batch), attended_tokens=1000.0 * batch)
        one = Observation(kind=ObservedKind.INTERVAL, seconds=1.0, parts=((1.0, work),))
        seen.append(replace(one, seconds=truth["kernels"] * served.price(one).kernels_s + truth["step"]))
    found = calibrate(replace(observed([], Truth(), least=8), observations=tuple(seen)), served)
    (fitted,) = [one for one in found.parameters if one.margin is not None]
    assert fitted.margin is not None
    assert abs(fitted.after - truth[fitted.name]) <= fitted.margin


def test_a_profile_that_is_right_is_left_alone() -> None:
    before = replica().price(observed([ObservedWork(decoding=1.0, attended_tokens=1.0)], Truth()).observations[0])
    truth = Truth(kernels=1.0, step_s=before.step_s, sequence_s=0.0, noise=0.05)
    found = calibrate(observed(list(works(400)), truth), replica())
    assert found.profile is None
    assert all(one.margin is None for one in found.parameters)


def test_kernels_of_another_model_are_no_correction() -> None:
    """Under a constant load, seconds of the host would predict it as well."""
    for factor, said in ((30.0, r"kernels take 30(\.\d)? times"), (0.01, r"kernels take 0(\.\d+)? times")):
        steady = [ObservedWork(decoding=32.0, attended_tokens=32 * 1000.0)] * 400
        price = replica().price(observed(steady[:1], Truth()).observations[0])
        exact = Truth(kernels=factor, step_s=price.step_s, sequence_s=0.0)
        found = calibrate(observed(steady, exact), replica())
        assert found.profile is None
        assert re.match(said, found.refusal), found.refusal


def test_a_kind_that_is_still_predicted_badly_is_no_correction() -> None:
    """Prompts take thirty times as long as the profile has it, and everything else as long: no parameter has that."""
    seen = observed(list(works(400)), Truth(kernels=2.0))
    slower = [replace(one, seconds=one.seconds * (30.0 if one.kind != "decode" else 1.0)) for one in seen.observations]
    found = calibrate(replace(seen, observations=tuple(slower)), replica())
    assert found.profile is None
    assert re.match(r"the error of (mixed|prefill|decode) iterations would still be \d+%: check", found.refusal)


def test_a_host_that_takes_almost_no_time_takes_none() -> None:
    """A profile that states 0.1 us for a sequence would be taken for one in a wrong unit."""
    some = list(works(800))
    found = calibrate(observed(some, Truth(kernels=0.9, step_s=2e-3, sequence_s=1e-7, noise=0.0)), replica())
    assert found.profile is not None
    assert values(found)["sequence"] == 0.0
    assert not list(impossible(found.profile, find_gpu(GPU).gpu))


def test_noise_alone_is_no_reason_for_a_correction() -> None:
    some = observed(list(works(400)), Truth(kernels=1.0, step_s=5.8e-4, sequence_s=0.0, noise=1.0))
    found = calibrate(some, replica())
    assert found.profile is None or found.judged[-1].after.mape < found.judged[-1].before.mape


def test_iterations_in_which_the_host_stood_still_are_left_out_and_counted() -> None:
    seen = observed(list(works(400)), Truth())
    stuck = [replace(one, seconds=one.seconds * 100) if i % 50 == 0 else one for i, one in enumerate(seen.observations)]
    found = calibrate(replace(seen, observations=tuple(stuck), left_out={"idle": 3}), replica())
    assert found.left_out["idle"] == 3
    assert next(count for reason, count in found.left_out.items() if f"{STOOD_STILL:g} times" in reason) == 8
    assert values(found)["kernels"] == pytest.approx(1.25, rel=0.03)


def test_too_few_are_refused_with_the_reasons() -> None:
    seen = replace(observed(list(works(39)), Truth()), left_out={"computed nothing": 7})
    message = r"39 iterations are of use, 40 are needed \(left out: 7 computed nothing\)"
    with pytest.raises(InvalidProblemError, match=message):
        calibrate(seen, replica())


def test_only_what_took_part_is_corrected() -> None:
    decodes = [work for work in works(800) if work.kind is ObservedKind.DECODE]
    truth = Truth(kernels=2.0)
    before, after = replica().profile, calibrate(observed(decodes, truth), replica()).profile
    assert fits_of(after, Op.DECODE_ATTENTION) == pytest.approx(
        [2 * x for x in fits_of(before, Op.DECODE_ATTENTION)], rel=0.05
    )
    for op in (Op.PREFILL_ATTENTION, Op.TRANSFER, Op.ALL_REDUCE):
        assert fits_of(after, op) == fits_of(before, op)
    eight_bit = [fit for fit in before.fits if fit.op is Op.DENSE and fit.scope.weight_bytes == 1.0]
    assert eight_bit
    assert set(eight_bit) <= set(after.fits)  # kernels of another precision were not observed
    assert len(fits_of(after, Op.STEP)) == len(fits_of(after, Op.SAMPLE)) == 1


def test_a_factor_of_mixed_batches_stays() -> None:
    """Kernels that are slower alone are as much slower beside a chunk."""
    served = replica()
    mixed = Mixed(factor=1.5, provenance=Provenance(source=Source.FITTED, origin="a test"))
    fits = [replace(fit, mixed=mixed) if fit.op is Op.DECODE_ATTENTION else fit for fit in served.profile.fits]
    profile = replace(served.profile, fits=tuple(fits))
    with_factor = CalibratedReplica(served.model, profile, tp=1, link=Link(bytes_per_s=450e9, latency_s=0.0))
    corrected = calibrate(observed(list(works(800)), Truth(kernels=2.0)), with_factor).profile
    assert fits_of(corrected, Op.DECODE_ATTENTION) != fits_of(profile, Op.DECODE_ATTENTION)
    assert {fit.mixed for fit in corrected.fits if fit.op is Op.DECODE_ATTENTION} == {mixed}


def test_linear_attention_was_not_seen_where_another_model_ran() -> None:
    own = replica()
    linear = tuple(linear_fits(find_gpu(GPU).gpu, own.profile, "vllm"))
    profile = replace(own.profile, fits=(*own.profile.fits, *linear))
    both = CalibratedReplica(own.model, profile, tp=1, link=Link(bytes_per_s=450e9, latency_s=0.0))
    after = calibrate(observed(list(works(400)), Truth(kernels=2.0)), both).profile
    assert linear
    assert set(linear) <= set(after.fits)
    plain = [fit for fit in own.profile.fits if fit.op is Op.PREFILL_ATTENTION]
    assert not set(plain) & set(after.fits)


def test_experts_were_not_seen_where_a_model_without_them_ran() -> None:
    """An observation of a model with experts, on the other hand, corrects them."""
    profile = default_profile(find_gpu(GPU).gpu)[1]
    experts = [fit for fit in profile.fits if fit.op is Op.EXPERTS]
    assert experts
    seen = observed(list(works(400)), Truth())
    for name, stays in (("Llama-3.1-8B", True), ("Qwen3-30B-A3B", False)):
        served = CalibratedReplica(load_model(name), profile, tp=1, link=Link(bytes_per_s=450e9, latency_s=0.0))
        twice = tuple(replace(one, seconds=2.0 * served.price(one).seconds) for one in seen.observations)
        after = calibrate(replace(seen, observations=twice), served).profile
        assert (set(experts) <= set(after.fits)) == stays, name


def test_where_numbers_are_from_and_how_wrong_they_are_is_kept() -> None:
    found = calibrate(observed(list(works(400)), Truth()), replica())
    dense = found.profile.fit(Op.DENSE, replica().model, 1)
    assert dense.provenance.source is Source.FITTED
    assert dense.provenance.held_out_mape == round(found.judged[-1].after.mape, 4)
    assert dense.provenance.origin.endswith(
        "corrected by 200 iterations of vLLM of a test with meta-llama/Meta-Llama-3.1-8B at TP 1"
    )


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1e3), st.integers(0, 300), st.integers(0, 9000), st.integers(0, 9000)).filter(
            lambda x: x[1] + x[3] > 0
        ),
        min_size=40,
        max_size=80,
    )
)
def test_whatever_is_observed_makes_a_valid_result(rows: list[tuple[float, int, int, int]]) -> None:
    seen = []
    for seconds, decoding, context, chunk in rows:
        work = ObservedWork(
            decoding=float(decoding), attended_tokens=float(decoding * context), prompts=float(chunk > 0),
            chunk_tokens=float(chunk),
        )  # fmt: skip
        seen.append(Observation(kind=work.kind, seconds=seconds, parts=((1.0, work),)))
    some = replace(observed([], Truth()), observations=tuple(seen), least=1)
    found = calibrate(some, replica())
    if found.profile is not None:
        assert found.judged[-1].after.mape < found.judged[-1].before.mape
    assert all(one.after >= 0 for one in found.parameters)
