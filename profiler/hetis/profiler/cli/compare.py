"""``hetis-profile compare``: two profiles side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.formats.command_line.verb import verb
from hetis.profiler.cli.exit_codes import ProfileExitCode
from hetis.profiler.cli.options import GpuOrFileArgument


@verb()
def compare(
    terminal: Terminal,
    a: GpuOrFileArgument,
    b: GpuOrFileArgument,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME|FILE", help="The model whose layer is compared.")
    ] = "meta-llama/Llama-3.1-8B",
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree.")] = 1,
) -> ProfileExitCode:
    """Compare the times of two profiles over typical points of one layer; ratio: B's over A's."""
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from hetis.formats.model import load_model
    from hetis.profiler.cli.profiles import profile_of
    from hetis.profiler.cli.words import seconds
    from hetis.profiler.pictures.typical import typical_times
    from hetis.solver.errors import InvalidProblemError

    spec, first, second = load_model(model), profile_of(a), profile_of(b)
    if spec.q_heads % tp:
        raise InvalidProblemError(f"--tp is {tp}, must divide the {spec.q_heads} query heads of {spec.name}")
    both = zip(typical_times(first, spec, tp), typical_times(second, spec, tp), strict=True)
    rows = [(x, y) for x, y in both if x.seconds > 0 and y.seconds > 0]  # 0: one has no fit for it

    def document() -> dict[str, Any]:
        points = [
            {"op": x.op, "point": x.point, "a_s": x.seconds, "b_s": y.seconds, "ratio": y.seconds / x.seconds}
            for x, y in rows
        ]
        return {"a": first.gpu, "b": second.gpu, "model": spec.name, "tp": tp, "points": points}

    def table() -> RenderableType:
        found = Table(box=None, pad_edge=False, header_style="bold")
        found.add_column("op")
        found.add_column("point")
        for name in ("A", "B", "B/A"):
            found.add_column(name, justify="right", no_wrap=True)
        for x, y in rows:
            found.add_row(x.op, x.point, seconds(x.seconds), seconds(y.seconds), f"{y.seconds / x.seconds:.3g}")
        title = f"one layer of {spec.name} at TP {tp}"
        return Group(Text(title, style="bold"), Text(f"A: {a} ({first.gpu})\nB: {b} ({second.gpu})"), found)

    terminal.emit(document, table)
    return ProfileExitCode.OK
