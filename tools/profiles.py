"""Make the shipped profiles and their tables in docs/data from the published ones: ``python -m tools.profiles``.

Run again on the same tables it writes the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from hetis.formats import catalogue
from hetis.formats.files import write_atomically
from hetis.formats.measurements import Measurements
from hetis.profiler import defaults
from hetis.profiler.defaults import FOLDER, profile_text
from hetis.profiler.fit import FittedProfile, fit_profile
from hetis.solver.errors import HetisError
from hetis.solver.profile import Op
from tools import tables
from tools.profile_tables import OverPast, over_past, profile_tables
from tools.simulator_tables import import_tables

_AIC = "aic_{}_{}.csv.gz"
_KINDS = ("comm", "context_attention", "gemm", "generation_attention")
_COLLECTIVES = "vidur_collectives.csv.gz"
_VIDUR = (_COLLECTIVES, "vidur_cpu_overheads.csv.gz", "vidur_layer_ops.csv.gz")
# The sources of each GPU's profile, the most trusted first: importer and files.
SOURCES: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "A100-PCIe-80GB": (("vidur", (_COLLECTIVES,)),),
    "A100-SXM-80GB": (
        ("aiconfigurator", tuple(_AIC.format("a100_sxm", kind) for kind in _KINDS)),
        (
            "aiconfigurator",
            ("aic_a100_sxm_generation_attention_sglang.csv.gz", "aic_a100_sxm_context_attention_sglang.csv.gz"),
        ),
        ("vidur", (*_VIDUR, "vidur_attention_a100.csv.gz")),
    ),
    "A40": (("vidur", _VIDUR),),
    "H100-PCIe-80GB": (("vidur", (_COLLECTIVES,)),),
    "H100-SXM-80GB": (
        ("aiconfigurator", tuple(_AIC.format("h100_sxm", kind) for kind in _KINDS)),
        ("vidur", _VIDUR),
        ("llmservingsim", ("llmservingsim_attention.csv.gz",)),
    ),
    "L40S": (("aiconfigurator", tuple(_AIC.format("l40s", kind) for kind in _KINDS)),),
    "RTX-A6000": (("llmservingsim", ("llmservingsim_layers.csv.gz", "llmservingsim_attention.csv.gz")),),
}
ENGINE_TABLE = "splitwise_e2e.csv.gz"
PAST_TABLE, PAST_GPU = "vidur_attention_a100.csv.gz", "A100-SXM-80GB"


def measurements_for(gpu: str, folder: Path) -> list[Measurements]:
    """Return the measurements from which the profile of ``gpu`` is made.

    Raises:
        DocumentError: a table is missing or malformed.
    """
    return [
        measured
        for form, names in SOURCES[gpu]
        for measured in import_tables(form, [folder / name for name in names])
        if measured.gpu == gpu
    ]


def fitted(gpu: str, folder: Path) -> FittedProfile:
    """Return the profile that is shipped for ``gpu``."""
    return fit_profile(measurements_for(gpu, folder), catalogue.find_gpu(gpu).gpu)


def _fitted_or_why_not(gpu: str, folder: Path) -> FittedProfile | str:
    """Return the profile, or the error as text: errors with fields of their own cannot be pickled between processes."""
    try:
        return fitted(gpu, folder)
    except HetisError as error:
        return str(error)


def _over_past(folder: Path, results: Mapping[str, FittedProfile]) -> OverPast | None:
    """Return what the chunks of `PAST_TABLE` show about its GPU's profile, or None if that was not made."""
    if PAST_GPU not in results:
        return None
    (measured,) = import_tables("vidur", [folder / PAST_TABLE])
    profile, gpu = results[PAST_GPU].profile, catalogue.find_gpu(PAST_GPU).gpu
    model = catalogue.find_model("meta-llama/Llama-2-70b-hf").model
    shipped = profile.fit(Op.PREFILL_ATTENTION, model, 2)
    assert shipped is not None
    return over_past(measured, gpu, shipped)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.profiles", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the published tables")
    ours = Path(defaults.__file__).parent / FOLDER
    parser.add_argument("--out", type=Path, default=ours, help="folder of the profiles")
    parser.add_argument(
        "--tables",
        nargs="?",
        type=Path,
        const=tables.DATA,
        metavar="FOLDER",
        help="also write the tables of docs/accuracy.md",
    )
    parser.add_argument("--gpu", action="append", choices=list(SOURCES), help="only this one; repeatable")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    gpus = options.gpu or list(SOURCES)
    try:
        # Spawn, so that no thread of this process is copied. Each GPU is fitted alone, so that order does not matter.
        with ProcessPoolExecutor(max(1, options.workers), mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(_fitted_or_why_not, gpus, [options.data] * len(gpus)))
        wrong = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if wrong:
            raise HetisError("\n".join(dict.fromkeys(line for text in wrong for line in text.split("\n"))))
        results = {outcome.profile.gpu: outcome for outcome in outcomes if not isinstance(outcome, str)}
        found = []
        if options.tables:
            engines = import_tables("splitwise", [options.data / ENGINE_TABLE])
            found = list(profile_tables(results, engines, _over_past(options.data, results)))
        options.out.mkdir(parents=True, exist_ok=True)
        for gpu, result in results.items():
            write_atomically(options.out / f"{gpu}.json", profile_text(result.profile))
        for name, headings, rows in found:
            tables.write(name, headings, rows, folder=options.tables)
        if options.tables == tables.DATA:
            tables.main()
    except HetisError as error:
        print(f"shipping: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
