"""Kernels of engines: what `experts`, `latent` and `linear` share in deriving and shipping them.

The tables are those of aiconfigurator-core 0.12.0 (Apache-2.0; ``systems/data`` in its package). A kernel is a frozen
dataclass with ``architecture`` and ``origin``; the kernels of a kind are rows of a JSON file beside this module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hetis.formats.files import write_atomically
from hetis.profiler.fitting import rounded
from hetis.profiler.roofline import shipped_efficiencies
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Piece, Provenance, Source

PUBLISHER = "aiconfigurator-core 0.12.0 (Apache-2.0)"
SYSTEMS = {  # their names, and ours for their GPUs
    "h100_sxm": "H100-SXM-80GB", "h200_sxm": "H200-SXM-141GB", "b200_sxm": "B200-SXM-180GB",
    "a100_sxm": "A100-SXM-80GB", "l40s": "L40S",
    "rtx_pro_6000_server": "RTX-PRO-6000-Server-96GB", "b60": "Arc-Pro-B60-24GB",
}  # fmt: skip
NEAREST = "Hopper"  # stands in for architectures without tables


class Kernel(Protocol):
    @property
    def architecture(self) -> str: ...

    @property
    def origin(self) -> str: ...


K = TypeVar("K")


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table. Raises OSError if it cannot be read."""
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def kernels_in(file: str, kind: Callable[..., K]) -> tuple[K, ...]:
    """Return the kernels in a file of the package."""
    text = resources.files("hetis.profiler").joinpath(file).read_text(encoding="utf-8")
    return tuple(kind(**fields) for fields in json.loads(text)["kernels"])


def below_peak(piece: Piece, flops: float) -> tuple[Piece, ...]:
    """Return the pieces of a kernel that its ``piece`` describes and that reaches at most ``flops`` per second.

    Where memory bounds every row of a table, its fit leaves FLOPs next to nothing. On a GPU with much bandwidth for its
    FLOPs (H20), and for more work than the table has, these bound the kernel.
    """
    roof = Piece(fixed_s=piece.fixed_s, flop_s=rounded(1.0 / flops))
    return (piece,) if piece.flop_s >= roof.flop_s else (piece, roof)


def provenance_of(kernel: Kernel, gpu: GpuType) -> Provenance:
    """Return the provenance of a kernel's fit on ``gpu``.

    On the GPU of its table, which the origin names, no error is stated, because plans use it beside other fits. Other
    GPUs, of the same architecture, too, have the range that dense products of GPUs never seen have.
    """
    relative = "" if kernel.architecture == gpu.architecture else f"; scaled from {kernel.architecture}"
    is_measured = f" on {gpu.name}," in kernel.origin
    unseen = None if is_measured else shipped_efficiencies().architectures[NEAREST].ops["dense"].range_error
    return Provenance(source=Source.MODELLED, origin=f"{kernel.origin}{relative}", range_error=unseen)


def make_file(
    name: str, about: str, derived: Callable[[Path], Iterable[Any]], arguments: Sequence[str] | None
) -> int:  # fmt: skip
    """Write the file of the kernels ``name`` from tables: the command line of their module. Return its exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m hetis.profiler.{name}", description=about.split(":")[0])
    parser.add_argument("--tables", type=Path, required=True, help="systems/data of aiconfigurator-core")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / f"{name}.json", help="file to write")
    options = parser.parse_args(arguments)
    try:
        kernels = [asdict(kernel) for kernel in derived(options.tables)]
    except OSError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    text = ",\n".join(json.dumps(kernel) for kernel in kernels)
    write_atomically(options.out, f'{{"made_by": "python -m hetis.profiler.{name}", "kernels": [\n{text}\n]}}\n')
    return 0
