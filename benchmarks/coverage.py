"""How much of what people serve, and of what they own, is read right: models, cards, labels of nodes, logs.

    python -m benchmarks.coverage [--quick] [--json]

A row has the inputs of one kind: ``read``, of these ``right`` where the right answer is known (parameters within 1% of
the published ones, the card that a name means), and ``refused``; ``wrong`` names those that are read and not right. A
name that the catalogue rightly lacks counts as right if it is refused without another card as a hint. Configs are the
published ones in ``tests/formats``, whole or the fields of their shapes. The default configs of all decoders in
transformers are compared with the classes themselves, which torch builds without memory; those that contradict
themselves are left out.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import rows
from benchmarks.measuring.rows import Row
from hetis.formats import catalogue
from hetis.formats.catalogue import UnknownNameError
from hetis.formats.discovery.fleet import discovered
from hetis.formats.discovery.reading import read_inventory
from hetis.formats.errors import DocumentError
from hetis.formats.models.document import load_model
from hetis.formats.models.families import FAMILIES
from hetis.formats.workload import load_workload

TESTS = Path(__file__).parents[1] / "tests" / "formats"
KNOWN = Path(__file__).parent / "known"
REQUESTS = ((0.0, 374, 44), (3.0, 396, 109), (4.0, 879, 55))  # of every log: arrival in seconds, tokens in and out
WITHIN = 0.01


def main() -> None:
    arguments = rows.parser("benchmarks.coverage", __doc__).parse_args()
    rows.show(found(with_transformers=not arguments.quick), arguments, name="coverage")


def found(*, with_transformers: bool) -> Iterator[Row]:
    """Yield a row for each kind of input; that of transformers takes minutes."""
    configs = [*sorted((TESTS / "huggingface").glob("*.json")), *sorted((TESTS / "layered").glob("*.json"))]
    yield _row("configs of models", configs, _is_model_right)
    with tempfile.TemporaryDirectory() as folder:
        lines = (TESTS / "models" / "published.jsonl").read_text(encoding="utf-8").splitlines()
        published = {one["name"]: one for one in map(json.loads, lines)}
        yield _row("shapes of models", list(published), partial(_is_shape_right, Path(folder), published))
    recipes = {name: architecture for name, architecture in _table("recipes.csv").items() if architecture}
    yield _row("models of vLLM's recipes", list(recipes), partial(_has_reader, recipes))
    if with_transformers:
        yield from _architectures()
    cards = _table("cards.csv")
    yield _row("names of cards", list(cards), partial(_is_card_right, cards))
    with tempfile.TemporaryDirectory() as folder:
        labels = (KNOWN / "nodes.jsonl").read_text(encoding="utf-8").splitlines()
        yield _row("labels of nodes", labels, partial(_is_label_right, Path(folder)))
    yield _row("traces and logs", sorted((KNOWN / "logs").iterdir()), is_log_right)


def _table(name: str) -> dict[str, str]:
    """Return a table of two columns."""
    with open(KNOWN / name, encoding="utf-8", newline="") as file:
        return dict(list(csv.reader(file))[1:])


def _row(name: str, inputs: Sequence[Path | str], is_right: Callable[[Path | str], bool | None]) -> Row:
    """Return the row of some inputs; ``is_right`` returns None if the right answer is not known, and may refuse."""
    counts = {"inputs": len(inputs), "read": 0, "right": 0, "refused": 0}
    wrong, is_known = [], False
    for one in inputs:
        try:
            answer = is_right(one)
        except (DocumentError, UnknownNameError):
            counts["refused"] += 1
            continue
        counts["read"] += 1
        is_known |= answer is not None
        counts["right"] += answer is True
        if answer is False:
            wrong.append(one.stem if isinstance(one, Path) else one)
    return {"name": name, **counts, "right": counts["right"] if is_known else "", "wrong": ", ".join(wrong)}


def _is_model_right(path: Path | str) -> bool | None:
    path = Path(path)
    name = path.parent.name if path.name == "config.json" else path.stem
    model = load_model(path)
    known = catalogue.known_model(name.replace("__", "/").replace("--", "/"))
    billions = _table("parameters.csv").get(name.replace("--", "__"), None if known is None else known.params() / 1e9)
    return None if billions is None else abs(model.params() / 1e9 / float(billions) - 1.0) <= WITHIN


def _has_reader(recipes: Mapping[str, str], name: Path | str) -> None:
    """Refuse an architecture that has no reader, and is not read by its fields."""
    if recipes[str(name)] not in FAMILIES and recipes[str(name)] not in _BY_FIELDS:
        raise UnknownNameError("architecture", recipes[str(name)], [])


# Read with a note: their default configs are among those of transformers, or are read like them.
_BY_FIELDS = {"PaddleOCRVLForConditionalGeneration", "GlmOcrForConditionalGeneration", "GlmAsrForConditionalGeneration"}
_BY_FIELDS |= {"Qwen3ASRForConditionalGeneration", "VoxtralRealtimeForConditionalGeneration"}


def _is_shape_right(folder: Path, published: Mapping[str, Any], name: Path | str) -> bool:
    (folder / "config.json").write_text(json.dumps(published[str(name)]["config"]))
    billions = load_model(folder / "config.json").params() / 1e9
    return bool(abs(billions / published[str(name)]["billions"] - 1.0) <= WITHIN)


def _is_card_right(cards: dict[str, str], name: Path | str) -> bool:
    wanted = cards[str(name)]
    try:
        return catalogue.find_gpu(str(name)).gpu.name == wanted
    except UnknownNameError as error:
        if wanted or error.candidates:
            raise
        return True


def _architectures() -> Iterator[Row]:
    """Yield the row of all decoders of transformers, by their default configs and the parameters of their classes."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    families = sorted(causal | set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
    with tempfile.TemporaryDirectory() as folder:
        counted = {family: found for family in families if (found := parameters_of(family)) is not None}
        for family, (data, _) in counted.items():
            (Path(folder) / f"{family}.json").write_text(json.dumps(data, default=str))

        def is_right(family: Path | str) -> bool:
            model = load_model(Path(folder) / f"{family}.json")
            return abs(model.params() / counted[str(family)][1] - 1.0) <= WITHIN

        yield _row("architectures of transformers", list(counted), is_right)


def parameters_of(family: str, **fields: Any) -> tuple[dict[str, Any], int] | None:
    """Return the default config of a family with some ``fields``, and the parameters of its model in transformers.

    None if it is not installed, no decoder, or cannot be built from its defaults.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto import modeling_auto

        config = AutoConfig.for_model(family, **fields)
        has_images = family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        with torch.device("meta"):
            model = (AutoModelForImageTextToText if has_images else AutoModelForCausalLM).from_config(config)
    except Exception:  # classes raise errors of all types where defaults contradict each other
        return None
    if config.is_encoder_decoder:
        return None
    params = sum(one.numel() for one in {id(one): one for one in model.parameters()}.values())
    return config.to_dict() | {"architectures": [type(model).__name__], "model_type": family}, params


def _is_label_right(folder: Path, line: Path | str) -> bool:
    known = json.loads(str(line))
    status = {each: {known["resource"]: "4"} for each in ("capacity", "allocatable")}
    node = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n", "labels": known["labels"]}, "status": status}
    (folder / "node.json").write_text(json.dumps(node))
    fleet = discovered(read_inventory([str(folder / "node.json")]), name="c", said={}).cluster
    return [(group.gpus[0].gpu, group.count * group.gpus[0].count) for group in fleet.node_groups] == [
        (known["gpu_type"], 4)
    ]


def is_log_right(path: Path | str) -> bool:
    """Return whether the means of a file are right, and its rate if it has one."""
    workload = load_workload(path)
    moments, number = workload.moments(), len(REQUESTS)
    means = [sum(request[i] for request in REQUESTS) / number for i in (1, 2)]
    rates = (None, (number - 1) / (REQUESTS[-1][0] - REQUESTS[0][0]))
    has_rate = workload.rate_rps in rates or abs((workload.rate_rps or 0.0) - 0.5) < 1e-3
    found = (moments.mean_prompt, moments.mean_output)
    return has_rate and all(abs(one / mean - 1.0) < WITHIN for one, mean in zip(found, means, strict=True))


if __name__ == "__main__":
    main()
