"""The table of all families: every type in one of its two parts, every cell that is not proved with its reason."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from command import pared
from pared.report import tables
from pared.report.tables import census_shares

FOUND: list[dict[str, Any]] = [
    {
        "model_type": "llama",
        "outside": "",
        "failed": "",
        "axes": {"kv": "proved", "ffn": "proved", "hidden": "proved", "layer": "proved"},
    },
    {
        "model_type": "bloom",
        "outside": "",
        "failed": "",
        "axes": {"kv": "per-layer form", "ffn": "per-layer form", "hidden": "they differ", "layer": "proved"},
    },
    {"model_type": "broken", "outside": "", "failed": "it does not build", "axes": {}},
    {"model_type": "bert", "outside": "an encoder", "failed": "", "axes": {}},
]


def test_it_shows_every_type_and_every_reason() -> None:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as shown:
        for part in tables.census(FOUND):
            console.print(part)
    text = shown.get()
    for words in ("llama", "stock", "bloom", "form", "hidden: they differ", "it does not build", "an encoder"):
        assert words in text


def test_shares_are_of_the_types_in_scope() -> None:
    shares = {what: (round(share, 3), n) for what, share, n in census_shares(FOUND)}
    assert shares == {"FFN": (0.667, 3), "layers": (0.667, 3), "heads": (1.0, 2), "hidden": (0.333, 3)}


def test_only_families_can_be_proved() -> None:
    done = pared("ls", "recipes", "--proved")
    assert done.code == 2 and "--proved" in done.err
