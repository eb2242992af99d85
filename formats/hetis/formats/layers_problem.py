"""LayersProblem files: single-node stages, measured by the number of layers they hold, for ``hetis-plan layers``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from hetis.formats.errors import shown
from hetis.formats.fields import (
    Bandwidth,
    Document,
    DocumentPart,
    Duration,
    Found,
    SizeOrBytes,
    Title,
    kind_of,
    mapping,
    value_of,
)
from hetis.formats.units import format_bandwidth, format_duration
from hetis.solver.layers.problem import MAX_LAYERS, MAX_NODES, LayersProblem, Links, NodeType, TimeTable

Rate = Annotated[float, Field(gt=0, le=1e15)]
Tokens = Annotated[float, Field(ge=1, le=1e9)]
Point = Annotated[list[Annotated[float, Field(ge=0, le=1e12)]], Field(min_length=2, max_length=2)]
Points = Annotated[list[Point], Field(min_length=1, max_length=1000)]


class LayerTimesPart(DocumentPart):
    """Milliseconds of one layer as ``[size, ms]``, linear in between: by prompt tokens, and by decoding sequences."""

    prompt: Points
    decode: Points


class NodeTypePart(DocumentPart):
    """Equal nodes. Entry k of a list is for a node with k layers; the length of the list is the most a node can hold.

    ``tokens_per_s`` counts prompt and output tokens together, ``kv_token_layers`` counts KV entries, one per token and
    layer. Without ``layer_ms`` a batch takes as long as its tokens do at the measured rate.
    """

    count: Annotated[int, Field(ge=1, le=MAX_NODES)]
    tokens_per_s: Annotated[list[Rate], Field(min_length=1, max_length=MAX_LAYERS)]
    kv_token_layers: Annotated[list[Rate], Field(min_length=1, max_length=MAX_LAYERS)]
    layer_ms: LayerTimesPart | None = None


class LinksPart(DocumentPart):
    """Network card of every node, latency between any two nodes, and bytes per token between adjacent layers."""

    bandwidth: Bandwidth
    latency: Duration
    activation_bytes: SizeOrBytes


class LayersProblemDocument(Document):
    """Nodes among which to divide contiguous layers, so that they serve the most requests per second."""

    kind: Literal["LayersProblem"]
    name: Title = "layers"
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    node_types: Annotated[dict[Title, NodeTypePart], Field(min_length=1, max_length=MAX_NODES)]
    mean_prompt_tokens: Tokens
    mean_output_tokens: Tokens
    links: LinksPart


def _to_problem(document: LayersProblemDocument) -> LayersProblem:
    links = document.links

    def node_type(name: str, part: NodeTypePart) -> NodeType:
        times = part.layer_ms
        tables = (None, None) if times is None else (_table(times.prompt), _table(times.decode))
        return value_of(NodeType, part, name=name, prompt=tables[0], decode=tables[1])

    types = tuple(node_type(name, part) for name, part in document.node_types.items())
    return value_of(LayersProblem, document, node_types=types, links=value_of(Links, links, latency_s=links.latency))


def _problem_data(problem: LayersProblem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "num_layers": problem.num_layers,
        "node_types": {kind.name: _node_type_data(kind) for kind in problem.node_types},
        "mean_prompt_tokens": problem.mean_prompt_tokens,
        "mean_output_tokens": problem.mean_output_tokens,
        "links": {
            "bandwidth": format_bandwidth(problem.links.bandwidth),
            "latency": format_duration(problem.links.latency_s),
            "activation_bytes": problem.links.activation_bytes,
        },
    }


def _table(points: list[list[float]]) -> TimeTable:
    return TimeTable(sizes=tuple(size for size, _ in points), seconds=tuple(ms / 1e3 for _, ms in points))


def _node_type_data(kind: NodeType) -> dict[str, Any]:
    data: dict[str, Any] = {"count": kind.count, "tokens_per_s": list(kind.tokens_per_s)}
    data["kv_token_layers"] = list(kind.kv_token_layers)
    if kind.prompt is not None and kind.decode is not None:
        data["layer_ms"] = {"prompt": _points(kind.prompt), "decode": _points(kind.decode)}
    return data


def _points(table: TimeTable) -> list[list[float]]:
    return [[size, _milliseconds(seconds)] for size, seconds in zip(table.sizes, table.seconds, strict=True)]


def _milliseconds(seconds: float) -> float:
    """Return the number that is read back as exactly ``seconds``, although rounding may break the round trip."""
    near = 1e3 * seconds
    around = (near, math.nextafter(near, math.inf), math.nextafter(near, 0.0))
    return next((ms for ms in around if ms / 1e3 == seconds), near)


def _check(data: Mapping[str, Any]) -> Found:
    """Yield problems with related lists, the order of tables, and the number of nodes. Types are checked elsewhere."""
    parts = {name: part for name, part in mapping(data.get("node_types")).items() if isinstance(part, dict)}
    for name, part in parts.items():
        rates, room = part.get("tokens_per_s"), part.get("kv_token_layers")
        if isinstance(rates, list) and isinstance(room, list) and len(rates) != len(room):
            message = (
                f"has {len(room)} entries and tokens_per_s {len(rates)}: both need one entry per number of layers held"
            )
            yield ("node_types", name, "kv_token_layers"), message
        for phase, points in mapping(part.get("layer_ms")).items():
            yield from _check_table(("node_types", name, "layer_ms", phase), points)
    counts = [part.get("count") for part in parts.values()]
    total = sum(count for count in counts if isinstance(count, int) and not isinstance(count, bool))
    if total > MAX_NODES and all(isinstance(count, int) and count <= MAX_NODES for count in counts):
        yield ("node_types",), f"has {total:,} nodes in all, at most {MAX_NODES:,} are searched"


def _check_table(path: tuple[str | int, ...], points: Any) -> Found:
    if not isinstance(points, list):
        return
    two = [(n, point) for n, point in enumerate(points) if isinstance(point, list) and len(point) == 2]
    pairs = [(n, point) for n, point in two if all(_is_number(value) for value in point)]
    for (_, before), (n, point) in itertools.pairwise(pairs):
        if point[0] <= before[0]:
            yield (*path, n), f"size {shown(point[0])} comes after {shown(before[0])}, sizes must ascend"
        if point[1] < before[1]:
            yield (*path, n), f"takes {shown(point[1])} ms, less than the smaller size before ({shown(before[1])} ms)"
    if pairs and len(pairs) == len(points) and pairs[-1][1][1] == 0:
        yield (*path, len(points) - 1), "takes 0 ms, the largest size must take more"
    if pairs and len(points) == 1 and pairs[0][1][0] == 0:
        yield (*path, 0), "is 0 and the only size: give another size"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


LAYERS_PROBLEM = kind_of(
    LayersProblemDocument, LayersProblem, to_value=_to_problem, to_data=_problem_data, check=_check
)
load_layers_problem = LAYERS_PROBLEM.load
