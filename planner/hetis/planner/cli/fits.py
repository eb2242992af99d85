"""The verb ``fits``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.parameters import values
from hetis.planner.cli.parameters.options import group, option, panel, verb
from hetis.planner.cli.parameters.requests import requested

if TYPE_CHECKING:
    from hetis.planner.use_cases.fits import EngineChoice
    from hetis.solver.cluster import GpuType
    from hetis.solver.model import ModelSpec

FITS_EXAMPLES = """Examples:\n
  hetis-plan fits gpt-oss-120b --gpu H100-SXM-80GB\n
  hetis-plan fits Llama-3.3-70B --gpu 3090=4 --context 32k --weights awq-int4\n
  hetis-plan fits Qwen3-235B-A22B --weights fp8 --gpu H100-SXM-80GB=4 --gpu H200-SXM-141GB=2 -o json\n
  hetis-plan fits Qwen3-32B"""

_model, _engine = panel("Model"), panel("Engine")


@group
class FitOptions:
    gpu: list[str] | None = option(
        "--gpu TYPE[=N]: A GPU type of `catalog gpus`, and how many of them one replica has; repeatable.",
        shown="the fewest of every common type",
    )
    context: int | None = option(
        "--context N: Least tokens of context that a request must have, such as 32k.",
        parser=values.tokens,
        shown="the model's, or what there is room for",
    )
    weights: str | None = _model("--weights P: Precision of the weights.", parser=values.weights, shown="the model's")
    kv: str | None = _model("--kv P: Precision of the KV cache: bf16 or fp8.", parser=values.kv, shown="the model's")
    mtp: str | None = requested("mtp")
    engine: str = _engine("--engine NAME: vllm, vllm-hetis or sglang.", "vllm", parser=values.fitted_engine)
    engine_version: str | None = _engine(
        "--engine-version V: Version of the engine, which decides what it counts.",
        parser=values.engine_version,
        shown="that of `version`",
    )
    tp: int | None = _engine("--tp N: Ranks per stage; more GPUs are further stages.", min=1, shown="the most possible")
    max_num_seqs: int | None = requested("max_num_seqs", shown="the engine's")
    max_num_batched_tokens: int | None = _engine(
        "--max-num-batched-tokens N: Most tokens of an iteration.", min=1, shown="the engine's"
    )
    gpu_memory_utilization: float | None = _engine(
        "--gpu-memory-utilization SHARE: Share of the memory that the engine takes.",
        parser=values.share,
        shown="the engine's",
    )
    in_use: int | None = _engine(
        "--in-use SIZE: Memory of each GPU that others hold.", parser=values.size, shown="none"
    )
    eager: bool = _engine("--eager: Capture no graphs.", False)

    @property
    def choice(self) -> EngineChoice:
        from hetis.engines.versions import Engine
        from hetis.planner.use_cases.fits import EngineChoice

        return EngineChoice(
            engine=Engine(self.engine),
            version=self.engine_version,
            tp=self.tp,
            context_tokens=self.context,
            max_num_seqs=self.max_num_seqs,
            batched_tokens=self.max_num_batched_tokens,
            utilisation=self.gpu_memory_utilization,
            eager=self.eager,
            in_use_bytes=self.in_use or 0,
        )


@verb()
def fits(
    terminal: Terminal,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name of `catalog models`, a ModelSpec file, or a config.json.")
    ],
    *,
    options: FitOptions,
) -> ExitCode:
    """Show whether a model fits on GPUs, how much KV they hold, and what takes the memory.

    The numbers are those with which the engine starts by itself; a plan chooses its own. Exits 3 if it fits nowhere.
    """
    from hetis.formats.documents import load_model
    from hetis.planner.report.fits import fits_table, one_fit
    from hetis.planner.use_cases.fits import fit, least_gpus, version_of
    from hetis.planner.use_cases.json_values import document

    spec, choice = _in_precision(load_model(model), options), options.choice
    given = [_gpus(text) for text in options.gpu or ()]
    found = [fit(spec, gpu, count, choice) for gpu, count in given] if given else least_gpus(spec, choice)
    wide = terminal.is_wide
    terminal.emit(
        lambda: document("Fits", model=spec.name, engine=choice.engine, version=version_of(choice), fits=found),
        lambda: one_fit(spec, choice, found[0]) if len(given) == 1 else fits_table(spec, choice, found, wide=wide),
    )
    return ExitCode.OK if any(one.starts for one in found) else ExitCode.INFEASIBLE


def _in_precision(model: ModelSpec, options: FitOptions) -> ModelSpec:
    from hetis.formats.models.document import drafts
    from hetis.formats.models.dtypes import with_precision

    model = with_precision(model, weights=options.weights, kv=options.kv)
    return model if options.mtp is None else replace(model, draft=drafts(options.mtp))


def _gpus(text: str) -> tuple[GpuType, int]:
    from hetis.formats import catalogue

    name, is_counted, count = text.rpartition("=")
    if not is_counted:
        name, count = text, "1"
    if not count.isdecimal() or not 1 <= int(count) <= 1024:
        raise typer.BadParameter(
            f"{text!r} is not a GPU type and a count such as H100-SXM-80GB=2", param_hint="'--gpu'"
        )
    try:
        return catalogue.find_gpu(name).gpu, int(count)
    except catalogue.UnknownNameError as error:
        raise typer.BadParameter(str(error), param_hint="'--gpu'") from None
