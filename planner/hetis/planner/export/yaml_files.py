"""YAML as exports have it: keys in the order of the writer, nothing by reference, written by libyaml if it is here."""

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
        """A value that stands in two places is written twice: readers of manifests are people, too."""
        return True


def yaml_text(value: Mapping[str, Any]) -> str:
    """One document."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120))


def documents(values: Iterable[Mapping[str, Any]]) -> str:
    """Several, as one stream."""
    return str(yaml.dump_all(list(values), Dumper=_Dumper, sort_keys=False, width=120))
