"""What is not the published checkpoint is refused in three lines, and nothing is written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from command import refused
from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.importing import import_checkpoint
from published_layouts import INDEX, VARIANTS, write

ALL = sorted(VARIANTS)


def refuse(tmp_path: Path, *words: str) -> None:
    refused(tmp_path, 3, "import", tmp_path / "old", "-o", tmp_path / "new", words=words)


def first(name: str, part: str) -> str:
    return next(n for n in VARIANTS[name].weights() if part in n)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("part", ["embed", "layers.1.", "norm", "o_proj|dense.weight", "W_pack|query_key_value.weight"])
def test_a_missing_tensor(name: str, part: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    weights = variant.weights()
    gone = next(n for n in weights if any(p in n for p in part.split("|")) and "inv_freq" not in n)
    del weights[gone]
    write(tmp_path / "old", variant.config, weights, variant.files)
    refuse(tmp_path, gone, "missing")


@pytest.mark.parametrize("name", ALL)
def test_a_layer_count_that_is_not_the_weights(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    key = "num_layers" if "num_layers" in variant.config else "num_hidden_layers"
    for layers, words in ((2, ("do not belong", "layers.2.")), (4, ("missing", "layers.3."))):
        root = tmp_path / str(layers)
        write(root / "old", {**variant.config, key: layers}, variant.weights(), variant.files)
        refuse(root, *words)


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_of_another_shape_or_of_something_else(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    odd = next(n for n in variant.weights() if n.endswith("weight") and "layers.1" in n)
    write(tmp_path / "a" / "old", variant.config, {**variant.weights(), odd: torch.zeros(3, 5)}, variant.files)
    refuse(tmp_path / "a", odd, "[3, 5]")
    write(tmp_path / "b" / "old", variant.config, {**variant.weights(), "prefix_encoder.weight": torch.zeros(3)}, variant.files)
    refuse(tmp_path / "b", "prefix_encoder.weight", "do not belong")


@pytest.mark.parametrize("name", ALL)
def test_values_that_are_not_finite(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    weights = variant.weights()
    bad = list(weights)[-1] if not list(weights)[-1].endswith("inv_freq") else list(weights)[-2]
    weights[bad].view(-1)[0] = float("nan")
    write(tmp_path / "old", variant.config, weights, variant.files)
    refuse(tmp_path, bad, "finite")


SETTINGS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *((n, {"a_new_flag": True}, ("a_new_flag", "does not know")) for n in ALL),
    *((n, {"hidden_size": 0}, ("hidden_size",)) for n in ALL),
    *((n, {"num_attention_heads": True}, ("num_attention_heads",)) for n in ALL),
    *((n, {"num_attention_heads": 5}, ("5 heads",)) for n in ALL if n != "chatglm-multi-head"),
    *((n, {"tie_word_embeddings": "no"}, ("tie_word_embeddings",)) for n in ALL),
    ("baichuan-7b", {"hidden_act": "gelu"}, ("hidden_act", "gelu")),
    ("baichuan-7b", {"rms_norm_eps": "small"}, ("rms_norm_eps",)),
    ("baichuan2-7b", {"tie_word_embeddings": True}, ("normalised", "shared")),
    ("baichuan-13b", {"model_max_length": None}, ("rotary", "ALiBi", "modeling_baichuan.py")),
    ("baichuan-13b", {"quantization_config": {"load_in_8bit": True}}, ("quantised",)),
    ("chatglm2-6b", {"apply_residual_connection_post_layernorm": True}, ("apply_residual_connection_post_layernorm",)),
    ("chatglm2-6b", {"rmsnorm": False}, ("rmsnorm", "LayerNorm")),
    ("chatglm2-6b", {"add_bias_linear": True}, ("add_bias_linear", "bias")),
    ("chatglm2-6b", {"post_layer_norm": False}, ("post_layer_norm", "final norm")),
    ("chatglm2-6b", {"fp32_residual_connection": True}, ("fp32_residual_connection",)),
    ("chatglm2-6b", {"pre_seq_len": 128}, ("pre_seq_len", "prefix")),
    ("chatglm2-6b", {"quantization_bit": 4}, ("quantization_bit", "quantised")),
    ("chatglm2-6b", {"multi_query_group_num": 3}, ("3 groups",)),
    ("chatglm2-6b", {"eos_token_id": None}, ("eos_token_id",)),
    ("chatglm2-6b", {"rope_ratio": 16}, ("rope_ratio", "modeling_chatglm.py")),
    ("chatglm2-6b", {"vision_config": {}}, ("vision_config",)),
    ("chatglm-6b", {"position_encoding_2d": False}, ("position_encoding_2d",)),
    ("chatglm-6b", {"pre_seq_len": 128}, ("pre_seq_len",)),
    ("chatglm-6b", {"quantization_bit": 8}, ("quantised",)),
    ("chatglm-6b", {"gmask_token_id": None}, ("gmask_token_id", "150001")),
    ("chatglm-6b", {"bos_token_id": None}, ("bos_token_id",)),
    ("chatglm2-6b", {"model_type": "mistery"}, ("mistery", "Baichuan-7B", "ChatGLM-6B")),
    ("chatglm2-6b", {"ffn_hidden_size": None}, ("chatglm",)),
]


@pytest.mark.parametrize(("name", "changes", "words"), SETTINGS)
def test_settings_that_were_not_published(name: str, changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    VARIANTS[name].write(tmp_path / "old", **changes)
    refuse(tmp_path, "config.json", *words)


def test_rotary_frequencies_of_another_base(tmp_path: Path) -> None:
    variant = VARIANTS["baichuan-7b"]
    name = first("baichuan-7b", "inv_freq")
    weights = variant.weights()
    weights[name] = (500000.0 ** -(torch.arange(4) / 4)).to(torch.bfloat16)
    write(tmp_path / "old", variant.config, weights)
    refuse(tmp_path, name, "10000")


def test_a_model_that_needs_no_import(tmp_path: Path) -> None:
    tiny.save(tiny.model("llama"), tmp_path / "old")
    refuse(tmp_path, "needs no import")
    import_checkpoint(VARIANTS["chatglm-6b"].write(tmp_path / "a" / "old"), tmp_path / "b" / "old")
    refuse(tmp_path / "b", "chatglm_6b", "needs no import")


@pytest.mark.parametrize("name", ["baichuan2-13b", "chatglm-6b"])
def test_pickles_are_refused_with_a_command_that_converts_them(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    old = variant.write(tmp_path / "old")
    tensors, index = {}, {}
    for i, shard in enumerate(sorted(old.glob("*.safetensors"))):
        part = load_file(shard)
        tensors |= part
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save(part, old / file)
        index |= dict.fromkeys(part, file)
        shard.unlink()
    (old / INDEX).unlink()
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    refuse(tmp_path, "pytorch_model", "convert")
    with pytest.raises(ModelError) as caught:
        import_checkpoint(old, tmp_path / "new")
    assert caught.value.fix is not None
    shell = caught.value.fix.removeprefix("convert them first: ")
    assert shlex.split(shell)[0] == "cd"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(shell, shell=True, check=True, env=environment)
    assert import_checkpoint(old, tmp_path / "new").model_type == variant.becomes
    converted = Checkpoint.open(old, trust_remote_code=True)
    assert all(torch.equal(converted.read(n), t) for n, t in tensors.items())


def test_the_source_is_never_written_to(tmp_path: Path) -> None:
    old = VARIANTS["glm-4-9b"].write(tmp_path / "old")
    refused(tmp_path, 2, "import", old, "-o", old / "new", words=("source",))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(tmp_path, 2, "import", old, "-o", tmp_path / "other.safetensors", words=("exists", "--overwrite"))


def test_pruning_what_was_not_imported_names_the_import(tmp_path: Path) -> None:
    for name in ("baichuan-13b", "chatglm-6b"):
        VARIANTS[name].write(tmp_path / name)
        refused(tmp_path, 3, "prune", tmp_path / name, "-o", tmp_path / "new", "--remove", "0.2", words=("pared import",))
