"""Times a thousand times too slow or too fast are detected in every table, by every importer and in every profile."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError
from hetis.formats.measurements import MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.defaults import default_profile, shipped_gpus, shipped_profile
from hetis.profiler.engines import ENGINES, for_engine
from hetis.profiler.fit import fit_profile
from hetis.profiler.plausibility import STEP_SECONDS, roofline_seconds, unit_doubt
from hetis.profiler.possible import above_peaks, implausible_fits, impossible
from hetis.profiler.roofline import modelled_profile
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, Op, Piece, Profile
from tests.profiler.small_tables import SMALL_TABLES
from tools.simulator_tables import import_tables

A100 = catalogue.find_gpu("A100-SXM-80GB").gpu
WRONG = pytest.mark.parametrize("factor", [1e3, 1e-3], ids=["too slow", "too fast"])
HEADS = {"query_heads": 32.0, "kv_heads": 8.0, "head_dim": 128.0}
COLUMNS: dict[MeasuredOp, dict[str, float | str]] = {
    MeasuredOp.GEMM: {"m": 512.0, "n": 4096.0, "k": 4096.0, "weight_bits": 16.0},
    MeasuredOp.LAYER: {
        "model": "m", "op": "o", "tp": 1.0, "tokens": 512.0, "hidden": 4096.0, "params": 2e7, "weight_bits": 16.0
    },
    MeasuredOp.PREFILL_ATTENTION: {"batch": 1.0, "tokens": 2048.0, "past_tokens": 0.0, **HEADS},
    MeasuredOp.DECODE_ATTENTION: {"batch": 64.0, "context_tokens": 2048.0, **HEADS},
    MeasuredOp.MIXED_ATTENTION: {
        "tokens": 512.0, "past_tokens": 1024.0, "batch": 64.0, "context_tokens": 2048.0, **HEADS
    },
    MeasuredOp.ALL_REDUCE: {"num_gpus": 4.0, "num_bytes": 2.0**26, "impl": "NCCL"},
    MeasuredOp.TRANSFER: {"num_bytes": 2.0**26, "path": "peer"},
    MeasuredOp.KV_COPY: {"num_bytes": 2.0**26},
    MeasuredOp.STEP: {"batch": 8.0, "tokens": 8.0},
    MeasuredOp.E2E: {
        "model": "m", "tp": 1.0, "batch": 1.0, "prompt_tokens": 512.0, "output_tokens": 128.0, "phase": "token"
    },
}  # fmt: skip
EVERY_OP = pytest.mark.parametrize("op", list(MeasuredOp), ids=str)


def table(op: MeasuredOp, factor: float = 1.0) -> Table:
    """Return thirty rows at half the peaks of an A100, steps of 1 ms and tokens of 30 ms; times a factor."""
    columns = {name: np.full(30, value) for name, value in COLUMNS[op].items()}
    draft = Table(op=op, kernel="k", columns={**columns, "seconds": np.full(30, 1e-3)})
    least = roofline_seconds(draft, A100)
    seconds = np.full(30, 30e-3 if op is MeasuredOp.E2E else 1e-3) if least is None else 2.0 * least
    return Table(op=op, kernel="k", columns={**columns, "seconds": factor * seconds})


@EVERY_OP
def test_half_the_peak_is_no_doubt(op: MeasuredOp) -> None:
    assert unit_doubt(table(op), A100) == ""


@EVERY_OP
@WRONG
def test_a_factor_of_a_thousand_is_found_in_every_table(op: MeasuredOp, factor: float) -> None:
    assert unit_doubt(table(op, factor), A100).endswith("check the unit")


@EVERY_OP
@WRONG
def test_a_fit_refuses_it(op: MeasuredOp, factor: float) -> None:
    measured = Measurements(gpu=A100.name, provenance=MeasuredBy(tool="a test"), tables=(table(op, factor),))
    with pytest.raises(InvalidProblemError, match=rf"^A100-SXM-80GB: {op} of a test: .*: check the unit$"):
        fit_profile([measured], A100)


def test_a_few_wrong_rows_are_no_wrong_unit() -> None:
    """The fit is robust against such rows; the median does not reveal them."""
    good = table(MeasuredOp.GEMM)
    seconds = good.seconds.copy()
    seconds[:10] *= 1e3
    assert unit_doubt(replace(good, columns={**good.columns, "seconds": seconds}), A100) == ""


def test_rows_that_a_launch_takes_longer_than_say_nothing() -> None:
    columns = {name: np.full(30, value) for name, value in COLUMNS[MeasuredOp.DECODE_ATTENTION].items()}
    columns |= {"batch": np.ones(30), "context_tokens": np.full(30, 128.0), "seconds": np.full(30, 5e-5)}
    assert unit_doubt(Table(op=MeasuredOp.DECODE_ATTENTION, kernel="k", columns=columns), A100) == ""


DECODE_ONLY = (
    "gpu,n_embd,n_q_head,n_kv_head,tp,batch_size,prefill_chunk_size,kv_cache_size,is_prefill,attn_prefill_ms,"
    "attn_decode_ms\nA100,8192,64,8,2,64,0,4096,False,,0.42\n"
)
TABLES = [
    *(small for small in SMALL_TABLES if small[1] != "experts"),  # for which the cost model has no operator
    ("vidur", "decode", DECODE_ONLY),
    ("llmservingsim", "decode", DECODE_ONLY),
]


def scaled(text: str, factor: float) -> str:
    """Return the table with all times multiplied."""
    rows = list(csv.DictReader(io.StringIO(text)))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        times = [name for name in row if name.endswith(("_ms", "_ns")) or name == "latency"]
        writer.writerow(row | {name: repr(float(row[name]) * factor) for name in times if row[name]})
    return out.getvalue()


@pytest.mark.parametrize(("form", "name", "text"), TABLES, ids=[f"{form} {name}" for form, name, _ in TABLES])
def test_every_importer_refuses_it_and_takes_the_right_unit(form: str, name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    assert import_tables(form, [path])
    for factor in (1e3, 1e-3):
        path.write_text(scaled(text, factor))
        with pytest.raises(DocumentError) as caught:
            import_tables(form, [path])
        assert str(caught.value).startswith(f"{path}: row ")
        assert "check the unit" in str(caught.value) or "times faster than the peaks" in str(caught.value)


def times_all(fit: Fit, factor: float) -> Fit:
    return replace(
        fit,
        pieces=tuple(
            Piece(**{name: factor * getattr(piece, name) for name in Piece.__dataclass_fields__})
            for piece in fit.pieces
        ),
    )


@pytest.mark.parametrize("gpu", [entry.gpu.name for entry in catalogue.gpus()])
def test_no_modelled_profile_is_doubted(gpu: str) -> None:
    found = catalogue.find_gpu(gpu).gpu
    assert list(implausible_fits(modelled_profile(found), found)) == []
    assert list(impossible(modelled_profile(found), found)) == []


@pytest.mark.parametrize("gpu", shipped_gpus())
def test_no_shipped_profile_is_doubted(gpu: str) -> None:
    profile = shipped_profile(gpu)
    assert profile is not None
    assert list(impossible(profile, catalogue.find_gpu(gpu).gpu)) == []


@pytest.mark.parametrize("gpu", [entry.gpu.name for entry in catalogue.gpus()])
def test_no_kernel_of_an_engine_has_more_flops_than_the_peak(gpu: str) -> None:
    """Latent attention and NVFP4 experts, whose tables are bound by memory, would reach 2.3 times that of a P100."""
    found = catalogue.find_gpu(gpu).gpu
    for engine, whole in itertools.product(ENGINES, (False, True)):
        hosted = for_engine(default_profile(found)[1], found, engine, whole_experts=whole)
        assert [one for one in above_peaks(hosted, found) if "FLOP/s" in one] == []


@pytest.mark.parametrize("op", list(Op), ids=str)
@WRONG
def test_a_profile_with_it_is_broken(op: Op, factor: float) -> None:
    profile = for_engine(modelled_profile(A100), A100, "vllm")
    fits = tuple(times_all(fit, factor) if fit.op is op else fit for fit in profile.fits)
    broken = list(implausible_fits(replace(profile, fits=fits), A100))
    assert {fit.op for fit, _ in broken} == {op}
    assert all("check the unit" in sentence for _, sentence in broken)


def test_decode_attention_that_takes_a_thousand_times_as_long_per_query_head_is_broken() -> None:
    profile = modelled_profile(A100)
    fits = tuple(
        replace(fit, pieces=tuple(replace(piece, head_s=1e3 * piece.head_s) for piece in fit.pieces))
        if fit.op is Op.DECODE_ATTENTION
        else fit
        for fit in profile.fits
    )
    ((fit, sentence),) = implausible_fits(replace(profile, fits=fits), A100)
    assert fit.op is Op.DECODE_ATTENTION
    assert sentence.startswith("512 requests of 256 tokens imply ")


def reading_faster(profile: Profile, op: Op, factor: float) -> Profile:
    """Return the profile with ``factor`` times the bytes per second of ``op``."""
    fits = tuple(
        replace(fit, pieces=tuple(replace(piece, byte_s=piece.byte_s / factor) for piece in fit.pieces))
        if fit.op is op
        else fit
        for fit in profile.fits
    )
    return replace(profile, fits=fits)


@pytest.mark.parametrize(
    ("op", "sentence"),
    [
        (Op.DENSE, "dense reads 4,292 GB/s for 1.7 GB of weights on 1 token, A100-SXM-80GB at most 2,088"),
        (Op.DECODE_ATTENTION, "decode_attention reads 4,472 GB/s for 64 requests of 8,192 tokens, A100-SXM-80GB"),
    ],
)
def test_what_no_cache_holds_is_not_read_faster_than_from_memory(op: Op, sentence: str) -> None:
    """KV at three times the bandwidth of an H200 was once accepted, because a little KV may come from its cache."""
    (broken,) = impossible(reading_faster(modelled_profile(A100), op, 3.0), A100)
    assert broken.startswith(sentence)


def test_the_part_that_fits_into_the_cache_is_read_as_fast_as_may_be() -> None:
    """Of 2.1 GB of KV, an A100 holds 40 MB, and as much as an MI300X is assumed of a GPU that is not known: 256 MB."""
    faster = reading_faster(modelled_profile(A100), Op.DECODE_ATTENTION, 1.65)
    assert list(impossible(faster, A100)) != []
    assert list(impossible(faster, replace(A100, name="Own"))) == []


def test_prompts_may_read_kv_from_the_cache() -> None:
    assert list(impossible(reading_faster(modelled_profile(A100), Op.PREFILL_ATTENTION, 3.0), A100)) == []
    (broken,) = impossible(reading_faster(modelled_profile(A100), Op.PREFILL_ATTENTION, 6.0), A100)
    assert broken.startswith("prefill_attention reads ")


def test_peaks_of_a_type_without_architecture_may_be_measured_ones() -> None:
    profile = modelled_profile(A100)
    measured = replace(A100, fp16_flops=A100.fp16_flops / 1.6)
    assert list(impossible(profile, replace(measured, architecture="unknown"))) == []
    assert list(impossible(profile, measured)) != []
    broken = impossible(profile, replace(measured, architecture="unknown", fp16_flops=A100.fp16_flops / 3.0))
    assert next(broken).startswith("dense reaches ")


def test_an_engine_without_a_step_is_no_doubt() -> None:
    profile = modelled_profile(A100)
    free = tuple(times_all(fit, 0.0) if fit.op in (Op.STEP, Op.SAMPLE) else fit for fit in profile.fits)
    assert list(implausible_fits(replace(profile, fits=free), A100)) == []
    assert STEP_SECONDS[0] < 1e-3 < STEP_SECONDS[1]
