"""The fields of a model's ``config.json``, read so that all their problems are reported together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hetis.formats.errors import Problem, shown
from hetis.formats.positions import Text

MAX_NUMBER = 10**9
# Limits of model files, see `hetis.formats.models.document`; no model has so many.
MAX_LAYERS = 10_000
MAX_STREAMS = 64  # copies of the residual


class LinearLayers(NamedTuple):
    """The layers of linear attention of a model.

    Attributes:
        numbers: which layers they are, from 0.
        matrices: parameters of each matrix, by its name in a layer of the checkpoint.
        shape: what the cost model knows of them; None if there are none.
    """

    numbers: tuple[int, ...] = ()
    matrices: Mapping[str, int] = {}
    shape: Mapping[str, Any] | None = None


NO_LINEAR_LAYERS = LinearLayers()
# Names of the number of a layer's experts. Transformers 5 writes another one than its earlier versions did.
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")


@dataclass(slots=True)
class Config:
    """Reads fields and collects their problems, so that all are reported. ``at``: the path of ``data`` in the file."""

    data: dict[str, Any]
    source: Text
    problems: list[Problem] = field(default_factory=list)
    at: tuple[str, ...] = ()
    whole_data: dict[str, Any] = field(default_factory=dict)
    quantisation: Config | None = None
    linear: LinearLayers = NO_LINEAR_LAYERS  # of the model that was read
    notes: list[str] = field(default_factory=list)  # on what was assumed
    written: Mapping[str, str] = field(default_factory=dict)  # names in the file of fields with other names in ``data``

    def part(self, name: str) -> Config | None:
        """Return the reader of a mapping beside the language model's fields, or None if the config has none."""
        data = self.whole_data.get(name)
        return Config(data, self.source, self.problems, (name,)) if isinstance(data, dict) else None

    def inner(self, name: str) -> Config | None:
        """Return the reader of a mapping among these fields, or None if the config omits it."""
        data = self.data.get(name)
        if data is not None and not isinstance(data, dict):
            self.refuse(name, f"is {shown(data)}, must be a mapping")
        return Config(data, self.source, self.problems, (*self.at, name)) if isinstance(data, dict) else None

    def optional(self, name: str) -> int | None:
        """Return a whole number, or None if the config omits it."""
        return None if self.data.get(name) is None else self.whole(name)

    def for_layers(self, name: str, length: int) -> list[Any] | None:
        """Return a list with an item for every layer, or None if the config omits it, or their number."""
        value = self.data.get(name)
        if value is None or not self.has_num_layers:
            return None
        if not isinstance(value, list) or len(value) != length:
            found = f"has {len(value)} items" if isinstance(value, list) else f"is {shown(value)}"
            self.refuse(name, f"{found}, must be a list of {length} items, one for each layer")
            return None
        return value

    def kinds_of_layers(self, num_layers: int, known: Collection[str]) -> list[str] | None:
        """Return ``layer_types``, or None if the config omits it or has a kind that is not known."""
        kinds = self.for_layers("layer_types", num_layers)
        for kind in dict.fromkeys(map(str, kinds or ())):
            if kind not in known:
                self.refuse("layer_types", f"has {shown(kind)}, only {' and '.join(known)} are modelled")
                return None
        return kinds

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_NUMBER) -> int:
        """Return a whole number, or ``default`` if the config omits it; without a default that is a problem."""
        value = self.data.get(name)
        if value is None:
            if default is None:
                self.problems.append(self.source.problem(self.at, f"{name} is missing"))
            return least if default is None else default
        if not _is_whole(value, least, most):
            self.refuse(name, f"is {shown(value)}, must be a whole number from {least} to {most}")
            return default or least
        return int(value)

    def whole_ratio(self, name: str, default: int) -> int:
        """Return a whole number that may be written with a point, such as 4.0, since it is no count."""
        value = self.data.get(name)
        if isinstance(value, float) and value.is_integer() and 1 <= value <= MAX_NUMBER:
            return int(value)
        return self.whole(name, default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"is {shown(value)}, must be true or false")
            return default
        return value

    def num_layers(self) -> int:
        return self.whole("num_hidden_layers", most=MAX_LAYERS)

    @property
    def has_num_layers(self) -> bool:
        """Whether the number of layers is known; lists with an item for each layer cannot be judged otherwise."""
        return _is_whole(self.data.get("num_hidden_layers"), 1, MAX_LAYERS)

    def experts(self, num: str, active: str, defaults: tuple[int | None, int | None] = (None, None)) -> dict[str, int]:
        """Return the numbers of a layer's experts and of those that a token activates, by their names in `MoeShape`."""
        num = self.experts_name(num)
        num_experts, active_experts = self.whole(num, defaults[0]), self.whole(active, defaults[1])
        if active_experts > num_experts:
            self.refuse(active, f"is {active_experts}, must be at most {num} ({num_experts})")
        return {"num_experts": num_experts, "active_experts": active_experts}

    def experts_name(self, usual: str) -> str:
        """Return the name under which the number of experts is given, or a family's usual one if it is not."""
        return next((name for name in (usual, *NUM_EXPERTS) if self.data.get(name) is not None), usual)

    def refuse_contradiction(self, name: str, layer: int) -> None:
        """Refuse another list of the kinds of layers than ``layer_types``, from which it differs about one of them."""
        one, other = (shown(self.data[each][layer]) for each in ("layer_types", name))
        what = f"is {one}, but {name}[{layer}] is {other}: they contradict"
        self.problems.append(self.source.problem((*self.at, "layer_types", layer), what))

    def refuse(self, name: str, message: str) -> None:
        self.problems.append(self.source.problem((*self.at, self.written.get(name, name)), message))

    def refuse_all(self, message: str) -> None:
        self.problems.append(self.source.problem(self.at, message))


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
