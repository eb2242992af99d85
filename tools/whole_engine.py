"""The cost model's predictions for whole engines that others measured end to end, from profiles of single kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from hetis.formats import catalogue
from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.solver.cost import DeviceCost, intra_link, rank_shape
from hetis.solver.profile import Profile
from hetis.solver.workload import LengthBin, moments_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTime:
    """Seconds to the first token (``prompt``) or per later one (``token``), the median of the samples."""

    gpu: str
    model: str
    tp: int
    phase: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Return predicted / measured - 1, which is positive if predicted too slow."""
        return self.predicted_s / self.measured_s - 1.0


def engine_times(
    measurements: Sequence[Measurements], profiles: Mapping[str, Profile], model: str
) -> tuple[list[EngineTime], list[EngineTime]]:
    """Return end-to-end times of ``model`` on GPUs with a profile, with their predictions; without power-capped hosts.

    Returns:
        The times, and those of runs whose prompts were processed faster than the peaks allow, which cannot be real.
    """
    samples: dict[tuple[str, int, str, int, int, int], list[float]] = defaultdict(list)
    for measured in measurements:
        if measured.gpu not in profiles or measured.provenance.host:
            continue
        for table in measured.tables:
            if table.op is not MeasuredOp.E2E:
                continue
            counts = (table.numbers(name) for name in ("tp", "batch", "prompt_tokens", "output_tokens"))
            rows = zip(table.text("model"), table.text("phase"), *counts, table.seconds, strict=True)
            for name, phase, tp, batch, prompt, output, second in rows:
                if name == model:
                    key = (measured.gpu, int(tp), phase, int(batch), int(prompt), int(output))
                    samples[key].append(float(second))
    times = [
        EngineTime(
            gpu=gpu,
            model=model,
            tp=tp,
            phase=phase,
            batch=batch,
            prompt_tokens=prompt,
            output_tokens=output,
            measured_s=median(seconds),
            predicted_s=predicted_s(profiles[gpu], model, tp, phase, batch, prompt, output),
        )
        for (gpu, tp, phase, batch, prompt, output), seconds in sorted(samples.items())
    ]
    impossible = {_run(time) for time in times if time.phase == "prompt" and time.measured_s < _least_s(time)}
    return [t for t in times if _run(t) not in impossible], [t for t in times if _run(t) in impossible]


def predicted_s(profile: Profile, model: str, tp: int, phase: str, batch: int, prompt: int, output: int) -> float:
    """Apply docs/cost-model.md to one iteration of a stage without a pool: a whole prompt batch, or a decode step."""
    spec, gpu = catalogue.find_model(model).model, catalogue.find_gpu(profile.gpu).gpu
    shape = rank_shape(spec, tp)
    assert shape is not None, f"{model} cannot be split {tp} ways"
    moments = moments_of([LengthBin(prompt_tokens=prompt, output_tokens=output, weight=1.0)], block_tokens=1)
    cost = DeviceCost(spec, profile, moments, shape, intra_link(gpu, None))
    tokens = batch * prompt if phase == "prompt" else batch
    if phase == "prompt":
        # One call per prompt: the cost model's chunk is one prompt long, and the kernel's work adds up.
        attention = batch * cost.prefill_s(prompt)
    else:
        attention = float(cost.decode_attention_s(batch * shape.groups, shape.queries_per_group))
    layer = cost.dense_s(tokens) + cost.reduces_s(tokens) + attention
    return float(spec.num_layers * layer + cost.head_s(batch) + cost.step_s(tokens))


def mean_error(times: Sequence[EngineTime]) -> tuple[float, float]:
    """Return the mean absolute error and the mean error."""
    return fmean(abs(time.error) for time in times), fmean(time.error for time in times)


def _run(time: EngineTime) -> tuple[str, int, int, int, int]:
    return time.gpu, time.tp, time.batch, time.prompt_tokens, time.output_tokens


def _least_s(time: EngineTime) -> float:
    """Return the time of the layers' FLOPs alone at the nominal peak."""
    spec, gpu = catalogue.find_model(time.model).model, catalogue.find_gpu(time.gpu).gpu
    tokens = time.batch * time.prompt_tokens
    return 2.0 * tokens * spec.num_layers * spec.active_layer_params() / (time.tp * gpu.fp16_flops)
