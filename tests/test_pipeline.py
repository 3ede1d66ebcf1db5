"""Pipelines: steps of pruning and recovery from one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import made
import tiny
from command import pared, refused
from pared import pipeline
from pared.errors import UsageError
from pared.pipeline import load_pipeline, run_pipeline, shipped_pipelines
from pared.verify import verify

STEPS = [
    {"prune": {"remove": 0.2, "criterion": "l2", "compensate": "none", "align": 1}},
    {"recover": {"tokens": 500, "seq_len": 32, "batch": 4, "device": "cpu", "held_out": 0.1, "method": "lora", "merge": True}},
    {"prune": {"remove": 0.2, "criterion": "l2", "compensate": "none", "align": 1}},
    {"recover": {"tokens": 500, "seq_len": 32, "batch": 4, "device": "cpu", "held_out": 0.1}},
]


def write(path: Path, steps: object) -> Path:
    path.write_text(yaml.safe_dump({"steps": steps}))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made.checkpoint(tmp_path / "dense")
    made.text(tmp_path / "text.jsonl")
    write(tmp_path / "steps.yaml", STEPS)
    return tmp_path


@pytest.mark.parametrize("name", sorted(shipped_pipelines()))
def test_each_shipped_pipeline_holds_settings_that_exist(name: str) -> None:
    assert {s.kind for s in load_pipeline(name).steps} == {"prune", "recover"}


def test_those_that_are_promised_ship() -> None:
    assert set(shipped_pipelines()) == {"llm-pruner", "quick", "default", "max"}


def test_a_pipeline_prunes_and_recovers_in_steps(home: Path) -> None:
    done = pared(
        "run", home / "steps.yaml", home / "dense", "-o", home / "out", "--data", home / "text.jsonl", "--format", "json"
    )
    assert done.code == 0, done.err
    reports = json.loads(done.out)["steps"]
    assert [r["kind"] for r in reports] == ["prune", "recover"] * 2
    assert reports[2]["before"]["block_params"] == reports[0]["after"]["block_params"]
    assert reports[2]["after"]["block_params"] <= 0.8**2 * reports[0]["before"]["block_params"]
    assert verify(home / "out") == [] and not (home / "out.steps").exists()


def test_a_killed_pipeline_goes_on_with_the_step_it_was_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_pipeline(home / "steps.yaml", str(home / "text.jsonl"))
    run_pipeline(given, home / "dense", out=home / "whole")
    real, taken = pipeline._run, []

    def counted(step: pipeline.Step, *rest: object) -> object:
        taken.append(step.kind)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return real(step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(given, home / "dense", out=home / "out")
    assert not (home / "out").exists()
    run_pipeline(given, home / "dense", out=home / "out")
    assert taken == ["prune", "recover", "prune", "prune", "recover"]
    assert made.same_weights(home / "whole", home / "out")
    assert tiny.logits(made.loaded(home / "out")).isfinite().all()


def test_what_another_pipeline_left_is_not_gone_on_with(home: Path) -> None:
    (home / "out.steps").mkdir()
    (home / "out.steps/run.json").write_text(json.dumps({"of": "another"}))
    with pytest.raises(UsageError, match="another pipeline stopped half way"):
        run_pipeline(load_pipeline(home / "steps.yaml"), home / "dense", out=home / "out")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"prune": {"remov": 0.2}}], ("remov", "step 1", "did you mean 'remove'?")),
        ([{"prune": {}}, {"recover": {"token": 5}}], ("token", "step 2", "did you mean 'tokens'?")),
        ([{"prune": {}, "recover": {}}], ("either prune or recover",)),
        ([{"recover": {"method": "lora"}}], ("plain checkpoint", "merge: true")),
        ([{"export": {}}], ("not a pipeline", "steps.0.export")),
        ([], ("no steps",)),
    ],
)
def test_a_step_that_can_not_be_taken_is_named(tmp_path: Path, steps: object, words: tuple[str, ...]) -> None:
    made.checkpoint(tmp_path / "dense")
    refused(tmp_path, 2, "run", write(tmp_path / "steps.yaml", steps), tmp_path / "dense", "-o", tmp_path / "out", words=words)


def test_an_unknown_pipeline_is_met_with_those_that_ship(tmp_path: Path) -> None:
    refused(tmp_path, 2, "run", "quik", tmp_path / "dense", "-o", tmp_path / "out", words=("did you mean 'quick'?",))
