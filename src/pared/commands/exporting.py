"""export: write a checkpoint in the form of another engine."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pared.commands.options import AsFormat, Format, Model, Overwrite


class Engine(StrEnum):
    """The forms that a checkpoint can be written in."""

    gguf = "gguf"


class Quantization(StrEnum):
    """What matrices are written as."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    q4_k_m = "q4_k_m"


To = Annotated[Engine, typer.Option("--to", help="gguf: one file for llama.cpp", show_default=False)]
Quantize = Annotated[
    Quantization | None, typer.Option("--quantize", help="type of the matrices; by default the checkpoint's own")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="the file to write; by default MODEL-TYPE.gguf beside MODEL"),
]


def export(
    model: Model,
    to: To,
    quantize: Quantize = None,
    out: Out = None,
    overwrite: Overwrite = False,
    format: AsFormat = Format.text,
) -> None:
    """Write a checkpoint, uniform or per-layer, for llama.cpp.

    What llama.cpp can not hold is refused with the reason. The path of the result goes to stdout.
    """
    from pared.export import export_gguf
    from pared.report.console import emit_json, err, show
    from pared.report.tables import nbytes

    done = export_gguf(model, out, quantize=quantize and quantize.value, overwrite=overwrite)
    if format is Format.json:
        emit_json({**dataclasses.asdict(done), "path": str(done.path), "to": to.value})
        return
    types = ", ".join(f"{n} {t}" for t, n in done.types.items())
    lines = [f"architecture {done.architecture}, {nbytes(done.nbytes)}, tensors: {types}"]
    if done.narrow:
        lines.append(f"kept wider, because their rows do not fill the blocks of {done.quantization}: {', '.join(done.narrow)}")
    show(err(), [*lines, *done.notes])
    sys.stdout.write(f"{done.path}\n")
