"""Progress: how far, how fast, in how much memory, for people and for programs."""

from __future__ import annotations

import io
import json
import sys

import pytest

from pared.report import console
from pared.report.console import Reporter


class Clock:
    """Ten seconds pass between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def written(monkeypatch: pytest.MonkeyPatch, *, events: bool, stage: str = "gradients") -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console.time, "monotonic", Clock())
    with Reporter(events=events) as progress:
        progress.limit, progress.tokens = 8 << 30, 400
        for done in (1, 2, 3, 4):
            progress(stage, done, 4)
    return stream.getvalue().splitlines()


def test_a_program_gets_one_object_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [json.loads(line) for line in written(monkeypatch, events=True)]
    assert [e["done"] for e in events] == [1, 2, 3, 4] and {e["stage"] for e in events} == {"gradients"}
    # One of four blocks in ten seconds: 400 tokens through the model in forty.
    assert events[0]["tokens_per_s"] == 10.0 and [e["seconds_left"] for e in events] == [30.0, 20.0, 10.0, 0.0]
    assert all(0 < e["memory"] <= e["peak"] and e["limit"] == 8 << 30 for e in events)


def test_trials_have_no_speed_in_tokens_of_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a part of them, and several models."""
    events = [json.loads(line) for line in written(monkeypatch, events=True, stage="near trials")]
    assert [e["tokens_per_s"] for e in events] == [None] * 4 and [e["seconds_left"] for e in events] == [30.0, 20.0, 10.0, 0.0]


def test_elsewhere_than_on_a_terminal_a_line_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = written(monkeypatch, events=False)
    assert lines and all(line.startswith("gradients ") for line in lines)
    for word in ("tokens/s", "GiB now", "GiB peak", "8.00 GiB limit", "0:30 left"):
        assert word in lines[0]
