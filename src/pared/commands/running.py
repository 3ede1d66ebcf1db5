"""run: a dense checkpoint to a final one, in steps of pruning and recovery from one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pared.commands.options import AsFormat, Format, Model, Overwrite


def run(
    pipeline: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="a file, or llm-pruner, quick, default, max", show_default=False)
    ],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="the directory to write", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", metavar="TEXT", help="text for all steps that name none of their own")
    ] = None,
    overwrite: Overwrite = False,
    format: AsFormat = Format.text,
) -> None:
    """Prune and recover in steps, as a file says. A killed run goes on with the step that it was in.

    The path of the result goes to stdout.
    """
    from pared.pipeline import load_pipeline, run_pipeline
    from pared.report.console import Reporter, emit_json, err, show
    from pared.report.tables import steps

    steps_to_take = load_pipeline(pipeline, data)
    with Reporter() as progress:
        done = run_pipeline(steps_to_take, model, out=out, overwrite=overwrite, progress=progress)
    if format is Format.json:
        emit_json({"out": str(done.out), "steps": done.reports})
        return
    show(err(), steps(done.reports))
    sys.stdout.write(f"{out}\n")
