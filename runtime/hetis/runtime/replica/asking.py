"""What `hetis-launch` was asked to do, checked as a whole, and the processes that follow from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hetis.runtime.replica.commands import Addresses, Command, EngineArguments, commands_of
from hetis.runtime.replica.processes import PlannedProcess, Sizes, processes_of
from hetis.runtime.replica.roles import PromptSites, prompt_sites
from hetis.runtime.server.errors import ServeError
from hetis.runtime.server.options import Checking, checked_dtype, checked_folder, checked_range

# Options of hetis-serve that follow from the plan, or that the memory of workers follows from.
_OURS = frozenset(
    (
        "--model",
        "-m",
        "--plan",
        "--replica",
        "--kv-tokens",
        "--page-tokens",
        "--dtype",
        "--device",
        "--compute",
        "--worker",
        "--stage",
        "--store",
        "--kv-listen",
        "--prefill",
    )
)
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,252}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A replica of a plan, to be run or shown.

    Attributes:
        plan, model: as they were given, for the command lines.
        processes: the engine first.
        prompts: of a replica with a role, where prompts are computed.
        serve_options: for `hetis-serve`, as they stand.
    """

    plan: Path
    model: Path
    replica: int
    processes: tuple[PlannedProcess, ...]
    serve_options: tuple[str, ...]
    own_options: tuple[str, ...]
    prompts: PromptSites = field(default_factory=PromptSites)

    def commands(self, addresses: Addresses, *, worker_device: str) -> tuple[Command, ...]:
        """How each is started where these addresses hold."""
        engine = EngineArguments(
            plan=str(self.plan),
            replica=self.replica,
            model=str(self.model),
            options=(*self.own_options, *self.serve_options),
            prompts=self.prompts,
        )
        return commands_of(self.processes, engine, addresses, worker_device=worker_device)


def read_asked(
    *,
    plan: Path | None,
    model: Path | None,
    replica: int,
    kv_tokens: int | None,
    page_tokens: int,
    dtype: str,
    serve_options: Sequence[str],
    set_here: Sequence[str] = (),
    wrong: Sequence[str] = (),
) -> Asked:
    """The replica that the options name.

    Args:
        serve_options: what is passed on to `hetis-serve`.
        set_here: options of it that are given in another way, beside those that always are.
        wrong: what else is wrong with the options, to be said with the rest.

    Raises:
        ServeError: options are wrong; all that is.
        DocumentError, ModelError: the plan's file, or the model's folder, cannot be used.
        LayoutError: this engine cannot run the replica.
    """
    checking = Checking()
    checking.wrong += wrong
    folder = checking.get(lambda: checked_folder(model))
    file = checking.get(lambda: _checked_plan(plan))
    chosen_dtype = checking.get(lambda: checked_dtype(dtype))
    checking.get(lambda: checked_range("--replica", replica, least=0, most=10**6))
    checking.get(lambda: checked_range("--page-tokens", page_tokens, least=1, most=4096))
    if kv_tokens is not None:
        checking.get(lambda: checked_range("--kv-tokens", kv_tokens, least=1, most=2**31))
    checking.get(lambda: _check_serve_options(serve_options, _OURS | set(set_here)))
    checking.finish()
    assert folder is not None
    assert file is not None

    from hetis.formats.documents import load_plan
    from hetis.runtime.model.config import read_config

    sizes = Sizes(dtype=chosen_dtype, page_tokens=page_tokens, kv_tokens=kv_tokens)
    planned = load_plan(file)
    processes = processes_of(planned, replica, read_config(folder), sizes)
    return Asked(
        plan=file,
        model=folder,
        replica=replica,
        processes=processes,
        prompts=prompt_sites(planned, replica),
        serve_options=tuple(serve_options),
        own_options=_own_options(sizes),
    )


def checked_hosts(texts: Sequence[str]) -> dict[str, str]:
    """``NODE=HOST``, one after the other.

    Raises:
        ServeError: one is something else, or a node comes twice.
    """
    hosts: dict[str, str] = {}
    wrong = []
    for text in texts:
        node, _, host = text.rpartition("=")
        if not node or not _HOST.fullmatch(host):
            wrong.append(f"--node-address is {text!r}, must be NODE=HOST, such as gpu2=10.0.0.2")
        elif node in hosts:
            wrong.append(f"--node-address: {node} comes twice")
        hosts[node] = host
    if wrong:
        raise ServeError(*wrong)
    return hosts


def checked_replica_names(texts: Sequence[str]) -> dict[int, str]:
    """``NUMBER=NAME``, one after the other. Raises ServeError: one is something else, or a number comes twice."""
    names: dict[int, str] = {}
    wrong = []
    for text in texts:
        number, _, name = text.partition("=")
        if not number.isdecimal() or len(number) > 6 or not name:
            wrong.append(f"--replica-name is {text!r}, must be NUMBER=NAME, such as 0=chat-prefill")
        elif int(number) in names:
            wrong.append(f"--replica-name: {number} comes twice")
        else:
            names[int(number)] = name
    if wrong:
        raise ServeError(*wrong)
    return names


def _checked_plan(plan: Path | None) -> Path:
    if plan is None:
        raise ServeError("--plan is missing: a plan of hetis-plan place")
    return plan


def _check_serve_options(options: Sequence[str], ours: frozenset[str]) -> None:
    named = {option.partition("=")[0] for option in options}
    wrong = [f"{name} stands after --: it is hetis-launch that sets it" for name in sorted(named & ours)]
    if options and not options[0].startswith("-"):
        wrong.append(f"{options[0]!r} is no option; those of hetis-serve stand after --")
    if wrong:
        raise ServeError(*wrong)


def _own_options(sizes: Sizes) -> tuple[str, ...]:
    """What the engine must be told so that its memory is the same as counted here."""
    options: list[str] = []
    if sizes.dtype is not None:
        options += ["--dtype", sizes.dtype]
    if sizes.page_tokens != Sizes().page_tokens:
        options += ["--page-tokens", str(sizes.page_tokens)]
    if sizes.kv_tokens is not None:
        options += ["--kv-tokens", str(sizes.kv_tokens)]
    return tuple(options)
