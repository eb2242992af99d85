"""YAML for exports: keys in the writer's order, no aliases, written by libyaml if available."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    _Base = yaml.SafeDumper
else:
    _Base = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_Base):
    def ignore_aliases(self, data: Any) -> bool:
        """Ignore aliases, so that a repeated value is written twice: people read manifests, too."""
        return True


def yaml_text(value: Mapping[str, Any]) -> str:
    """Return one document."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120))


def documents(values: Iterable[Mapping[str, Any]]) -> str:
    """Return several documents as one stream."""
    return str(yaml.dump_all(list(values), Dumper=_Dumper, sort_keys=False, width=120))
