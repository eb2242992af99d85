"""Derive efficiency.json from the measured tables: ``python -m tools.efficiency --data DIR --out FILE``.

Points and fits are those of `hetis.profiler.fit`, with work divided by the peaks of the measured GPU, so that the GPUs
of an architecture share one fit. The number of pieces is chosen within the fitted points; errors are those of held-out
points. For GPUs without tables, every pair of measured GPUs shows how well the fit of one predicts the other. The same
tables give the same bytes.

Blackwell's attention and four-bit products, and all operators of RTX Blackwell and Battlemage but links, come from the
tables that aiconfigurator-core publishes in its own package (``--engine-tables``: its ``systems/data``); without them,
what the package has is kept. Blackwell's other operators are Hopper's: the products and all-reduces in those tables are
slower at small batches than whole engines were.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.files import write_atomically
from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.profiler.fit import selected_points
from hetis.profiler.fit.errors import SERVING, error_stats, within
from hetis.profiler.fit.pieces import fit_points
from hetis.profiler.fit.points import FEATURES, Points
from hetis.profiler.fitting import Coefficients, mape, predict, rounded
from hetis.profiler.roofline import (
    NVFP4_BYTES,
    Architecture,
    Efficiencies,
    OpEfficiency,
    RelativePiece,
    borrowed,
    matrix_flops,
    scaled_from,
    shipped_efficiencies,
)
from hetis.solver.cluster import GpuType
from hetis.solver.errors import HetisError
from hetis.solver.profile import FitScope, Op
from tools import tables
from tools.efficiency_file import to_json
from tools.left_out import Operator, Pieces, Tables, joined
from tools.modelled_tables import Pair, modelled_tables
from tools.profiles import SOURCES, measurements_for
from tools.simulator_tables import import_tables
from tools.unmeasured import BOARDS, H200_SHARE, MEMORY, RELATIVES, Board

_AIC = "aiconfigurator-core 0.12.0 (Apache-2.0)"
_VIDUR = "microsoft/vidur (MIT)"
_GPUS = ("A100-SXM-80GB", "A40", "H100-SXM-80GB", "L40S")
# The points on which each operator is calibrated, with its name in the file.
_OPS = {
    "dense": (Op.DENSE, FitScope()),
    "dense_fp8": (Op.DENSE, FitScope(weight_bytes=1.0)),
    "dense_nvfp4": (Op.DENSE, FitScope(weight_bytes=NVFP4_BYTES)),
    "prefill_attention": (Op.PREFILL_ATTENTION, FitScope(head_dim=128)),
    "decode_attention": (Op.DECODE_ATTENTION, FitScope(head_dim=128)),
}
# What the engine tables add to an architecture without tables of ours: their system, engine, GPU, and operators.
_ATTENTION = ("prefill_attention", "decode_attention")
_OF_ENGINES = {
    "Blackwell": ("b200_sxm", "vllm/0.24.0", "B200-SXM-180GB", ("dense_nvfp4", *_ATTENTION)),
    "RTX Blackwell": ("rtx_pro_6000_server", "vllm/0.24.0", "RTX-PRO-6000-Server-96GB", tuple(_OPS)),
    "Battlemage": ("b60", "vllm/0.26.0", "Arc-Pro-B60-24GB", ("dense", *_ATTENTION)),
}
_RELATIVE = {
    "fixed_s": "fixed_s",
    "flop_s": "flop",
    "byte_s": "byte",
    "token_s": "token_bytes",
    "head_s": "head_bytes",
    "wire": "wire",
}

_TRANSFER_WIRE = 1.25
_SMALL_BYTES = 16384
_PCIE_HOSTS = ("L40S", "A40")
_OP_OF = {
    **{name: op for name, (op, _) in _OPS.items()},
    **dict.fromkeys(("all_reduce_nvlink", "all_reduce_pcie"), Op.ALL_REDUCE),
    "transfer": Op.TRANSFER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The efficiencies, and what the fit of each measured GPU predicts for every other one."""

    efficiencies: Efficiencies
    pairs: tuple[Pair, ...]


def calibrate(folder: Path, engine_tables: Path | None = None) -> Calibration:
    """Return all efficiencies from the tables in ``folder``, and from the engine tables or their shipped results.

    Raises:
        DocumentError: a table is missing or malformed.
    """
    every = relative_points(folder)
    left_out = measured_tables(every)
    gpus = {name: catalogue.find_gpu(name).gpu for name in _GPUS}
    relative = {name: every[name] for name in _GPUS}
    collectives = import_tables("vidur", [folder / "vidur_collectives.csv.gz"])
    measured: dict[str, dict[str, OpEfficiency]] = {gpu.architecture: {} for gpu in gpus.values()}
    pairs: list[Pair] = []
    for op in (*_OPS, "all_reduce_nvlink"):
        by_gpu = {name: chosen for name, found in relative.items() if (chosen := _chosen(op, found, gpus[name]))}
        if not by_gpu:
            continue
        crossed = list(_pairs(op, by_gpu))
        pairs += crossed
        transfer = rounded(fmean(pair.mape for pair in crossed))
        for architecture in measured:
            own = [chosen for name, chosen in by_gpu.items() if gpus[name].architecture == architecture]
            names = tuple(name for name in by_gpu if gpus[name].architecture == architecture)
            if own:
                measured[architecture][op] = replace(
                    _fit(own, names), transfer_mape=transfer, range_error=left_out.range_error(op)
                )
    for ops in measured.values():
        ops["decode_attention"] = _with_compute_piece(ops["decode_attention"], ops["prefill_attention"])
    # Missing if never measured: Ada has no NVLink board, Ampere no fp8 units; related architectures may have both.
    measured["Ada"]["all_reduce_nvlink"] = borrowed(measured["Ampere"]["all_reduce_nvlink"])
    measured["Ampere"]["dense_fp8"] = borrowed(measured["Hopper"]["dense_fp8"])
    pcie = {name: [p for p in relative[name] if p.op is Op.ALL_REDUCE] for name in _PCIE_HOSTS}
    over_pcie = replace(_pcie(pcie), range_error=left_out.range_error("all_reduce_pcie"))
    links = {"all_reduce_pcie": over_pcie, "transfer": _transfer(collectives), "step": _step(folder)}
    published = {name: _own_ops(name, measured, engine_tables) for name in _OF_ENGINES}
    efficiencies = Efficiencies(memory=MEMORY, links=links, architectures=_architectures(measured, published))
    return Calibration(efficiencies=efficiencies, pairs=tuple(pairs))


def _own_ops(
    architecture: str, measured: Mapping[str, Mapping[str, OpEfficiency]], engine_tables: Path | None
) -> dict[str, OpEfficiency]:
    """Return the operators of an architecture that only the tables of engines have.

    Other GPUs of the architecture get the errors that unseen GPUs have for the relative's operator.
    """
    system, engine, name, ops = _OF_ENGINES[architecture]
    if engine_tables is None:
        return {op: shipped_efficiencies().architectures[architecture].ops[op] for op in ops}
    gpu, kinds = catalogue.find_gpu(name).gpu, ("gemm/{}/gemm", "attention/{}/context_attention")
    files = [f"{kind.format(engine)}_perf.parquet" for kind in (*kinds, "attention/{}/generation_attention")]
    tables_of = import_tables("aiconfigurator", [engine_tables / system / file for file in files])
    points = relative_to_peaks(selected_points(tables_of, gpu).points, gpu)
    found = dict[str, OpEfficiency]()
    for op in ops:
        chosen = _chosen(op, points, gpu)
        assert chosen is not None, f"{system} has {op}"
        like = measured[RELATIVES[architecture][0]]["dense_fp8" if op == "dense_nvfp4" else op]
        found[op] = replace(_fit([chosen], (name,)), transfer_mape=like.transfer_mape, range_error=like.range_error)
    found["decode_attention"] = _with_compute_piece(found["decode_attention"], found["prefill_attention"])
    return found


def relative_points(folder: Path) -> dict[str, list[Points]]:
    """Return the points of every measured GPU in the serving range, with work in seconds at its peaks.

    Raises:
        DocumentError: a table is missing or malformed.
    """
    gpus = {name: catalogue.find_gpu(name).gpu for name in SOURCES}
    return {
        name: relative_to_peaks(selected_points(measurements_for(name, folder), gpu).points, gpu)
        for name, gpu in gpus.items()
    }


def measured_tables(relative: Mapping[str, Sequence[Points]]) -> Tables:
    """Group what `relative_points` found by operator, for trials that leave GPUs out."""
    gpus = {name: catalogue.find_gpu(name).gpu for name in relative}
    operators = []
    for op in (*_OPS, "all_reduce_nvlink"):
        by_gpu = {name: chosen for name, found in relative.items() if (chosen := _chosen(op, found, gpus[name]))}
        sources = tuple(name for name in _GPUS if name in by_gpu)
        operators.append(Operator(name=op, points=by_gpu, sources=sources, fit=_pieces_of, family="device"))
    pcie = {
        name: joined(reduces)
        for name, found in relative.items()
        if not gpus[name].nvlink_bytes_per_s and (reduces := _few_gpus(found))
    }
    hosts = tuple(name for name in _PCIE_HOSTS if name in pcie)
    reduced = partial(Operator, name="all_reduce_pcie", fit=_hosts_fit, family="hosts", by_architecture=False)
    operators.append(reduced(points=pcie, sources=hosts))
    transfers = {name: points for name, found in relative.items() for points in found if points.op is Op.TRANSFER}
    operators.append(
        Operator(
            name="transfer",
            points=transfers,
            sources=tuple(transfers),
            fit=_small_messages,
            family=None,
            by_architecture=False,
        )
    )
    return Tables(
        operators={op.name: op for op in operators if op.points},
        architectures={name: gpu.architecture for name, gpu in gpus.items()},
    )


def without(measured: Tables, gpu: GpuType, relative: str) -> Efficiencies:
    """Return the efficiencies of the architecture of ``gpu`` as if it had not been measured, ranges included.

    Operators that no other GPU of its architecture has are those of ``relative``, or of any other architecture if that
    has none either.
    """
    ops, links = dict[str, OpEfficiency](), dict(shipped_efficiencies().links)
    for name in measured.operators:
        found = measured.relatives(name, gpu.name)
        if not found:
            continue
        chosen = next((one for one in (gpu.architecture, relative) if one in found), next(iter(found)))
        efficiency = OpEfficiency(
            pieces=_relative_pieces(_OP_OF[name], measured.pieces(name, found[chosen])),
            origin=f"{', '.join(found[chosen])}, without {gpu.name}",
            transfer_mape=measured.mean_error(name, without={gpu.name}),
            range_error=measured.range_error(name, without={gpu.name}),
        )
        (links if name in links else ops)[name] = efficiency
    ops["decode_attention"] = _with_compute_piece(ops["decode_attention"], ops["prefill_attention"])
    architecture = Architecture(name=gpu.architecture, ops=ops, relative=relative)
    return replace(shipped_efficiencies(), links=links, architectures={gpu.architecture: architecture})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.efficiency", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the measured tables")
    parser.add_argument("--out", type=Path, required=True, help="efficiency.json to write")
    parser.add_argument("--engine-tables", type=Path, metavar="DIR", help="systems/data of aiconfigurator-core 0.12.0")
    optional: dict[str, Any] = {"nargs": "?", "type": Path, "const": tables.DATA, "metavar": "FOLDER"}
    parser.add_argument("--tables", **optional, help="also write the tables of docs/accuracy.md")
    options = parser.parse_args(arguments)
    try:
        calibration = calibrate(options.data, options.engine_tables)
        write_atomically(options.out, to_json(calibration.efficiencies))
        if options.tables:
            relatives = {name: board.relative for name, board in BOARDS.items()}
            for found in modelled_tables(calibration.efficiencies, calibration.pairs, options.data, relatives):
                tables.write(*found, folder=options.tables)
        if options.tables == tables.DATA:
            tables.main()
    except HetisError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    return 0


def relative_to_peaks(found: Sequence[Points], gpu: GpuType) -> list[Points]:
    """Return the points in the serving range, with work in seconds at the peaks of ``gpu``."""
    results = []
    for points in found:
        flops = matrix_flops(gpu, points.scope.weight_bytes) if points.op is Op.DENSE else gpu.fp16_flops
        peaks = {"flop_s": flops, "byte_s": gpu.mem_bytes_per_s, "token_s": gpu.mem_bytes_per_s}
        peaks |= {"head_s": gpu.mem_bytes_per_s}
        served = points.kept(within(SERVING[points.op], points.sizes, len(points)))
        scale = np.array([1.0 / peaks.get(name, 1.0) for name in FEATURES[points.op]])
        given = {name: value * peaks[name] for name, value in points.given.items()}
        results.append(replace(served, features=served.features * scale, given=given))
    return results


def _chosen(op: str, found: Sequence[Points], gpu: GpuType) -> Points | None:
    """Return the points of one operator on one GPU; all-reduces over any number of GPUs are joined."""
    if op == "all_reduce_nvlink":
        reduces = [points for points in found if points.op is Op.ALL_REDUCE]
        return joined(reduces) if reduces and gpu.nvlink_bytes_per_s else None
    wanted = _OPS[op]
    return next((points for points in found if (points.op, points.scope) == wanted), None)


def _fit(sets: Sequence[Points], names: Sequence[str]) -> OpEfficiency:
    points = joined(sets)
    found = fit_points(points)
    seen = points.kept(found.fitted)
    return OpEfficiency(
        pieces=_relative_pieces(points.op, found.pieces),
        origin=points.origin,
        measured_on=tuple(names),
        num_points=len(points),
        fitted_mape=error_stats(predict(found.pieces, seen.features), seen.seconds).mape,
        held_out_mape=error_stats(found.predicted, points.seconds[found.judges]).mape,
    )


def _pairs(op: str, by_gpu: Mapping[str, Points]) -> list[Pair]:
    """Return what the fit of each GPU predicts for all points of every other one."""
    pieces = {name: fit_points(points).pieces for name, points in by_gpu.items()}
    return [
        Pair(op=op, fitted=a, judged=b, num_points=len(by_gpu[b]), mape=stats.mape, bias=stats.bias)
        for a, b in permutations(by_gpu, 2)
        for stats in (error_stats(predict(pieces[a], by_gpu[b].features), by_gpu[b].seconds),)
    ]


def _with_compute_piece(decode: OpEfficiency, prefill: OpEfficiency) -> OpEfficiency:
    """Add the roof that MLA meets (240 FLOPs per byte at 128 heads): decode at prefill's share of the compute peak."""
    fixed_s = max(piece.fixed_s for piece in decode.pieces)
    flop = max(piece.flop for piece in prefill.pieces)
    note = "the second piece, compute at prefill's efficiency, is assumed: no table reaches MLA's FLOPs per byte"
    return replace(decode, pieces=(*decode.pieces, RelativePiece(fixed_s=fixed_s, flop=flop)), note=note)


def _pcie(by_host: Mapping[str, Sequence[Points]]) -> OpEfficiency:
    """Return the geometric mean of two hosts (L40S, A40) over 2 and 4 GPUs; each host is judged by the other's fit.

    Over 8 GPUs both hosts cross sockets and reach only a third of it. No sensible plan has that, so it is left out.
    """
    hosts = [joined(_few_gpus(found)) for found in by_host.values()]
    fits = [_host_fit(points) for points in hosts]
    errors = [mape([fit], points.features, points.seconds) for fit, points in zip(fits[::-1], hosts, strict=True)]
    return OpEfficiency(
        pieces=_relative_pieces(Op.ALL_REDUCE, _hosts_fit(hosts)),
        origin=f"{_AIC} L40S host (NCCL 2.27.3) and {_VIDUR} A40 host, PCIe, 2 and 4 GPUs",
        measured_on=tuple(by_host),
        num_points=sum(len(points) for points in hosts),
        held_out_mape=rounded(fmean(errors)),
        transfer_mape=rounded(fmean(errors)),
        note="hosts differ by a factor of four (peer-to-peer or through host memory, sockets crossed): measure yours",
    )


def _few_gpus(found: Sequence[Points]) -> list[Points]:
    return [points for points in found if points.op is Op.ALL_REDUCE and points.scope.tp in (2, 4)]


def _hosts_fit(hosts: Sequence[Points]) -> Pieces:
    """Return the geometric mean of the hosts' fits."""
    fits = [_host_fit(points) for points in hosts]
    return (tuple(rounded(math.prod(values) ** (1.0 / len(fits))) for values in zip(*fits, strict=True)),)


def _host_fit(points: Points) -> tuple[float, float]:
    """Return the fixed time and the time per nominal second on the wire of one host."""
    wire_s = points.features[:, 1]
    large = wire_s > 1e-3
    fixed_s = float(np.median(points.seconds[wire_s < 2e-6]))
    shares = zip(points.seconds[large], wire_s[large], strict=True)
    return fixed_s, math.exp(fmean(math.log(seconds / wire) for seconds, wire in shares))


def _pieces_of(sets: Sequence[Points]) -> Pieces:
    return fit_points(joined(sets)).pieces


def _small_messages(sets: Sequence[Points]) -> Pieces:
    """Return transfers as `_transfer` models them: a fixed time by small messages, an assumed share of the wire."""
    small = [float(s) for points in sets for s in points.seconds[points.sizes["num_bytes"] <= _SMALL_BYTES]]
    return ((rounded(median(small)), _TRANSFER_WIRE),)


def _transfer(collectives: Sequence[Measurements]) -> OpEfficiency:
    """Fit the fixed time to small messages inside a node.

    The share of the wire's rate is assumed, as no table names its NIC.
    """
    small = [
        seconds
        for measured in collectives
        for table in measured.tables
        if table.op is MeasuredOp.TRANSFER
        for path, num_bytes, seconds in zip(
            table.text("path"), table.numbers("num_bytes"), table.seconds.tolist(), strict=True
        )
        if path == "peer" and num_bytes <= _SMALL_BYTES
    ]
    return OpEfficiency(
        pieces=(RelativePiece(fixed_s=rounded(median(small)), wire=_TRANSFER_WIRE),),
        origin=f"{_VIDUR} send_recv: median of messages up to 16 KiB inside a node for the fixed part; 80% of the "
        "nominal bandwidth is assumed (a DGX H100 pair across nodes reaches 36 GB/s, 72% if its NIC is 400 Gb/s)",
        note="the link's latency comes on top",
    )


def _step(folder: Path) -> OpEfficiency:
    """Return the rest of an iteration when host and device work overlap: the sampler at the smallest batch."""
    hosts = import_tables("vidur", [folder / "vidur_cpu_overheads.csv.gz"])
    (table,) = next(measured for measured in hosts if measured.gpu == "A100-SXM-80GB").tables
    batch = table.numbers("batch")
    fixed_s = float(np.median(table.seconds[batch == batch.min()]))
    return OpEfficiency(
        pieces=(RelativePiece(fixed_s=rounded(fixed_s)),),
        origin=f"{_VIDUR} CPU overheads, A100 hosts: median sampler end to end at batch {batch.min():.0f}; scheduling, "
        "input preparation and output processing (1.2 ms more there, growing with the batch) are assumed overlapped, "
        "as engines of 2025 do",
    )


def _architectures(
    measured: Mapping[str, Mapping[str, OpEfficiency]], own: Mapping[str, Mapping[str, OpEfficiency]]
) -> dict[str, Architecture]:
    architectures = {name: Architecture(name=name, ops=ops) for name, ops in measured.items()}
    for name, (relative, factor, reason) in RELATIVES.items():
        architectures[name] = scaled_from(
            architectures[relative], name, factor=rounded(factor), reason=reason, own=own.get(name)
        )
    for name, board in BOARDS.items():
        architectures[name] = _of_board(name, board, architectures[board.relative], architectures["Hopper"])
    return dict(sorted(architectures.items()))


def _of_board(name: str, board: Board, relative: Architecture, reference: Architecture) -> Architecture:
    """Return an architecture with the relative's operators, whose FLOPs and bytes take other shares of the peaks.

    Products of many tokens reach as large a part of the tool's rate as those of ``reference``, which the same tool
    measured; products of few tokens stream their weights. Both factors apply to all operators.
    """
    dense = max(piece.flop for piece in reference.ops["dense"].pieces) * H200_SHARE / board.flop_share
    compute = rounded(dense / max(piece.flop for piece in relative.ops["dense"].pieces))
    memory = rounded(1.0 / board.byte_share / max(piece.byte for piece in relative.ops["dense"].pieces))
    ops = {op_name: _with_shares(op, compute, memory, board.relative) for op_name, op in relative.ops.items()}
    ops["dense"] = replace(ops["dense"], note=board.reason)
    reason = f"{board.reason}. Bytes take {memory:.3g} times {board.relative}'s share."
    return Architecture(name=name, ops=ops, compute_factor=compute, reason=reason)


def _with_shares(op: OpEfficiency, compute: float, memory: float, relative: str) -> OpEfficiency:
    pieces = tuple(
        replace(
            piece,
            flop=rounded(piece.flop * compute),
            byte=rounded(piece.byte * memory),
            token_bytes=rounded(piece.token_bytes * memory),
            head_bytes=rounded(piece.head_bytes * memory),
        )
        for piece in op.pieces
    )
    return replace(borrowed(op), pieces=pieces, origin=f"{op.origin}; scaled from {relative}")


def _relative_pieces(op: Op, pieces: Sequence[Coefficients]) -> tuple[RelativePiece, ...]:
    names = [_RELATIVE[name] for name in FEATURES[op]]
    return tuple(RelativePiece(**dict(zip(names, piece, strict=True))) for piece in pieces)


if __name__ == "__main__":
    sys.exit(main())
