"""demo: prune the model that ships with pared and show what it cost."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from pared.commands.options import AsFormat, Format
from pared.errors import MissingError

# Sampling text takes most of the time: so much of it that the numbers mean something, within two minutes on two cores.
REMOVE, SAMPLES, WINDOWS, SEQ_LEN = 0.25, 64, 32, 256


OUT = Path("demo-output")
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="where to write; an earlier result is replaced")]


def demo(
    out: Out = OUT,
    format: AsFormat = Format.text,
) -> None:
    """Prune the small model that ships with pared by 25%, and compare dense with pruned."""
    shipped = Path(str(files("pared"))) / "data" / "storyteller"
    if not shipped.is_dir():
        raise MissingError("the model that ships with pared is not there", where=shipped, fix="install pared again")
    run(shipped, out, format)


def run(model: Path, out: Path, format: Format) -> dict[str, Any]:
    """The demo on any small model that can write its own calibration text."""
    from pared.evaluate.report import evaluate
    from pared.report.console import Reporter, emit_json, err, show
    from pared.report.tables import evaluation
    from pared.run import prune

    with Reporter() as progress:
        pruned = prune(
            model,
            out=out,
            overwrite=True,
            progress=progress,
            remove=REMOVE,
            of="block-params",
            calibration="self",
            samples=SAMPLES,
            seq_len=SEQ_LEN,
        )
        report = evaluate(out, against=model, text="self", seq_len=SEQ_LEN, max_windows=WINDOWS, progress=progress)
    if format is Format.json:
        emit_json({**report, "prune": pruned.report})
        return report
    plan, how = pruned.plan, pruned.report["recipe"]["criterion"]
    show(err(), [f"{model.name}: {plan.removed:.1%} of its {plan.of.replace('-', ' ')} removed, criterion {how}"])
    show(err(), [*evaluation(report), "The pruned model lies in:"])
    sys.stdout.write(f"{out}\n")
    return report
