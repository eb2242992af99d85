"""What has changed in a cluster since it was last published."""

from __future__ import annotations

from hetis.v1 import report_pb2


class PendingEvents:
    """Changes that were not taken yet; each is returned once."""

    def __init__(self) -> None:
        self._views: set[tuple[str, str]] = set()
        self._reports: dict[tuple[str, str], report_pb2.ReplicaReport] = {}
        self._is_capacity_new = False

    def mark_view(self, kind: str, name: str) -> None:
        """Record that a view changed: of a "node", "replica", "redispatch", "plan" or "cluster"."""
        self._views.add((kind, name))

    def mark_capacity(self) -> None:
        """Record that a node was lost, came back, drains, or joined."""
        self._is_capacity_new = True

    def report(self, node: str, report: report_pb2.ReplicaReport) -> None:
        """Record a node's report of a replica; the newest counts."""
        self._reports[report.replica, node] = report

    def take_views(self) -> set[tuple[str, str]]:
        taken, self._views = self._views, set()
        return taken

    def take_reports(self) -> dict[tuple[str, str], report_pb2.ReplicaReport]:
        """Return the newest reports by replica and node."""
        taken, self._reports = self._reports, {}
        return taken

    def take_capacity(self) -> bool:
        """Return whether the capacity changed."""
        taken, self._is_capacity_new = self._is_capacity_new, False
        return taken
