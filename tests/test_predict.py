"""What a run is said to take before it starts: from the config alone, and near what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from command import pared, refused
from pared.errors import UsageError
from pared.predict import Hardware, predict
from pared.resources import Limits

STATED = Hardware.parse("1e12,1e11,1e9,1e9")


def config_of(folder: Path, **changes: Any) -> Path:
    """A directory with nothing but a config."""
    folder.mkdir(parents=True)
    tiny.config("llama", **changes).save_pretrained(folder)
    return folder


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    model = config_of(tmp_path / "model")
    done = pared("prune", model, "--dry-run", "--hardware", "1e12,1e11,1e9,1e9", "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["predicted"]
    assert found["peak"] > found["least"] > 0 and found["hours"] >= 0 and found["flops"] > 0
    assert found["hardware"]["said"] == "as given"
    shown = pared("prune", model, "--dry-run")
    assert shown.code == 0 and "peak memory" in shown.err and shown.out == ""


def test_memory_does_not_grow_with_layers_and_does_with_width_and_text(tmp_path: Path) -> None:
    def least(name: str, samples: int = 8, **changes: Any) -> dict[str, Any]:
        model = config_of(tmp_path / name, **changes)
        found = predict(model, hardware=STATED, criterion="taylor", compensate="none", samples=samples, seq_len=32)
        assert found is not None
        return found

    base, deep, wide = least("base"), least("deep", num_hidden_layers=12), least("wide", intermediate_size=4800)
    more = least("more", samples=800)
    assert deep["least"] == base["least"] and wide["least"] > base["least"] and more["least"] == base["least"]
    assert more["peak"] > base["peak"] and deep["flops"] > 3 * base["flops"]
    assert deep["read"] > base["read"]


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"criterion": "l2", "compensate": "none"}, 2.1),
        ({"criterion": "wanda_sp", "compensate": "none"}, 2.1),
        ({"criterion": "taylor", "compensate": "none"}, 3.2),
        ({}, 4.2),
    ],
)
def test_bytes_read_are_those_that_were_foreseen(tmp_path: Path, settings: dict[str, Any], most: float) -> None:
    from pared.run import prune

    model = tiny.save(tiny.model("llama", intermediate_size=480), tmp_path / "model")
    done = prune(model, out=tmp_path / "out", calibration=tiny.tokens(8, 16), structures=("ffn",), **settings)
    used = done.report["resources"]
    assert abs(used["predicted_read"] - used["source_read"]) <= 0.2 * used["source_read"]
    assert used["source_read"] <= most * sum(p.stat().st_size for p in model.glob("*.safetensors"))


def test_limits_are_judged_on_paper_too(tmp_path: Path) -> None:
    model = config_of(tmp_path / "model")
    refused(tmp_path, 5, "prune", model, "--dry-run", "--max-memory", "50MB", words=("at least",))
    found = predict(model, hardware=STATED, limits=Limits(memory=1 << 30))
    assert found is not None and found["peak"] <= 1 << 30


@pytest.mark.parametrize("text", ["", "1e12", "1,2,3", "1,2,3,x", "0,1,1,1", "1,1,1,-1"])
def test_hardware_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Hardware.parse(text)
