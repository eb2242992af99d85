"""Derives efficiency.json from the measured tables: ``python -m hetis.profiler.calibrate --data DIR --out FILE``.

Every coefficient is fitted (`fitting.py`) on three quarters of the shapes and judged on the rest; on GPUs without
tables it is judged by what the fit of each measured GPU says about every other one. Run again on the same tables it
writes the same bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from statistics import fmean, median

import numpy as np

from hetis.profiler import report, tables
from hetis.profiler.efficiency import (
    Architecture,
    Efficiencies,
    MemoryRule,
    OpEfficiency,
    RelativePiece,
    borrowed,
    scaled_from,
    to_json,
)
from hetis.profiler.fitting import Coefficients, PieceFit, fit_pieces, mape, rounded
from hetis.profiler.tables import A40, A100, H100, L40S, MeasuredGpu, Points
from hetis.solver.errors import HetisError

_WORTH = 0.005  # a further piece costs the solver a row; it must earn half a point of held-out error

_AIC = "aiconfigurator-core 0.12.0 (Apache-2.0)"
_VIDUR = "microsoft/vidur (MIT)"
_ENGINES = {A100.name: "vLLM 0.14.0", H100.name: "vLLM 0.24.0", L40S.name: "vLLM 0.24.0"}
_MEASURED = {"Ampere": (A100, A40), "Ada": (L40S,), "Hopper": (H100,)}

# Hetis (SC'25) measured prefill MLP on a P100-12GB 24.5 times slower than on an A100-80GB; the peaks differ 16.7 times.
_PASCAL_COMPUTE = 24.5 / (312.0 / 18.7)
_RELATIVES = {
    "Pascal": (
        "Ampere",
        _PASCAL_COMPUTE,
        "No tensor cores: the catalogue's fp16 peak is the CUDA cores'. Hetis (SC'25) measured MLPs on a P100-12GB "
        "24.5 times slower than on an A100-80GB where the peaks differ 16.7 times, so FLOPs take 1.47 times Ampere's "
        "share. Its 7.93 times for decode is read as that compute bound too (a batch above 20 leaves the memory roof "
        "of a P100), so the share of bandwidth is Ampere's. Attention is assumed to read KV once per head group; "
        "vLLM's own kernel for Pascal reads it once per query head.",
    ),
    "Volta": ("Ampere", 1.0, "Tensor cores and HBM of the generation before; no table."),
    "Turing": ("Ampere", 1.0, "Tensor cores of the generation before; no table, GDDR6 parts assumed like the A40."),
    "Blackwell": ("Hopper", 1.0, "The generation before; no table. RTX parts (GDDR7) may be nearer to Ada."),
    "CDNA": ("Ampere", 1.0, "Contemporary HBM part; no table. ROCm libraries may reach less of the peak."),
    "CDNA2": ("Ampere", 1.0, "Contemporary HBM part; no table. ROCm libraries may reach less of the peak."),
    "CDNA3": ("Hopper", 1.0, "Contemporary HBM part; no table. ROCm libraries may reach less of the peak."),
    "CDNA4": ("Hopper", 1.0, "Contemporary HBM part; no table. ROCm libraries may reach less of the peak."),
    "Gaudi2": ("Ampere", 1.0, "Contemporary HBM part; no table. Another programming model: the least certain of all."),
    "Gaudi3": ("Hopper", 1.0, "Contemporary HBM part; no table. Another programming model: the least certain of all."),
    "Battlemage": ("Ada", 1.0, "GDDR6 part with a large cache; no table."),
}
_MEMORY = MemoryRule(
    usable_ratio=0.9,
    reserve_bytes=int(1.25 * 2**30),
    reason="assumed: engines take 0.90 to 0.95 of a card by default, the driver and ECC keep some; of the usable part "
    "1.25 GiB go to the CUDA context, captured graphs, collective buffers and workspaces",
)
_TRANSFER_WIRE = 1.25


def calibrate(folder: Path) -> Efficiencies:
    """All efficiencies from the tables in ``folder``.

    Raises:
        TableError: a table is missing or malformed.
    """
    dense = {gpu: tables.dense_points(folder, gpu) for gpu in (A100, A40, L40S, H100)}
    dense_fp8 = {gpu: tables.dense_points(folder, gpu, dtype="fp8") for gpu in (L40S, H100)}
    prefill = {gpu: [tables.prefill_points(folder, gpu)] for gpu in (A100, L40S, H100)}
    decode = {gpu: [tables.decode_points(folder, gpu)] for gpu in (A100, L40S, H100)}
    nvlink = {gpu: [tables.all_reduce_points(folder, gpu)] for gpu in (A100, H100)}
    measured: dict[str, dict[str, OpEfficiency]] = {name: {} for name in _MEASURED}
    for op, features, by_gpu, origin in (
        ("dense", ("fixed_s", "flop", "byte"), dense, f"{_AIC} GEMMs and {_VIDUR} layer operators"),
        ("dense_fp8", ("fixed_s", "flop", "byte"), dense_fp8, f"{_AIC} fp8 GEMMs and {_VIDUR} elementwise operators"),
        ("prefill_attention", ("fixed_s", "flop", "token_bytes"), prefill, f"{_AIC} prefill attention"),
        ("decode_attention", ("fixed_s", "flop", "byte", "head_bytes"), decode, f"{_AIC} decode attention, cold cache"),
        (
            "all_reduce_nvlink",
            ("fixed_s", "wire"),
            nvlink,
            f"{_AIC} all-reduce, faster of NCCL and vLLM's, 2 to 8 GPUs",
        ),
    ):
        transfer = _transfer_mape(by_gpu)
        for arch, gpus in _MEASURED.items():
            points = {gpu: by_gpu[gpu] for gpu in gpus if gpu in by_gpu}
            if points:
                fit = _fit(features, points, origin)
                measured[arch][op] = replace(fit, transfer_mape=transfer)
    for ops in measured.values():
        ops["decode_attention"] = _with_compute_piece(ops["decode_attention"], ops["prefill_attention"])
    # Never measured where they are missing: Ada has no NVLink board, Ampere no fp8 units; relatives may have both.
    measured["Ada"]["all_reduce_nvlink"] = borrowed(measured["Ampere"]["all_reduce_nvlink"])
    measured["Ampere"]["dense_fp8"] = borrowed(measured["Hopper"]["dense_fp8"])
    return Efficiencies(
        memory=_MEMORY,
        links={"all_reduce_pcie": _pcie(folder), "transfer": _transfer(folder), "step": _step(folder)},
        architectures=_architectures(measured),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hetis.profiler.calibrate", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the measured tables")
    parser.add_argument("--out", type=Path, required=True, help="efficiency.json to write")
    parser.add_argument("--doc", type=Path, help="Markdown report to write")
    options = parser.parse_args(arguments)
    try:
        efficiencies = calibrate(options.data)
        _write(options.out, to_json(efficiencies))
        if options.doc:
            _write(options.doc, report.render(efficiencies, options.data))
    except HetisError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    return 0


def _fit(names: Sequence[str], by_gpu: dict[MeasuredGpu, list[Points]], origin: str) -> OpEfficiency:
    """Fits on the training shapes of all GPUs together; the number of pieces is chosen by held-out error."""
    sets = [points for points_of_gpu in by_gpu.values() for points in points_of_gpu]
    train, held_out = (
        _joined([_part(p, held_out=False) for p in sets]),
        _joined([_part(p, held_out=True) for p in sets]),
    )
    fits: list[tuple[float, PieceFit]] = []
    for num_pieces in (1, 2, 3):
        fit = fit_pieces(train.features, train.seconds, num_pieces=num_pieces)
        fits.append((mape(fit.pieces, held_out.features, held_out.seconds), fit))
    least = min(error for error, _ in fits)
    error, fit = next((error, fit) for error, fit in fits if error <= least + _WORTH)
    engines = ", ".join(f"{gpu.name}: {_ENGINES[gpu.name]}" for gpu in by_gpu if gpu.name in _ENGINES)
    return OpEfficiency(
        pieces=_relative_pieces(names, fit.pieces),
        origin=f"{origin} ({engines})",
        measured_on=tuple(gpu.name for gpu in by_gpu),
        num_points=len(train.seconds) + len(held_out.seconds),
        fitted_mape=rounded(fit.mape),
        held_out_mape=rounded(error),
    )


def _transfer_mape(by_gpu: dict[MeasuredGpu, list[Points]]) -> float:
    """Mean error of one GPU's fit on another GPU's points, over all ordered pairs of measured GPUs."""
    joined = {gpu: _joined(sets) for gpu, sets in by_gpu.items()}
    pieces = {gpu: fit_pieces(p.features, p.seconds, num_pieces=2).pieces for gpu, p in joined.items()}
    return rounded(fmean(mape(pieces[a], joined[b].features, joined[b].seconds) for a, b in permutations(joined, 2)))


def _with_compute_piece(decode: OpEfficiency, prefill: OpEfficiency) -> OpEfficiency:
    """Adds the roof that MLA meets (240 FLOPs per byte at 128 heads): decode at prefill's share of the compute peak."""
    fixed_s = max(piece.fixed_s for piece in decode.pieces)
    flop = max(piece.flop for piece in prefill.pieces)
    note = "the second piece, compute at prefill's efficiency, is assumed: no table reaches MLA's FLOPs per byte"
    return replace(decode, pieces=(*decode.pieces, RelativePiece(fixed_s=fixed_s, flop=flop)), note=note)


def _pcie(folder: Path) -> OpEfficiency:
    """Geometric mean of two hosts (L40S, A40) over 2 and 4 GPUs; each host is judged by the other's mean.

    Over 8 GPUs both hosts cross sockets and reach a third of that again: one does not plan for it, so it is left out.
    """
    hosts = [tables.all_reduce_points(folder, L40S), tables.a40_all_reduce_points(folder)]
    hosts = [_selected(p, np.array([not shape.startswith("8x") for shape in p.shapes])) for p in hosts]
    fits = []
    for p in hosts:
        wire_s = p.features[:, 1]
        large = wire_s > 1e-3
        fixed_s = float(np.median(p.seconds[wire_s < 2e-6]))
        fits.append(
            (fixed_s, math.exp(fmean(math.log(s / w) for s, w in zip(p.seconds[large], wire_s[large], strict=True))))
        )
    errors = [mape([fit], p.features, p.seconds) for fit, p in ((fits[1], hosts[0]), (fits[0], hosts[1]))]
    fixed_s, wire = (math.sqrt(a * b) for a, b in zip(*fits, strict=True))
    return OpEfficiency(
        pieces=(RelativePiece(fixed_s=rounded(fixed_s), wire=rounded(wire)),),
        origin=f"{_AIC} L40S host (NCCL 2.27.3) and {_VIDUR} A40 host, PCIe, 2 and 4 GPUs",
        measured_on=(L40S.name, A40.name),
        num_points=sum(len(p.seconds) for p in hosts),
        held_out_mape=rounded(fmean(errors)),
        transfer_mape=rounded(fmean(errors)),
        note="hosts differ by a factor of four (peer-to-peer or through host memory, sockets crossed): measure yours",
    )


def _transfer(folder: Path) -> OpEfficiency:
    """The fixed time from small messages inside a node; the share of the wire is assumed, as no table names its NIC."""
    in_node = [rows for (_, one_node), rows in tables.send_seconds(folder).items() if one_node]
    small = [seconds for rows in in_node for num_bytes, seconds in rows if num_bytes <= 16384]
    return OpEfficiency(
        pieces=(RelativePiece(fixed_s=rounded(median(small)), wire=_TRANSFER_WIRE),),
        origin=f"{_VIDUR} send_recv: median of messages up to 16 KiB inside a node for the fixed part; 80% of the "
        "nominal bandwidth is assumed (a DGX H100 pair across nodes reaches 36 GB/s, 72% if its NIC is 400 Gb/s)",
        note="the link's latency comes on top",
    )


def _step(folder: Path) -> OpEfficiency:
    """What is left per iteration when the host's work overlaps the device's: the sampler at the smallest batch."""
    rows = tables.sampler_seconds(folder)
    smallest = rows[0][0]
    fixed_s = median(seconds for batch, seconds in rows if batch == smallest)
    return OpEfficiency(
        pieces=(RelativePiece(fixed_s=rounded(fixed_s)),),
        origin=f"{_VIDUR} CPU overheads, A100 hosts: median sampler end to end at batch {smallest}; scheduling, input "
        "preparation and output processing (1.2 ms more there, growing with the batch) are assumed overlapped, as "
        "engines of 2025 do",
    )


def _architectures(measured: dict[str, dict[str, OpEfficiency]]) -> dict[str, Architecture]:
    architectures = {name: Architecture(name=name, ops=ops) for name, ops in measured.items()}
    for name, (relative, factor, reason) in _RELATIVES.items():
        architectures[name] = scaled_from(architectures[relative], name, factor=rounded(factor), reason=reason)
    return dict(sorted(architectures.items()))


def _relative_pieces(names: Sequence[str], pieces: Sequence[Coefficients]) -> tuple[RelativePiece, ...]:
    return tuple(RelativePiece(**dict(zip(names, piece, strict=True))) for piece in pieces)


def _part(points: Points, *, held_out: bool) -> Points:
    """A quarter of the shapes, chosen by a checksum of their names, is held out."""
    return _selected(points, np.array([(zlib.crc32(shape.encode()) % 4 == 0) == held_out for shape in points.shapes]))


def _selected(points: Points, keep: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Points:
    return replace(
        points,
        shapes=[shape for shape, kept in zip(points.shapes, keep, strict=True) if kept],
        features=points.features[keep],
        seconds=points.seconds[keep],
    )


def _joined(sets: Sequence[Points]) -> Points:
    return replace(
        sets[0],
        shapes=[shape for p in sets for shape in p.shapes],
        features=np.concatenate([p.features for p in sets]),
        seconds=np.concatenate([p.seconds for p in sets]),
    )


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
