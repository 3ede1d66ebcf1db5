"""Talking to people on stderr and to programs on stdout: progress, tables, JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pared.process import resident_bytes

# Cells of a table that goes to a file or a pipe should not be cut at the 80 columns that are assumed there.
_WIDTH = 160
_FIRST_LOG, _NEXT_LOG = 10.0, 15.0
# Stages that take every token of the calibration through the model once. Others take a part, several models, or none.
_PASSES = frozenset({"activations", "angles", "gradients", "refit", "rotation", "routing", "second moments"})


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
    """Shows how far a run is: call it with (stage, done, total). Bars on a terminal, a line now and then elsewhere.

    limit: bytes that memory is to stay under. tokens: of the calibration, for the speed of stages that take all of them.
    events: write each call as one line of JSON to stderr instead, for a program.
    """

    def __init__(self, *, events: bool = False) -> None:
        console = err()
        self.limit: int | None = None
        self.tokens: int | None = None
        self._events = events
        self._bars: Progress | None = None
        if console.is_terminal and not events:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"))
            # Redrawn when there is news, not by a thread: one more beside torch's own can cost a busy machine dearly.
            self._bars = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}  # stage -> when it was first heard of, and how far it was then
        self._started = self._last = time.monotonic()
        self._due = self._started + _FIRST_LOG

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            self._tasks[""] = self._bars.add_task("preparing", total=None, more="")
            self._bars.refresh()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        # A stage is heard of when its first part is done; it is taken to have begun when the one before was last heard of.
        since, at = self._began.setdefault(stage, (self._last, 0))
        self._last = now
        pace = (done - at) / (now - since) if now > since else 0.0
        tokens = self.tokens if stage in _PASSES else None
        event: dict[str, Any] = {
            "stage": stage,
            "done": done,
            "total": total,
            "seconds": round(now - self._started, 2),
            "seconds_left": round((total - done) / pace, 1) if pace else None,
            "tokens_per_s": round(tokens * pace / total, 1) if tokens and pace else None,
            "memory": resident_bytes("VmRSS"),
            "peak": resident_bytes("VmHWM"),
            "limit": self.limit,
        }
        if self._events:
            sys.stderr.write(json.dumps(event) + "\n")
            sys.stderr.flush()
        elif self._bars is None:
            if now >= self._due:
                sys.stderr.write(f"{stage} {done}/{total}, {now - self._started:.0f} s, {_about(event)}\n")
                sys.stderr.flush()
                self._due = now + _NEXT_LOG
        else:
            if "" in self._tasks:
                self._bars.remove_task(self._tasks.pop(""))
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, more="")
            self._bars.update(self._tasks[stage], completed=done, total=total, more=_about(event))
            self._bars.refresh()


def _about(event: Mapping[str, Any]) -> str:
    """Speed, memory and time left, in few words."""
    sizes = [_gib(event[k]) for k in ("memory", "peak", "limit") if event[k]]
    names = ["now", "peak", "limit"][: len(sizes)]
    parts = [f"{event['tokens_per_s']:.0f} tokens/s"] if event["tokens_per_s"] else []
    parts += [", ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=True))] if sizes else []
    left = event["seconds_left"]
    parts += [f"{int(left) // 60}:{int(left) % 60:02d} left"] if left else []
    return ", ".join(parts)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
