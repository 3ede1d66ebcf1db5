"""A training that is killed goes on where its last whole checkpoint stands, and ends where it would have ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import made
from pared.recover import recover

SETTINGS = {
    "tokens": 2400,
    "seq_len": 32,
    "batch": 4,
    "evaluations": 4,
    "device": "cpu",
    "learning_rate": 3e-3,
    "held_out": 0.1,
}
# Ends at once, as kill -9 does, when the second checkpoint is about to be marked whole, or right after.
KILLED = """
import os, sys
from pared.recover import recover, training
settings, when = eval(sys.argv[1]), sys.argv[2]
real, seen = training.mark_complete, []
def mark(folder, judge):
    seen.append(folder)
    if len(seen) == 2 and when == "before":
        os._exit(9)
    real(folder, judge)
    if len(seen) == 2:
        os._exit(9)
training.mark_complete = mark
recover(sys.argv[3], out=sys.argv[4], teacher=sys.argv[5], data=sys.argv[6], **settings)
"""


@pytest.mark.parametrize(("method", "when"), [("full", "after"), ("full", "before"), ("lora", "after")])
def test_killed_and_started_again_it_ends_with_the_same_weights(tmp_path: Path, method: str, when: str) -> None:
    made.checkpoint(tmp_path / "dense")
    made.pruned(tmp_path / "dense", tmp_path / "pruned")
    text = made.text(tmp_path / "text.jsonl")
    settings = {**SETTINGS, "method": method, "lora_dropout": 0.1, "merge": method == "lora"}
    given = {"teacher": tmp_path / "dense", "data": str(text), **settings}
    recover(tmp_path / "pruned", out=tmp_path / "whole", **given)  # type: ignore[arg-type]
    out, arguments = tmp_path / "out", [repr(settings), when, tmp_path / "pruned", tmp_path / "out", tmp_path / "dense", text]
    ended = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], env=made.environment(), timeout=300)
    assert ended.returncode == 9 and not out.exists()
    checkpoints = sorted((tmp_path / "out.training").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    done = recover(tmp_path / "pruned", out=out, **given)  # type: ignore[arg-type]
    assert made.same_weights(tmp_path / "whole", out)
    assert [step for step, _, _ in done.report["held_out"]["curve"]] == sorted(
        {s for s, _, _ in done.report["held_out"]["curve"]}
    )
    assert not (tmp_path / "out.training").exists()


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    from pared.recover.training import last_checkpoint, mark_complete

    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trained.safetensors").write_bytes(b"x" * step)
        mark_complete(folder, {"best_step": step})
    (tmp_path / "checkpoint-10/trained.safetensors").write_bytes(b"x")
    found = last_checkpoint(tmp_path, clean=True)
    assert found is not None and found[0].name == "checkpoint-4" and found[1] == {"best_step": 4}
    assert not (tmp_path / "checkpoint-10").exists()
