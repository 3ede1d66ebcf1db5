"""Inspection: what it counts without reading a weight is what the weights count to, and what it predicts is what comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from command import pared
from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.report.inspection import SHARES, describe, inspect_model
from pared.run import resolve_axes

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def inspected(model: Path, **settings: Any) -> dict[str, Any]:
    described = describe(model)
    return inspect_model(described, resolve_axes(described.layout, None), **settings)


def config_only(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", ["llama", "llama-mqa-tied", "qwen3", "phi3", "gemma2", "mixtral", "gpt2"])
def test_it_counts_what_the_tensors_count_to(tmp_path: Path, family: str) -> None:
    model = tiny.save(tiny.model(family), tmp_path / "model")
    found = inspected(model)
    with Checkpoint.open(model) as checkpoint:
        assert (found["params"], found["bytes"]) == (checkpoint.num_parameters, checkpoint.nbytes)


def test_the_parameters_of_an_axis_are_those_of_the_tensors_that_have_it(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    axes = {a["axis"]: a for a in inspected(model)["axes"]}
    with Checkpoint.open(model) as checkpoint:

        def entries(*words: str) -> int:
            return sum(tiny.numel(t.shape) for n, t in checkpoint.tensors.items() if any(w in n for w in words))

        assert axes["ffn"]["parameters"] == entries("mlp")
        assert axes["kv"]["parameters"] == entries("self_attn")
        assert axes["query"]["parameters"] == entries("q_proj", "o_proj")
        assert axes["hidden"]["parameters"] == axes["layer"]["parameters"] + entries("embed", "lm_head", "model.norm")
    assert [axes[a]["units"] for a in ("kv", "query", "ffn", "hidden", "layer")] == [4, 2, 48, 32, 3]
    assert axes["query"]["inside"] == "kv"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("align", [None, 16])
def test_what_it_predicts_is_what_pruning_gives(tmp_path: Path, family: str, align: int | None) -> None:
    model = tiny.save(tiny.model(family), tmp_path / "model")
    for row in inspected(model, align=align)["predictions"]:
        out = tmp_path / f"{row['remove']}"
        flags = ("--remove", row["remove"], "--criterion", "l1", "--compensate", "none", *(("--align", align) if align else ()))
        done = pared("prune", model, "-o", out, *flags)
        if "reason" in row:
            assert done.code == 2 and row["reason"] in done.err
            continue
        with Checkpoint.open(out) as checkpoint:
            assert (row["params"], row["bytes"]) == (checkpoint.num_parameters, checkpoint.nbytes)


def test_the_model_type_that_a_size_is_written_as_is_foretold(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    kv = next(a for a in inspected(model)["axes"] if a["axis"] == "kv")
    assert kv["config"] == {"llama": "1-2", "mistral": "3"}
    for share, kind in ((0.25, "mistral"), (0.5, "llama"), (0.75, "llama")):
        flags = ("--structures", "kv", "--of", "kv-cache", "--remove", share, "--criterion", "l1", "--compensate", "none")
        assert pared("prune", model, "-o", tmp_path / f"{share}", *flags).code == 0
        assert json.loads((tmp_path / f"{share}" / "config.json").read_text())["model_type"] == kind


def test_the_config_alone_says_the_same_as_the_whole_checkpoint(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    bare = config_only(tmp_path / "bare", json.loads((model / "config.json").read_text()))
    whole, part = inspected(model), inspected(bare)
    for key in ("model", "weights"):
        whole.pop(key), part.pop(key)
    assert whole == part


def test_a_70b_model_is_described_from_its_config(tmp_path: Path) -> None:
    found = inspected(config_only(tmp_path / "llama", LLAMA_70B))
    assert found["params"] == 70_553_706_496
    assert found["bytes"] == 2 * found["params"]
    assert all(a["proved"] for a in found["axes"])
    for row in found["predictions"]:
        assert row["remove"] <= row["removed"] < row["remove"] + 0.002


def test_what_alignment_puts_out_of_reach_is_said(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    done = pared("inspect", model, "--align", 48)
    assert done.code == 0 and "multiples of 48" in done.out
    rows = inspected(model, align=48)["predictions"]
    assert [r["remove"] for r in rows] == list(SHARES)
    assert "out of reach" in rows[-1]["reason"] and "out of reach" in done.out


def test_sizes_that_no_config_can_say_are_predicted_in_the_form_that_can(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("bloom"), tmp_path / "model")
    found = json.loads(pared("inspect", model, "--format", "json").out)
    assert found["shape"] == "per-layer" and found["removes"] == ["kv", "ffn"]
    assert all(row["removed"] >= row["remove"] for row in found["predictions"])
    assert "--shape per-layer" in pared("inspect", model).out


def test_an_axis_that_is_not_proved_comes_with_the_reason(tmp_path: Path) -> None:
    model = tiny.save(tiny.heads_unproved(), tmp_path / "model")
    found = json.loads(pared("inspect", model, "--format", "json").out)
    for axis in found["axes"]:
        assert axis["proved"] or (axis["reason"] and axis["config"] is None)
    assert not all(a["proved"] for a in found["axes"])
    assert pared("inspect", model).code == 0


def test_no_weight_is_read(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    before = inspected(model)
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    weights.write_bytes(data[:header] + b"\xff" * (len(data) - header))  # every value a NaN
    assert inspected(model) == before


def test_a_checkpoint_whose_layers_differ_is_described(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("qwen3"), tmp_path / "model")
    how = ("--shape", "per-layer", "--remove", "0.3", "--criterion", "l1", "--compensate", "none")
    assert pared("prune", model, "-o", tmp_path / "out", *how).code == 0
    found = inspected(tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert (found["params"], found["bytes"]) == (checkpoint.num_parameters, checkpoint.nbytes)
    assert isinstance(next(a for a in found["axes"] if a["axis"] == "ffn")["units"], list)
    assert pared("inspect", tmp_path / "out").code == 0


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_model_in_the_cache_is_described_offline(tmp_path: Path, weights: bool) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    home = tmp_path / "home" / "hub" / "models--someone--tiny"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors") if weights else ("config.json",):
        (snapshot / name).write_bytes((model / name).read_bytes())
    command = [sys.executable, "-m", "pared", "inspect", "someone/tiny", "--format", "json"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params"] == inspected(model)["params"]
    assert (json.loads(done.stdout)["weights"] == "headers") == weights


@pytest.mark.parametrize(
    "entries", [{"quantization_config": {"quant_method": "awq"}}, {"model_type": "lama"}, {"num_attention_heads": 7}]
)
def test_a_config_that_can_not_be_used_is_refused_without_weights_too(tmp_path: Path, entries: dict[str, Any]) -> None:
    path = config_only(tmp_path / "model", {**LLAMA_70B, **entries})
    with pytest.raises(ModelError):
        describe(path)
    assert pared("inspect", path).code == 3
