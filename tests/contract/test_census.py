"""What is proved of every model type that transformers has does not shrink. `tools/census.py` takes the census anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pared.census import examine, model_types
from pared.report.tables import census_shares

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "census.json").read_text())
# Their reference code for linear attention or state spaces runs token by token: half a minute each.
SLOW = {
    "bailing_hybrid",
    "falcon_h1",
    "kimi_linear",
    "inkling2_loop_text",
    "zamba",
    "zamba2",
    "qwen4_exp_text",
    "inkling2_text",
    "deepseek_v32",
    "dots3_note_text",
}
INSIDE = [t for t, e in RECORDED.items() if not e["outside"] and e["proved"]]


def same(model_type: str) -> None:
    if model_type not in model_types():
        pytest.skip(f"this transformers has no {model_type}")
    entry, recorded = examine(model_type), RECORDED[model_type]
    got = {a: "stock" if p.stock else "form" for a, p in entry.proofs.items() if p.holds}
    assert not entry.failed and recorded["proved"].items() <= got.items()
    assert all(p.holds or p.reason for p in entry.proofs.values())


@pytest.mark.parametrize("model_type", [t for t in INSIDE if t not in SLOW])
def test_what_was_proved_of_a_type_stays_proved(model_type: str) -> None:
    same(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in INSIDE if t in SLOW])
def test_what_was_proved_of_a_slow_type_stays_proved(model_type: str) -> None:
    same(model_type)


@pytest.mark.parametrize("model_type", ["bert", "bart", "qwen3_5"])
def test_what_is_no_decoder_only_language_model_is_said_to_be_none(model_type: str) -> None:
    assert examine(model_type).outside == RECORDED[model_type]["outside"] != ""


def test_every_cell_that_is_not_proved_says_why() -> None:
    for model_type, entry in RECORDED.items():
        assert entry["outside"] or entry["failed"] or entry["proved"] or entry["not_proved"], model_type
        assert all(entry["not_proved"].values()), model_type


def test_the_shares_of_all_types_are_those_that_are_aimed_at() -> None:
    found = [
        {**e, "model_type": t, "axes": {**{a: "proved" for a in e["proved"]}, **e["not_proved"]}} for t, e in RECORDED.items()
    ]
    shares = {what: share for what, share, _ in census_shares(found)}
    assert shares["FFN"] >= FLOOR["FFN"] and shares["layers"] >= FLOOR["layers"]
    assert shares["heads"] >= FLOOR["heads"] and shares["hidden"] >= FLOOR["hidden"]


# Shares of the types in scope, rounded down.
FLOOR = {"FFN": 0.95, "layers": 0.96, "heads": 0.91, "hidden": 0.89}
