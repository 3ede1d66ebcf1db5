"""Verify finds whatever is wrong with a checkpoint, and says in which file and tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pared.verify import verify
from pared.writer import CheckpointWriter


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, out: Path, replaced: dict[str, Tensor] | None = None, *, without: str = "") -> Path:
    tensors = {**model.state_dict(), **(replaced or {})}
    with CheckpointWriter(out, max_shard_bytes=20_000) as writer:
        for name, tensor in tensors.items():
            if name != without:
                writer.add(name, tensor)
        writer.add_file("config.json", model.config.to_json_string())
        writer.add_file("plan.json", "{}")
        return writer.commit()


def test_verify_finds_nothing_in_what_was_just_written(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    assert verify(save(tiny, tmp_path / "out")) == []


def test_verify_finds_every_flipped_byte_and_names_the_file(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    out = save(tiny, tmp_path / "out")
    for file in sorted(p for p in out.iterdir() if p.name != "manifest.json"):
        before = file.read_bytes()
        for at in (0, len(before) // 2, len(before) - 1):
            data = bytearray(before)
            data[at] ^= 0x10
            file.write_bytes(data)
            assert file.name in {Path(p.where).name for p in verify(out)}, (file, at)
        file.write_bytes(before)
    assert verify(out) == []


def test_verify_finds_what_is_gone_and_what_was_slipped_in(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    out = save(tiny, tmp_path / "out")
    (out / "generation_config.json").write_text("{}")
    assert [p.where for p in verify(out)] == ["generation_config.json"]
    (out / "generation_config.json").unlink()
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    assert [p.where for p in verify(out)] == ["manifest.json"]
    (out / "plan.json").unlink()
    assert verify(out) == []
    (tmp_path / "manifest.json").rename(out / "manifest.json")
    assert [(p.where, p.what) for p in verify(out)] == [("plan.json", "missing")]


def test_verify_names_tensors_that_do_not_fit_the_config(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "missing": save(tiny, tmp_path / "missing", without=name),
        "unexpected": save(tiny, tmp_path / "unexpected", {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}),
        "misshapen": save(tiny, tmp_path / "misshapen", {name: torch.ones(40, 32)}),
        "NaN": save(tiny, tmp_path / "nan", {name: torch.full((48, 32), float("nan"))}),
        "Inf": save(tiny, tmp_path / "inf", {name: torch.full((48, 32), float("inf"))}),
    }
    for what, out in cases.items():
        (problem,) = verify(out)
        assert what in problem.what and "up_proj" in problem.what
        if what != "missing":
            with safe_open(out / problem.where, "pt") as shard:
                assert problem.what.split()[0] in shard.keys()  # noqa: SIM118


def test_a_tied_head_may_be_there_or_not(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    assert verify(save(model, tmp_path / "with")) == []
    assert verify(save(model, tmp_path / "without", without="lm_head.weight")) == []


def test_the_manifest_can_not_make_verify_read_elsewhere(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    out = save(tiny, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest["files"]["../secret"] = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert [p.where for p in verify(out)] == ["manifest.json"]
    (out / "manifest.json").write_text("[]")
    assert [p.where for p in verify(out)] == ["manifest.json"]


def test_a_plain_safetensors_checkpoint_verifies(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    tiny.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    save_file({"x": torch.zeros(1)}, tmp_path / "out" / "extra.safetensors")
    assert verify(tmp_path / "out") == []
