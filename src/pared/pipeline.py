"""Pipelines: a dense checkpoint to a final one in steps of pruning and recovery, from one file."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pared.checkpoint import Checkpoint
from pared.durable import write_whole
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.recipe import make_recipe
from pared.recover.run import recover
from pared.recovery import make_recovery
from pared.run import prune


class Step(BaseModel):
    """One step: `prune` with the settings of a recipe, or `recover` with those of a recovery.

    A share to remove is of what the step before left. The teacher is the dense model throughout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prune: dict[str, Any] | None = None
    recover: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        return "prune" if self.prune is not None else "recover"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.prune if self.prune is not None else self.recover or {})


class Pipeline(BaseModel):
    """What happens to a model, step after step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Ran:
    """Where the result lies, and the report of each step."""

    out: Path
    reports: list[dict[str, Any]]


def shipped_pipelines() -> dict[str, Path]:
    """Name -> file of the pipelines that come with pared."""
    return {p.stem: p for p in sorted(Path(str(files("pared") / "pipelines")).glob("*.yaml"))}


def load_pipeline(name: str | Path, data: str | None = None) -> Pipeline:
    """A pipeline file, or a shipped one by its name, with every setting of every step checked.

    data: text for all steps that name none of their own.
    """
    path = shipped_pipelines().get(str(name), Path(name))
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        shipped = shipped_pipelines()
        near = difflib.get_close_matches(str(name), shipped, 1)
        fix = f"did you mean {near[0]!r}?" if near else f"name a file, or one of {', '.join(shipped)}"
        raise UsageError(f"no pipeline {str(name)!r}", fix=fix) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError("the pipeline is not YAML", where=path) from error
    try:
        found = Pipeline.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path}: {'.'.join(map(str, first['loc']))}"
        raise UsageError(
            f"not a pipeline: {first['msg']}", where=where, fix="steps: a list of prune: ... and recover: ..."
        ) from error
    if not found.steps:
        raise UsageError("the pipeline has no steps", where=path, fix="steps: a list of prune: ... and recover: ...")
    return Pipeline(steps=tuple(_checked(s, i, path, data) for i, s in enumerate(found.steps, 1)))


def _checked(step: Step, number: int, path: Path, data: str | None) -> Step:
    where = f"{path}, step {number}"
    if (step.prune is None) == (step.recover is None):
        raise UsageError("a step is either prune or recover", where=where, fix="write one of them, with its settings")
    settings = step.settings
    if data is not None:
        settings.setdefault("calibration" if step.kind == "prune" else "data", data)
    try:
        if step.kind == "prune":
            make_recipe(settings)
        elif make_recovery(settings).method == "lora" and not settings.get("merge"):
            raise UsageError("the next step needs a plain checkpoint", where="merge", fix="merge: true")
    except UsageError as error:
        named = str(error.where).removeprefix("--")
        raise UsageError(f"{named}: {error.what}", where=where, fix=error.fix) from error
    return Step.model_validate({step.kind: settings})


def run_pipeline(
    pipeline: Pipeline, model: str | Path, *, out: str | Path, overwrite: bool = False, progress: Progress = silent
) -> Ran:
    """Take a dense checkpoint through the steps. What lies between them is kept in OUT.steps until the end.

    A killed run goes on with the step that it was in. Raises the errors of `pared.errors`; nothing is at `out` then.
    """
    target = Path(os.path.abspath(Path(out).expanduser()))
    if target.exists() and not overwrite:
        raise UsageError("the output exists", where=target, fix="choose another -o, or pass --overwrite to replace it")
    source = Checkpoint.open(model)
    work = target.with_name(target.name + ".steps")
    of = hashlib.sha256((pipeline.model_dump_json() + source.digest()).encode()).hexdigest()
    note = work / "run.json"
    work.mkdir(parents=True, exist_ok=True)
    if note.exists() and json.loads(note.read_text())["of"] != of:
        raise UsageError(
            "another pipeline stopped half way here, or this one on another model",
            where=work,
            fix="start that one again, or remove the directory",
        )
    write_whole(note, json.dumps({"of": of}))
    reports: list[dict[str, Any]] = []
    now: Path = source.path
    for i, step in enumerate(pipeline.steps, 1):
        last = i == len(pipeline.steps)
        place = target if last else work / f"{i}-{step.kind}"
        record = work / f"{i}.json"
        if not (place.exists() and record.exists()):
            report = _run(step, now, source.path, place, overwrite or not last, progress)
            write_whole(record, json.dumps({"step": i, "kind": step.kind, **report}))
        reports.append(json.loads(record.read_text()))
        now = place
    shutil.rmtree(work)
    return Ran(target, reports)


def _run(step: Step, model: Path, dense: Path, out: Path, overwrite: bool, progress: Progress) -> dict[str, Any]:
    if step.kind == "prune":
        return prune(model, out=out, base=step.settings, overwrite=overwrite, progress=progress).report
    return recover(model, out=out, teacher=dense, base=step.settings, overwrite=overwrite, progress=progress).report
