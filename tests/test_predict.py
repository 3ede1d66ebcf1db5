"""What a run is said to take before it starts: from the config alone, and near what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tiny
from command import pared, refused
from pared.errors import UsageError
from pared.hardware import Hardware
from pared.predict import predict
from pared.resources import Limits

STATED = Hardware.parse("1e12,1e11,1e9,1e9")


class Products(TorchDispatchMode):
    """Counts the operations of products."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.addmm_:
            self.total += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


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


@pytest.mark.parametrize(
    ("criterion", "axes"), [("taylor", ("ffn",)), ("taylor-second", ("ffn",)), ("wanda_sp", ("kv", "ffn"))]
)
def test_operations_are_those_that_were_counted(tmp_path: Path, criterion: str, axes: tuple[str, ...]) -> None:
    from pared.run import prune

    model = tiny.save(tiny.model("llama", hidden_size=64, intermediate_size=192, vocab_size=512), tmp_path / "model")
    settings: dict[str, Any] = {"criterion": criterion, "structures": axes, "compensate": "none", "batch": 4}
    found = predict(model, hardware=STATED, samples=8, seq_len=16, **settings)
    with Products() as counted:
        prune(model, out=tmp_path / "out", calibration=tiny.tokens(8, 16), **settings)
    assert found is not None and found["flops"] == pytest.approx(counted.total, rel=0.15)


def test_this_machine_is_measured_in_a_moment() -> None:
    here = Hardware.here(torch.float32, torch.bfloat16, (256, 64, 192), start=2.0)
    rates = (here.flops, here.solve_flops, here.invert, here.read, here.write, here.touch, here.check)
    assert all(1e6 < rate < 1e15 for rate in rates)


def test_hours_are_what_each_kind_of_work_takes(tmp_path: Path) -> None:
    model = config_of(tmp_path / "model")
    fast, slow = Hardware.parse("1e12,1e12,1e12,1e12"), Hardware.parse("1e6,1e6,1e6,1e6")
    took = [predict(model, hardware=h, samples=64, seq_len=32) for h in (fast, slow)]
    assert took[0] is not None and took[1] is not None
    work = took[1]["flops"] + took[1]["solve_flops"] + took[1]["read"] + took[1]["written"]
    assert took[1]["hours"] == pytest.approx(work / 1e6 / 3600, rel=1e-3) and took[0]["hours"] < 1e-4 * took[1]["hours"]
