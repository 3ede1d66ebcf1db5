"""What unsloth's FastLanguageModel reads of a checkpoint, in those that pared writes with uniform shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import made
import tiny

# The families that unsloth has classes for, and whose blocks it patches by the names below.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("remove", [0.2, 0.5])
def test_a_uniform_checkpoint_is_stock_to_unsloth(tmp_path: Path, family: str, remove: float) -> None:
    made.checkpoint(tmp_path / "dense", family)
    out = made.pruned(tmp_path / "dense", tmp_path / "out", remove=remove)
    written = json.loads((out / "config.json").read_text())
    # No code, no per-layer sizes, no quantisation; a model type that it has a class for.
    assert not {"auto_map", "per_layer_config", "per_layer_shapes", "quantization_config"} & set(written)
    assert written["model_type"] in FAMILIES
    config = AutoConfig.from_pretrained(out)
    model, told = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    assert heads % config.num_key_value_heads == 0
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        # Its attention reshapes by these, once for all layers.
        assert attention.q_proj.out_features == heads * config.head_dim == attention.o_proj.in_features
        assert attention.k_proj.out_features == config.num_key_value_heads * config.head_dim == attention.v_proj.out_features
        assert attention.num_key_value_groups == groups and attention.head_dim == config.head_dim
        # Its fused MLP multiplies gate and up side by side.
        assert mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.down_proj.in_features == config.intermediate_size
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (64, 10000.0)
    assert model.lm_head.out_features == config.vocab_size == model.get_input_embeddings().num_embeddings
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert tiny.close(tiny.logits(model), tiny.logits(made.loaded(out)))


def test_the_adapters_that_unsloth_asks_for_fit(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made.checkpoint(tmp_path / "dense")
    out = made.pruned(tmp_path / "dense", tmp_path / "out")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(out), LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM")
    )
    found = {n.split(".")[-4] for n, p in adapted.named_parameters() if p.requires_grad}
    assert found == set(names)
    adapted(input_ids=tiny.tokens(2, 8), labels=tiny.tokens(2, 8)).loss.backward()
