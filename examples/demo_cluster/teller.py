"""The output of the story: chapters, events with their times, and bars of KV use."""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.text import Text

from hetis.v1 import report_pb2

BAR = 24


class Teller:
    """Prints to ``file``; every line has the seconds since the story began."""

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, width=100 if not file.isatty() else None)
        self._started_s = time.monotonic()

    def chapter(self, title: str) -> None:
        self._console.print()
        self._console.print(Text(title, style="bold"))

    def say(self, text: str) -> None:
        elapsed = f"{time.monotonic() - self._started_s:6.1f} s  "
        self._console.print(Text(elapsed, style="dim"), Text(text), sep="", soft_wrap=False)

    def loads(self, report: report_pb2.ReplicaReport) -> None:
        """Print one bar of the KV blocks in use per device."""
        for stage in report.stages:
            for device in stage.devices:
                if not device.total_blocks:
                    continue
                ratio = device.used_blocks / device.total_blocks
                bar = "█" * round(BAR * min(ratio, 1.0))
                slow = device.observed_s / device.predicted_s if device.predicted_s and device.observed_s else 1.0
                note = "" if 0.8 < slow < 1.25 else f"  {slow:.1f}x its predicted time"
                lost = "  lost" if device.status == report_pb2.DEVICE_STATUS_LOST else ""
                self._console.print(
                    f"            stage {stage.stage}  {device.device:<10} {bar:<{BAR}} {ratio:4.0%}"
                    f"  {device.heads:4d} heads{note}{lost}"
                )
