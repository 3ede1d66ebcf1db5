"""import: write an old checkpoint anew in a form that a current transformers builds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pared.commands.options import AsFormat, Format, Overwrite

Old = Annotated[str, typer.Argument(metavar="OLD", help="a directory, or a hub id, as it was published", show_default=False)]
New = Annotated[Path, typer.Option("--out", "-o", metavar="NEW", help="the directory to write", show_default=False)]


def import_(old: Old, out: New, overwrite: Overwrite = False, format: AsFormat = Format.text) -> None:
    """Make an old checkpoint one that transformers builds: Baichuan, ChatGLM, GLM-4.

    The published code is not run. The path of the result goes to stdout.
    """
    from pared.importing import import_checkpoint
    from pared.report.console import emit_json, err, show

    done = import_checkpoint(old, out, overwrite=overwrite)
    if format is Format.json:
        notes = list(done.notes)
        emit_json({"out": str(done.path), "family": done.family, "model_type": done.model_type, "notes": notes})
        return
    show(err(), [f"{done.family}, written as model type {done.model_type!r}: {done.tensors} tensors", *done.notes])
    sys.stdout.write(f"{out}\n")
