"""Talking to people on stderr and to programs on stdout: progress, tables, JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# Cells of a table that goes to a file or a pipe should not be cut at the 80 columns that are assumed there.
_WIDTH = 160
_FIRST_LOG, _NEXT_LOG = 10.0, 15.0


def err() -> Console:
    """Where people look: progress, tables, remarks."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH)


def out() -> Console:
    """Where data goes, and what a command was asked to show."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def show(console: Console, parts: Iterable[RenderableType]) -> None:
    """Print tables and sentences (plain text: no markup is looked for)."""
    for part in parts:
        console.print(part, markup=False, soft_wrap=isinstance(part, str) and not console.is_terminal)


def emit_json(data: Any) -> None:
    """One JSON object on stdout; numbers that JSON does not have become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2) + "\n")
    sys.stdout.flush()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


class Reporter:
    """Shows how far a run is: call it with (stage, done, total). Bars on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        console = err()
        self._bars: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            # Redrawn when there is news, not by a thread: one more beside torch's own can cost a busy machine dearly.
            self._bars = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()
        self._due = self._started + _FIRST_LOG

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            self._tasks[""] = self._bars.add_task("preparing", total=None)
            self._bars.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            now = time.monotonic()
            if now >= self._due:
                sys.stderr.write(f"{stage} {done}/{total}, {now - self._started:.0f} s\n")
                sys.stderr.flush()
                self._due = now + _NEXT_LOG
            return
        if "" in self._tasks:
            self._bars.remove_task(self._tasks.pop(""))
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        self._bars.refresh()
