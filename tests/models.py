"""Models for tests, described in short: ``mla``, ``moe`` and the like as in files of models."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from hetis.formats.layers import IN_SHORT, described_in_short, model_in_short
from hetis.solver.model import ModelSpec


def shape_of(**fields: Any) -> dict[str, Any]:
    """Return the fields of a shape, such as ``moe``."""
    return fields


def model_of(**fields: Any) -> ModelSpec:
    return model_in_short(**fields)


def replace(value: Any, /, **changes: Any) -> Any:
    """Return `dataclasses.replace`, or a model with other layers if some of the changes describe these."""
    short = {name: changes.pop(name) for name in IN_SHORT if name in changes}
    if not isinstance(value, ModelSpec) or not short:
        return dataclasses.replace(value, **changes, **short)
    described = described_in_short(value.layers)
    assert described is not None, "the layers are of usual kinds"
    fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.init}
    del fields["layers"]
    return model_in_short(**fields | described | short | changes)


class InShort:
    """A model with what its file says of its layers, where a shape that it lacks is None."""

    def __init__(self, model: ModelSpec) -> None:
        found = described_in_short(model.layers)
        assert found is not None, "the layers are of usual kinds"
        self.model, self.short = model, dict.fromkeys(IN_SHORT) | {"gated_mlp": True} | found

    def __getattr__(self, name: str) -> Any:
        if name not in self.short:
            return getattr(self.model, name)
        value = self.short[name]
        return SimpleNamespace(**value) if isinstance(value, dict) else value
