"""Checkpoints that are broken, hostile or of the wrong kind: each is refused by name and with a way out."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pared.checkpoint import INDEX, SINGLE, Checkpoint
from pared.errors import ModelError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of two tensors each."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a0": torch.randn(4, 4), "a1": torch.randn(8)}, path / A)
    save_file({"b0": torch.randn(4, 4), "b1": torch.randn(8)}, path / B)
    edit_index(path, {"a0": A, "a1": A, "b0": B, "b1": B})
    return path


def edit_index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_config(path: Path, **entries: object) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **entries}))


def refused(path: Path | str, *words: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(path)
    error = caught.value
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"
    assert error.where is not None and error.fix
    assert len(str(error).splitlines()) == 3
    return error


def test_the_untouched_checkpoint_opens(model: Path) -> None:
    assert sorted(Checkpoint.open(model).tensors) == ["a0", "a1", "b0", "b1"]


# -- kinds that can not be pruned ------------------------------------------------------------------------------------


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, "no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"a": ' * 100_000])
def test_a_config_that_is_no_json_object(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    refused(model, "config.json")


def test_a_file_is_not_a_model(model: Path) -> None:
    refused(model / A, "directory", str(model))


def test_only_pickles_are_refused_with_a_command_that_converts_them(tmp_path: Path) -> None:
    path = tmp_path / "old"
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=256)
    model = LlamaForCausalLM(config)
    config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    error = refused(path, "pytorch_model.bin", "python -c")
    assert error.fix is not None
    command = shlex.split(error.fix)
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    converted = Checkpoint.open(tmp_path / "old-safetensors")
    assert all(torch.equal(converted.read(k), v) for k, v in model.state_dict().items())


def test_no_weights_at_all(model: Path) -> None:
    for name in (A, B, INDEX):
        (model / name).unlink()
    refused(model, SINGLE, INDEX)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter(model: Path, with_config: bool) -> None:
    for name in (A, B, INDEX):
        (model / name).unlink()
    if not with_config:
        (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": torch.zeros(2, 2)}, model / "adapter_model.safetensors")
    refused(model, "LoRA adapter", "merge_and_unload")


@pytest.mark.parametrize(
    "entries", [{"quantization_config": {"quant_method": "gptq"}}, {"compression_config": {"quant_method": "gptq"}}]
)
def test_quantised(model: Path, entries: dict[str, object]) -> None:
    edit_config(model, **entries)
    refused(model, "quantised", "gptq", "unquantised")
    edit_config(model, text_config=entries)
    refused(model, "quantised")


def test_remote_code_needs_the_flag(model: Path) -> None:
    entries = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}, "model_type": "mine_of_2023"}
    edit_config(model, **entries)
    (model / "modeling_mine.py").write_text("raise SystemExit('this ran')")
    refused(model, "mine_of_2023", "--trust-remote-code")
    assert Checkpoint.open(model, trust_remote_code=True).trust_remote_code
    edit_config(model, auto_map=entries["auto_map"])
    assert Checkpoint.open(model).config["model_type"] == "llama"


# -- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["../other.safetensors", "sub/../../other.safetensors", "/abs.safetensors", "a\\..\\b.safetensors"]
)
def test_an_index_that_points_outside(model: Path, target: str) -> None:
    (model / B).rename(model.parent / "other.safetensors")
    edit_index(model, {"a0": A, "a1": A, "b0": target, "b1": target})
    refused(model, "outside", INDEX)


@pytest.mark.parametrize("name", ["config.json", INDEX, A])
def test_a_link_that_leads_outside(model: Path, name: str) -> None:
    (model / name).rename(model.parent / "elsewhere")
    (model / name).symlink_to(model.parent / "elsewhere")
    refused(model, "outside", name)


def test_a_side_file_that_is_a_link_to_a_secret(model: Path) -> None:
    (model.parent / "secret").write_text("key")
    (model / "tokenizer.json").symlink_to(model.parent / "secret")
    with pytest.raises(ModelError, match="outside"):
        Checkpoint.open(model).side_files()


def test_a_link_within_the_directory_is_fine(model: Path) -> None:
    (model / B).rename(model / "blob")
    (model / B).symlink_to("blob")
    assert len(Checkpoint.open(model).tensors) == 4


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a0": 3}, {"a0": "pytorch_model.bin"}, {"a0": "\0.safetensors"}])
def test_an_index_that_makes_no_sense(model: Path, weight_map: object) -> None:
    edit_index(model, weight_map)
    refused(model, INDEX)


def test_a_missing_shard(model: Path) -> None:
    (model / B).unlink()
    refused(model, "missing", B)


def test_a_tensor_that_the_shard_does_not_have(model: Path) -> None:
    edit_index(model, {"a0": A, "a1": A, "b0": B, "b1": B, "b2": B})
    refused(model, "b2", B)


def test_a_tensor_that_the_index_does_not_have(model: Path) -> None:
    edit_index(model, {"a0": A, "a1": A, "b0": B})
    refused(model, "b1", B)


def test_a_tensor_in_two_shards(model: Path) -> None:
    save_file({"b0": torch.randn(4, 4), "b1": torch.randn(8), "a0": torch.randn(4, 4)}, model / B)
    refused(model, "a0", "two shards")


def test_two_models_in_one_directory(model: Path) -> None:
    save_file({"a0": torch.zeros(4, 4)}, model / SINGLE)
    refused(model, SINGLE, INDEX)


# -- the shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1, -40])
def test_a_truncated_shard(model: Path, keep: int) -> None:
    data = (model / B).read_bytes()
    (model / B).write_bytes(data[:keep])
    refused(model, "truncated", B)


def test_a_shard_with_bytes_behind_its_end(model: Path) -> None:
    with (model / A).open("ab") as stream:
        stream.write(b"x")
    refused(model, A)


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["b0"].update(shape=[4, 5]),
        lambda h: h["b0"].update(shape=[-4, -4]),
        lambda h: h["b0"].update(shape=[4.0, 4]),
        lambda h: h["b0"].update(shape="44"),
        lambda h: h["b0"].update(dtype="F7"),
        lambda h: h["b0"].update(dtype=["F32"]),
        lambda h: h["b0"].update(data_offsets=[0]),
        lambda h: h["b0"].update(data_offsets=[1000, 1064]),
        lambda h: h["b0"].update(data_offsets=h["b1"]["data_offsets"], shape=[8]),
        lambda h: h["b0"].pop("shape"),
        lambda h: h.update(b0=7),
        lambda h: h.update(__metadata__={"a": 1}),
        lambda h: h.pop("b1"),
    ],
)
def test_a_header_that_lies(model: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    edit_header(model / B, change)
    refused(model, B)


@pytest.mark.parametrize("raw", [b"[]", b"{", b'{"a":1,"a":1}', b"\xff\xff", b"null", b'{"a":' * 50_000])
def test_a_header_that_is_no_header(model: Path, raw: bytes) -> None:
    (model / B).write_bytes(struct.pack("<Q", len(raw)) + raw)
    refused(model, "malformed", B)


def test_a_header_that_claims_the_memory(model: Path) -> None:
    (model / B).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(model, "malformed", B)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read_never_a_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz")
    (path / "config.json").write_text("{}")
    (path / SINGLE).write_bytes(data)
    refused(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_named(model: Path, dtype: torch.dtype) -> None:
    bad = torch.ones(5000)
    bad[4321] = float("nan")
    save_file({"b0": torch.randn(4, 4).to(dtype), "b1": bad.to(dtype)}, model / B)
    checkpoint = Checkpoint.open(model)
    with pytest.raises(ModelError) as caught:
        checkpoint.check_finite()
    assert "b1" in str(caught.value) and "NaN" in str(caught.value) and B in str(caught.value)
    save_file({"b0": torch.full((4, 4), float("-inf")), "b1": torch.ones(8)}, model / B)
    with pytest.raises(ModelError, match="b0 holds Inf"):
        Checkpoint.open(model).check_finite()


def test_a_nan_behind_the_first_chunk_is_found(model: Path) -> None:
    bad = torch.ones(3 * 2**20)
    bad[-1] = float("nan")
    save_file({"b0": torch.ones(4, 4), "b1": bad}, model / B)
    with pytest.raises(ModelError, match="b1 holds NaN"):
        Checkpoint.open(model).check_finite()


def test_a_shard_that_shrinks_after_opening_is_named_when_read(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    (model / B).write_bytes((model / B).read_bytes()[:-8])
    last = max((t for t in checkpoint.tensors.values() if t.file == B), key=lambda t: t.offset)
    with pytest.raises(ModelError, match=last.name) as caught:
        checkpoint.read(last.name)
    assert B in str(caught.value)
