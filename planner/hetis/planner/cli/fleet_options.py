"""Options of the verbs that plan for another fleet: which GPUs join or leave, and in which nodes."""

from __future__ import annotations

from typing import Annotated

import typer

from hetis.planner.cli import quantities

_FLEET = "Another fleet"
_MARKET = "What to buy"

AddOption = Annotated[
    list[str] | None,
    typer.Option(
        "--add",
        metavar="NxTYPE",
        rich_help_panel=_FLEET,
        show_default=False,
        help="GPUs that join: 4xL4; repeatable.",
    ),
]
RemoveOption = Annotated[
    list[str] | None,
    typer.Option(
        "--remove",
        metavar="NODE",
        rich_help_panel=_FLEET,
        show_default=False,
        help="A node that leaves, or a group of nodes: a100-0, a100; repeatable.",
    ),
]
NodeLikeOption = Annotated[
    str | None,
    typer.Option(
        "--node-like",
        metavar="NODE",
        rich_help_panel=_FLEET,
        show_default=False,
        help="GPUs join in nodes like this one: as many GPUs, its zone, NIC and link inside.",
    ),
]
GpusPerNodeOption = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        min=1,
        metavar="N",
        rich_help_panel=_FLEET,
        show_default="8",
        help="GPUs of a node that joins; the last one has what is left.",
    ),
]
ZoneOption = Annotated[
    str | None,
    typer.Option(
        "--zone",
        metavar="ZONE",
        rich_help_panel=_FLEET,
        show_default="the fleet's first",
        help="Zone of the nodes that join.",
    ),
]
NicOption = Annotated[
    float | None,
    typer.Option(
        "--nic",
        parser=quantities.bandwidth,
        metavar="BANDWIDTH",
        rich_help_panel=_FLEET,
        show_default="the fleet's network",
        help="Network card of the nodes that join: 100Gbps.",
    ),
]
BuyNextOption = Annotated[
    bool,
    typer.Option(
        "--buy-next", rich_help_panel=_MARKET, help="Add every GPU type of the market in turn: which gains most?"
    ),
]
MarketOption = Annotated[
    str | None,
    typer.Option(
        "--market",
        metavar="TYPE[=USD],...|FILE",
        rich_help_panel=_MARKET,
        show_default="types with a known price",
        help="GPU types to try, with the price of one per hour where it is another; a file has one per line.",
    ),
]
CountOption = Annotated[
    int,
    typer.Option("--count", min=1, max=4096, metavar="N", rich_help_panel=_MARKET, help="GPUs of each type to add."),
]
