"""Writes docs/profiles-modelled.md: the coefficients, their errors, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetis.profiler.efficiency import Efficiencies, OpEfficiency, RelativePiece
from tools.validation import comparisons, splitwise_token_times

_INTRODUCTION = """\
# Modelled profiles

Made by `python -m tools.efficiency --data ../shared/data/profiles --out profiler/hetis/profiler/efficiency.json
--doc docs/profiles-modelled.md`; do not edit.

A GPU's profile is a roofline: the coefficients below times the peaks the catalogue gives for it. `f` is the time the
FLOPs take at the peak matrix rate, `b` the time the bytes take at the peak memory bandwidth, `w` the time on the
nominal wire; `1.25 b` means that 80% of the bandwidth is reached. Bytes per token or head are at the peak bandwidth
too. Where there are several pieces the largest counts.

Three errors, all mean absolute percentages: on the points fitted, on points held out, and on GPUs never seen (each
measured GPU predicted from the fit of every other one, the mean over all pairs; each pair is listed below). The last
is what a GPU without tables gets as `held_out_mape`.
"""
_SELECTION = """\
## What was fitted to

The points, the split and the fits of [profiles.md](profiles.md), in the serving range only, the work divided by the
peaks of its GPU:

- **dense**, **dense_fp8**: whole layers without attention, 1 to 8192 tokens, from the same tables as the shipped
  profiles. Of Ampere's (A100: layers put together from a grid; A40: measured layers) the A40's alone judge.
- **prefill_attention**: prompts of 256 to 16k tokens, 4 and more heads of 128. The KV is charged one reading.
- **decode_attention**: batch 4 and more, context 256 to 16k, 4 and more heads of 128; without the rows whose KV a cache
  may have served.
- **all_reduce**: 8 KiB to 256 MiB on 2, 4 and 8 GPUs, the fastest library at each size; PCIe: 2 and 4 GPUs on two
  hosts, geometric mean.
- Left out: SGLang's and vidur's attention (other kernels; compared below), LLMServingSim's decode attention (its A6000
  rows imply up to 75 TB/s of KV, a hundred times the memory bandwidth), and the engine below.
- The number of pieces is chosen within the points fitted, on parts of them; the points held out only judge.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What the fit of one GPU, its work relative to the peaks, says of all points of another."""

    op: str
    fitted: str
    judged: str
    num_points: int
    mape: float
    bias: float


def render(efficiencies: Efficiencies, pairs: Sequence[Pair], folder: Path) -> str:
    """The Markdown text."""
    parts = [_INTRODUCTION, "## Coefficients\n", _coefficients(efficiencies), _pairs(pairs), _SELECTION]
    parts.append("## Relatives\n")
    parts.append(
        _table(
            ("architecture", "relative", "FLOPs take", "why"),
            (
                (arch.name, arch.relative, f"{arch.compute_factor:.3g}x", arch.reason)
                for arch in efficiencies.architectures.values()
                if arch.relative is not None
            ),
        )
    )
    memory = efficiencies.memory
    parts.append(
        f"## Memory\n\nUsable: {memory.usable_ratio:.0%} of the nominal memory; {memory.reserve_bytes / 2**30:.1f} GiB "
        f"of it are the engine's reserve. Reason: {memory.reason}.\n"
    )
    parts.append(
        "## Compared with tables that took no part\n\nMedian of measured / predicted; 1 is right, 2 is twice as slow.\n"
    )
    parts.append(
        _table(
            ("table", "points", "measured / predicted", "MAPE"),
            ((c.what, str(c.num_points), f"{c.ratio:.2f}", f"{c.mape:.0%}") for c in comparisons(efficiencies, folder)),
        )
    )
    parts.append(
        "Fused experts: small experts reach less than a dense layer of the same work does, and skewed routing touches "
        "fewer of them than the even routing assumed.\n"
    )
    parts.append(
        "## Compared with a whole engine\n\n"
        "Splitwise's table, Llama-2-70B, one request, 512 prompt and 128 output tokens.\n"
    )
    parts.append(
        _table(
            ("GPU", "TP", "measured ms/token", "predicted", "measured / predicted"),
            (
                (
                    t.gpu,
                    str(t.tp),
                    f"{t.measured_s * 1e3:.1f}",
                    f"{t.predicted_s * 1e3:.1f}",
                    f"{t.measured_s / t.predicted_s:.2f}",
                )
                for t in splitwise_token_times(efficiencies, folder)
            ),
        )
    )
    parts.append(
        "The engine of that table (2023) gains nothing from TP 4 to TP 8: we read it "
        "as bound by the host's launches, which engines with captured graphs no longer pay. Nothing was tuned "
        "to this table.\n"
    )
    return "\n".join(parts)


def _pairs(pairs: Sequence[Pair]) -> str:
    table = _table(
        ("op", "fitted on", "predicts", "points", "MAPE", "bias"),
        ((p.op, p.fitted, p.judged, str(p.num_points), f"{p.mape:.1%}", f"{p.bias:+.1%}") for p in pairs),
    )
    return f"## One GPU from another\n\n{table}"


def _coefficients(efficiencies: Efficiencies) -> str:
    measured = [arch for arch in efficiencies.architectures.values() if arch.relative is None]
    rows = [_row(op_name, arch.name, op) for arch in measured for op_name, op in arch.ops.items()]
    rows += [_row(name, "any", op) for name, op in efficiencies.links.items()]
    header = ("op", "architecture", "pieces", "points", "fitted", "held out", "unseen GPUs")
    origins = {f"{name} ({arch.name})": op for arch in measured for name, op in arch.ops.items() if op.num_points}
    origins.update(efficiencies.links)
    notes = "\n".join(f"- {name}: {op.origin}{'; ' + op.note if op.note else ''}." for name, op in origins.items())
    return f"{_table(header, sorted(rows))}\n### Provenance\n\n{notes}\n"


def _row(name: str, arch: str, op: OpEfficiency) -> tuple[str, ...]:
    errors = (op.fitted_mape, op.held_out_mape, op.transfer_mape)
    points = str(op.num_points) if op.num_points else "borrowed" if arch != "any" else ""
    return name, arch, "; ".join(map(_piece, op.pieces)), points, *("" if e is None else f"{e:.1%}" for e in errors)


def _piece(piece: RelativePiece) -> str:
    terms = (
        (piece.fixed_s * 1e6, "us"),
        (piece.flop, "f"),
        (piece.byte, "b"),
        (piece.token_bytes / 1e3, "kB/token"),
        (piece.head_bytes / 1e3, "kB/head"),
        (piece.wire, "w"),
    )
    return " + ".join(f"{value:.3g} {unit}" for value, unit in terms if value) or "0"


def _table(header: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(cell or "" for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
