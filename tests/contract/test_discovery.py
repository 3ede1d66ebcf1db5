"""Families that pared has never heard of: found out and proved, or refused with a reason, never with a crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

import tiny
from pared.calibration import Batch
from pared.errors import ModelError
from pared.modeling import hf_quiet
from pared.proof import proved_layout
from pared.stream import Stream

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 4}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ATTENTION = {"kv", "query", "ffn", "layer"}

# config class -> (settings, axes that must be proved)
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "GraniteConfig": (GROUPED, ATTENTION | {"hidden"}),
    "CohereConfig": (GROUPED, ATTENTION | {"hidden"}),
    "Starcoder2Config": (GROUPED, ATTENTION | {"hidden"}),
    "SmolLM3Config": (GROUPED, ATTENTION | {"hidden"}),
    "PhiConfig": (GROUPED, ATTENTION | {"hidden"}),
    "Olmo3Config": (GROUPED, ATTENTION | {"hidden"}),
    "Qwen3MoeConfig": (EXPERTS, {"kv", "query", "expert_ffn", "layer", "hidden"}),
    "Qwen2MoeConfig": (
        {**EXPERTS, "shared_expert_intermediate_size": 24},
        {"kv", "query", "expert_ffn", "shared_ffn", "layer", "hidden"},
    ),
    "GptOssConfig": ({**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "StableLmConfig": ({**GROUPED, "hidden_size": 64}, {"ffn", "layer"}),
    "PersimmonConfig": ({**SIZES, "hidden_size": 64}, {"ffn", "layer"}),
    "GPTJConfig": ({**SIZES, "rotary_dim": 4}, {"layer"}),
    "OPTConfig": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, {"ffn", "layer"}),
    "GPTNeoConfig": (
        {**SIZES, "num_layers": 3, "num_heads": 8, "attention_types": [[["global", "local", "global"], 1]]},
        {"layer"},
    ),
    "MambaConfig": ({**SIZES, "state_size": 4}, {"layer"}),
}


def config(kind: str) -> PreTrainedConfig:
    return getattr(transformers, kind)(**FAMILIES[kind][0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_unnamed_family_is_found_out(kind: str) -> None:
    proofs = proved_layout(config(kind)).proofs
    assert {a for a, p in proofs.items() if p.holds} >= FAMILIES[kind][1]
    assert all(p.holds or p.reason for p in proofs.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_unnamed_family_runs_block_by_block(kind: str) -> None:
    with hf_quiet():
        model = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32).eval()
    stream = Stream(model, proved_layout(model.config))
    batches = [Batch(tiny.tokens(2, 18)), Batch(tiny.tokens(2, 18, seed=9))]
    with torch.no_grad():
        hidden = stream.forward(batches)
        for batch, h in zip(batches, hidden, strict=True):
            assert tiny.close(stream.logits(h), tiny.logits(model, batch.input_ids))


@pytest.mark.parametrize("kind", ["XGLMConfig", "BambaConfig"])
def test_a_family_that_no_small_instance_can_be_made_of_is_refused_in_words(kind: str) -> None:
    try:
        proofs = proved_layout(getattr(transformers, kind)()).proofs
    except ModelError as error:
        assert "instance" in error.what
    else:
        assert proofs
