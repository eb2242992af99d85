"""The text of a ``/metrics`` answer as samples, parsed strictly as Prometheus text.

HetisError (hetis.solver.errors)
+-- UnreadableMetricsError   the text is not Prometheus exposition format
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hetis.solver.errors import HetisError


class UnreadableMetricsError(HetisError):
    """The answer is not in the Prometheus exposition format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSample:
    """One line: its labels and its value, which is finite."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """All samples, by name. Names are those of the lines: counters end in ``_total``, means come as _sum and _count."""

    by_name: Mapping[str, tuple[MetricSample, ...]]

    def of(self, *names: str) -> tuple[MetricSample, ...]:
        """Return the samples of the first of these names that has any, or nothing. Newer names come first."""
        for name in names:
            if found := self.by_name.get(name):
                return found
        return ()

    def where(self, label: str, value: str) -> Samples:
        """Return the samples whose label has this value. A missing label counts as empty."""
        return Samples(
            by_name={
                name: kept
                for name, samples in self.by_name.items()
                if (kept := tuple(sample for sample in samples if sample.labels.get(label, "") == value))
            }
        )

    def beginning(self, prefix: str) -> Samples:
        """Return the samples whose names begin with the prefix."""
        return Samples(by_name={name: found for name, found in self.by_name.items() if name.startswith(prefix)})

    def values_of(self, label: str) -> list[str]:
        """Return every value of a label, sorted."""
        return sorted({sample.labels.get(label, "") for samples in self.by_name.values() for sample in samples})


def parse_samples(text: str) -> Samples:
    """Return the samples of an exposition, without values that are not finite.

    Raises:
        UnreadableMetricsError: the text is malformed somewhere, so nothing in it can be trusted.
    """
    by_name: dict[str, list[MetricSample]] = {}
    for name, sample in _all_samples(text):
        if math.isfinite(sample.value):
            by_name.setdefault(name, []).append(sample)
    return Samples(by_name={name: tuple(samples) for name, samples in by_name.items()})


def _all_samples(text: str) -> Iterator[tuple[str, MetricSample]]:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield sample.name, MetricSample(labels=sample.labels, value=float(sample.value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # raised by the parser on bad text
        raise UnreadableMetricsError(f"not Prometheus text: {error}"[:300]) from None
