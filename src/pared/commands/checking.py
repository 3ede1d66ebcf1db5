"""eval, inspect, verify and ls: commands that show and write nothing. What they show is data: it goes to stdout."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pared.commands.options import AsFormat, Format, Model, check_device
from pared.errors import ModelError, ParedError, UsageError


class Listed(StrEnum):
    """What `pared ls` can list."""

    criteria = "criteria"
    families = "families"
    recipes = "recipes"


class Dtype(StrEnum):
    """What an evaluation computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Against = Annotated[str | None, typer.Option("--against", metavar="MODEL", help="the dense model, for KL and agreement")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text", metavar="FILE", help=".txt or .jsonl; self (default): text that the dense model writes; may be repeated"
    ),
]
Protocol = Annotated[
    str | None, typer.Option("--protocol", metavar="NAME", help="llm-pruner: windows of 128 (WikiText2, PTB); standard: 2048")
]
Tasks = Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="accuracy on these tasks, through lm-eval")]
TaskDir = Annotated[
    Path | None, typer.Option("--task-dir", metavar="DIR", help="a folder with task files of your own (lm-eval)")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="so many examples of each task")]
Generate = Annotated[
    int, typer.Option("--generate", metavar="N", min=0, help="continue N prompts; show them, and how they repeat")
]
SeqLen = Annotated[int | None, typer.Option("--seq-len", metavar="N", help="tokens in a window; by default up to 512")]
Stride = Annotated[int | None, typer.Option("--stride", metavar="N", help="tokens between windows; by default none overlap")]
Batch = Annotated[int, typer.Option("--batch", metavar="N", help="windows that run together")]
MaxWindows = Annotated[int | None, typer.Option("--max-windows", metavar="N", help="stop after so many windows")]
ComputeDtype = Annotated[Dtype, typer.Option("--dtype", help="what to compute in; auto: fp32 on a CPU, else the checkpoint's")]
Device = Annotated[str, typer.Option("--device", help="where to compute")]
NoSpeed = Annotated[bool, typer.Option("--no-speed", help="do not measure speed and memory")]
LongContext = Annotated[
    bool, typer.Option("--long-context", help="loss by position, keys found again, cache memory, up to --seq-len; needs --text")
]
Align = Annotated[int | None, typer.Option("--align", metavar="N", min=1, help="kept channels are a multiple of this")]


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="model directories, or hub ids", show_default=False)],
    against: Against = None,
    text: Texts = None,
    seq_len: SeqLen = None,
    stride: Stride = None,
    protocol: Protocol = None,
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    limit: Limit = None,
    generate: Generate = 0,
    batch: Batch = 8,
    max_windows: MaxWindows = None,
    dtype: ComputeDtype = Dtype.auto,
    device: Device = "cpu",
    no_speed: NoSpeed = False,
    long_context: LongContext = False,
    format: AsFormat = Format.text,
) -> None:
    """Measure models: perplexity, KL to the dense one, parameters, bytes, speed, memory; tasks, and what they write.

    Several models, texts, tasks or samples make one table, with the accuracy kept as a share of the dense model's.
    """
    check_device(device)
    texts = text or ["self"]
    if long_context:
        if len(models) != 1 or len(texts) != 1:
            raise UsageError(
                "a long context is measured of one model on one text", where="--long-context", fix="run it for each"
            )
        shared = {"against": against, "longest": seq_len, "max_windows": max_windows, "dtype": dtype.value, "device": device}
        _long_context(models[0], texts[0], stride, shared, format)
        return
    from pared.evaluate.examination import examine
    from pared.evaluate.report import evaluate as run
    from pared.report.console import Reporter, emit_json, out, show
    from pared.report.tables import evaluation, examination

    settings: dict[str, Any] = {
        "seq_len": seq_len,
        "stride": stride,
        "batch": batch,
        "max_windows": max_windows,
        "dtype": dtype.value,
        "device": device,
        "speed": not no_speed,
    }
    named = [t.strip() for t in (tasks or "").split(",") if t.strip()]
    with Reporter() as progress:
        if len(models) == len(texts) == 1 and not (protocol or named or generate):
            report = run(models[0], against=against, text=texts[0], progress=progress, **settings)
            shown = evaluation(report)
        else:
            found = examine(
                models,
                against=against,
                protocol=protocol,
                texts=texts,
                tasks=named,
                task_dir=task_dir,
                limit=limit,
                generate=generate,
                progress=progress,
                **settings,
            )
            report, shown = {"models": found}, examination(found)
    if format is Format.json:
        emit_json(report)
    else:
        show(out(), shown)


def _long_context(model: str, text: str, stride: int | None, settings: dict[str, Any], format: Format) -> None:
    from pared.evaluate.long_context import evaluate_long
    from pared.report.console import Reporter, emit_json, out, show
    from pared.report.tables import long_context

    if text == "self":
        raise UsageError("a long context is measured on text that is given", where="--text", fix="--text FILE")
    if stride is not None:
        raise UsageError("windows of a long context do not overlap", where="--stride", fix="leave it out")
    with Reporter() as progress:
        report = evaluate_long(model, text=text, progress=progress, **settings)
    if format is Format.json:
        emit_json(report)
    else:
        show(out(), long_context(report))


def inspect(
    model: Model,
    align: Align = None,
    format: AsFormat = Format.text,
) -> None:
    """Show what a model is made of, what can be removed, and how large it would be then.

    Reads no weights: config.json and the headers of the tensors are enough, of a hub model too.
    """
    from pared.report.console import emit_json, out, show
    from pared.report.inspection import describe, inspect_model
    from pared.report.tables import inspection
    from pared.resolve import removable

    described = describe(model)
    report = inspect_model(described, *removable(described.layout), align=align)
    if format is Format.json:
        emit_json(report)
    else:
        show(out(), inspection(report))


def verify(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint", show_default=False)],
    format: AsFormat = Format.text,
) -> None:
    """Check a checkpoint: hashes, shapes, config against tensors, finite weights.

    Exit code 3 and one line for each problem if anything is wrong.
    """
    from pared.report.console import emit_json
    from pared.verify import verify as run

    problems = run(model)
    if format is Format.json:
        emit_json({"path": str(model), "ok": not problems, "problems": [{"where": p.where, "what": p.what} for p in problems]})
    elif problems:
        sys.stderr.writelines(f"{p.where}: {p.what}\n" for p in problems)
    else:
        sys.stdout.write(f"{model}: nothing is wrong\n")
    if problems:
        raise typer.Exit(ModelError.exit_code)


def ls(
    what: Annotated[Listed, typer.Argument(metavar="criteria|families|recipes", help="what to list", show_default=False)],
    proved: Annotated[
        bool, typer.Option("--proved", help="of families: prove every type that transformers has (minutes)")
    ] = False,
    format: AsFormat = Format.text,
) -> None:
    """List the criteria, the families with data of their own, or the recipes that ship."""
    from pared.report import tables
    from pared.report.console import emit_json, out, show

    if proved and what is not Listed.families:
        raise UsageError(f"{what.value} have nothing to prove", where="--proved", fix="pared ls families --proved")
    if proved:
        found, parts = _census(tables)
    else:
        found, parts = {Listed.criteria: _criteria, Listed.families: _families, Listed.recipes: _recipes}[what](tables)
    if format is Format.json:
        emit_json({what.value: found})
    else:
        show(out(), parts)


def _criteria(tables: Any) -> tuple[list[dict[str, Any]], Any]:
    from pared.criteria import all_criteria

    found = [
        {
            "name": c.name,
            "needs": c.needs,
            "axes": None if c.axes is None else list(c.axes),
            "paper": c.paper,
            "comparable": c.comparable,
            "about": c.about,
        }
        for c in all_criteria().values()
    ]
    return found, tables.criteria(found)


def _families(tables: Any) -> tuple[list[dict[str, Any]], Any]:
    from pared.families import STAND_INS

    found = [{"model_type": k, "written_as": v.model_type} for k, v in sorted(STAND_INS.items())]
    rows = [(f["model_type"], f"written as {f['written_as']} where its own config can not say the sizes") for f in found]
    rest = (
        "All other families need no data: the layout of any decoder-only model that transformers builds is discovered from "
        "its config and proved before anything is cut. pared inspect MODEL shows what the proof gave."
    )
    return found, [tables.table("Families with data of their own", ("model type", ""), rows, left=2), rest]


def _census(tables: Any) -> tuple[list[dict[str, Any]], Any]:
    from pared.census import model_types, take_census
    from pared.report.console import Reporter

    types, found = model_types(), []
    with Reporter() as progress:
        for done, entry in enumerate(take_census(types), 1):
            axes = {a: ("proved" if p.stock else "per-layer form") if p.holds else p.reason for a, p in entry.proofs.items()}
            found.append({"model_type": entry.model_type, "outside": entry.outside, "failed": entry.failed, "axes": axes})
            progress("families", done, len(types))
    return found, tables.census(found)


def _recipes(tables: Any) -> tuple[list[dict[str, Any]], Any]:
    from pared.recipe import load_recipe, shipped_recipes

    found: list[dict[str, Any]] = []
    for name, path in shipped_recipes().items():
        try:
            found.append({"name": name, "path": str(path), "settings": load_recipe(name)})
        except ParedError as error:
            raise type(error)(error.what, where=path, fix=error.fix) from error
    rows = [(f["name"], ", ".join(f"{k} {v}" for k, v in f["settings"].items())) for f in found]
    return found, [tables.table("", ("recipe", "settings"), rows, left=2)]
