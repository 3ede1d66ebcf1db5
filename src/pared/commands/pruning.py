"""prune, and its two halves: plan and apply."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pared.commands.options import (
    AsFormat,
    Assignments,
    Format,
    HardwareOf,
    MaxGpuMemory,
    MaxMemory,
    Model,
    Overwrite,
    RecipeName,
    Restart,
    Spill,
    base_settings,
    check_device,
    check_outside,
    recipe_options,
)
from pared.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from pared.plan import Plan

Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="the directory to write", show_default=False)]


@recipe_options
def prune(
    model: Model,
    out: Out = None,
    recipe: RecipeName = None,
    set_: Assignments = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would take, decide and show; write nothing")] = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    spill: Spill = None,
    hardware: HardwareOf = None,
    format: AsFormat = Format.text,
    *,
    settings: dict[str, Any],
) -> None:
    """Make a model smaller: decide what goes, cut it, write a checkpoint.

    Flags go over --set, --set over the recipe, the recipe over the defaults. The path of the result goes to stdout.
    """
    if out is None and not dry_run:
        raise UsageError("nowhere to write the result", where="pared prune", fix="name a directory: -o OUT; or use --dry-run")
    base = base_settings(recipe, set_)
    check_device(settings.get("device", base.get("device")))
    foreseen = _foresee(model, base, settings, max_memory, max_gpu_memory, spill, hardware, format) if dry_run else None
    if foreseen is not None and not _holds_weights(model):
        _emit({"predicted": foreseen}, format)
        return
    from pared.distributed import joined, rank
    from pared.report.console import Reporter
    from pared.run import prune as run

    with joined(settings.get("device", base.get("device"))), Reporter(events=format is Format.json) as progress:
        result = run(
            model,
            out=out,
            base=base,
            dry_run=dry_run,
            overwrite=overwrite,
            restart=restart,
            max_memory=max_memory,
            max_gpu_memory=max_gpu_memory,
            spill=spill,
            progress=progress,
            **settings,
        )
        others = rank() > 0
    if others:  # the first process says what came of it
        return
    report = result.report if foreseen is None else {**result.report, "predicted": foreseen}
    _finish(report, result.plan, None if dry_run else out, format)


def _foresee(
    model: str,
    base: dict[str, Any],
    settings: dict[str, Any],
    max_memory: str | None,
    max_gpu_memory: str | None,
    spill: Path | None,
    hardware: str | None,
    format: Format,
) -> dict[str, Any] | None:
    """What the run would take; shown at once, before any weights are read."""
    from pared.hardware import Hardware
    from pared.predict import predict
    from pared.report.console import err, show
    from pared.report.tables import prediction
    from pared.resources import Limits

    stated = Hardware.parse(hardware) if hardware is not None else None
    limits = Limits.parse(max_memory, max_gpu_memory, spill)
    found = predict(model, base=base, limits=limits, hardware=stated, cold=True, **settings)
    if found is not None and format is Format.text:
        show(err(), prediction(found))
    return found


def _holds_weights(model: str) -> bool:
    path = Path(model).expanduser()
    return not path.is_dir() or any(path.glob("*.safetensors"))


def _emit(report: dict[str, Any], format: Format) -> None:
    from pared.report.console import emit_json

    if format is Format.json:
        emit_json(report)


@recipe_options
def plan(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PLAN", help="the plan.json to write", show_default=False)],
    recipe: RecipeName = None,
    set_: Assignments = None,
    overwrite: Overwrite = False,
    format: AsFormat = Format.text,
    *,
    settings: dict[str, Any],
) -> None:
    """Decide what goes and write it down as a plan, cutting nothing.

    Flags go over --set, --set over the recipe, the recipe over the defaults. The path of the plan goes to stdout.
    """
    base = base_settings(recipe, set_)
    check_device(settings.get("device", base.get("device")))
    check_outside(out, model)
    # What is in the way should not be found after hours.
    if out.is_dir():
        raise UsageError("the plan is a file, this is a directory", where=out, fix="name a file: -o plan.json")
    if out.exists() and not overwrite:
        raise UsageError("the output exists", where=out, fix="choose another -o, or pass --overwrite to replace it")
    if not out.absolute().parent.is_dir():
        raise UsageError("there is no such directory to write to", where=out.parent, fix="make it first, or choose another -o")
    from pared.report.console import Reporter
    from pared.run import prune as run

    if base.get("narrow") is None:
        settings.setdefault("narrow", False)  # a plan holds no basis
    with Reporter() as progress:
        result = run(model, base=base, dry_run=True, progress=progress, **settings)
    _write(out, result.plan.to_json())
    _finish({**result.report, "out": str(out)}, result.plan, out, format)


def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json of this model or of its base", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="the directory to write", show_default=False)],
    overwrite: Overwrite = False,
    format: AsFormat = Format.text,
) -> None:
    """Cut a model as a plan says.

    The model that the plan was made for, or a fine-tune of the same base. The path of the result goes to stdout.
    """
    from pared.plan import Plan
    from pared.report.console import Reporter
    from pared.run import apply_plan

    given = Plan.load(plan)
    with Reporter():
        written = apply_plan(model, given, out, overwrite=overwrite)
    done = Plan.load(written / "plan.json")
    report = {
        "model_type": done.model_type,
        "requested": done.requested,
        "removed": done.removed,
        "of": done.of,
        "before": done.before.model_dump(),
        "after": done.after.model_dump(),
        "out": str(written),
    }
    _finish(report, done, out, format)


def _finish(report: dict[str, Any], plan: Plan, out: Path | None, format: Format) -> None:
    """The result on stdout, a table for people on stderr."""
    from pared.report.console import emit_json, err, show
    from pared.report.tables import kept_units, pruned, skipped

    remark = _written_as(report, out)
    if remark:
        report["written_as"] = remark
    if format is Format.json:
        emit_json(report)
        return
    show(err(), pruned(report, kept_units(plan), skipped(plan)))
    if remark:
        why = f"which has the same block: {report['model_type']!r} can not say these sizes"
        show(err(), [f"written as model type {remark!r}, {why}"])
    if out is not None:
        sys.stdout.write(f"{out}\n")


def _written_as(report: dict[str, Any], out: Path | None) -> str | None:
    """The model type that was written where it is another than the source's."""
    if out is None or not out.is_dir():
        return None
    written = json.loads((out / "config.json").read_bytes())["model_type"]
    return written if written != report["model_type"] else None


def _write(path: Path, text: str) -> None:
    """All of the file or none of it."""
    from pared.durable import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise ResourceError(f"the plan can not be written: {error.strerror}", where=path, fix="choose another -o") from error
