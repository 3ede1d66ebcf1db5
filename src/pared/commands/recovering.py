"""recover: bring back what pruning cost by a short training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pared.commands.options import AsFormat, Format, Model, Overwrite, settings_options
from pared.recovery import Recovery


@settings_options(Recovery)
def recover(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="the directory to write", show_default=False)],
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="MODEL", help="the dense model to learn from")] = None,
    overwrite: Overwrite = False,
    format: AsFormat = Format.text,
    *,
    settings: dict[str, Any],
) -> None:
    """Train a pruned model for a short while: by distillation from the dense one, or on text alone.

    A killed run goes on when it is started again. Under `accelerate launch -m pared recover ...` or torchrun it runs on
    several processes. The path of the result goes to stdout.
    """
    from pared.recover import recover as run
    from pared.report.console import Reporter, emit_json, err, show
    from pared.report.tables import recovered

    with Reporter() as progress:
        result = run(model, out=out, teacher=teacher, overwrite=overwrite, progress=progress, **settings)
    if format is Format.json:
        emit_json(result.report)
        return
    show(err(), recovered(result.report))
    sys.stdout.write(f"{out}\n")
