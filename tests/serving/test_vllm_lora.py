"""Adapters on checkpoints whose layers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import pared
import tiny
from engine import Engine, check_greedy, requests

pytestmark = pytest.mark.vllm

WANTED = requests(tiny.VOCAB, count=24)


def check(path: Path, names: list[str] | str, vllm: Engine, folder: Path) -> None:
    """With an adapter each request gets the tokens of the merged model; without, beside it, those of the base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted: Any = get_peft_model(
        pared.load(path, dtype=torch.float32), LoraConfig(target_modules=names, r=8, lora_alpha=64, init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    got = vllm.serve(path, WANTED, enable_lora=True, max_lora_rank=8, lora=str(folder / "adapter"))
    plain = vllm.serve(path, WANTED, enable_lora=True, max_lora_rank=8)
    assert got != plain
    assert check_greedy(pared.load(path, dtype=torch.float32).eval(), WANTED, plain) > 100
    assert check_greedy(adapted.merge_and_unload().eval(), WANTED, got) > 100


def test_an_adapter_is_served_as_if_it_were_merged(vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.without_parts("llama", tmp_path, [["attention"], [], [], ["mlp"]])
    check(path, ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], vllm, tmp_path)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_adapters_of_other_families_are_served(family: str, vllm: Engine, tmp_path: Path) -> None:
    # The scores that these adapters make are large, where vLLM's approximation of the cap is coarse (engine.SOFT_CAPPED).
    uncapped = {"attn_logit_softcapping": None} if family == "gemma2" else {}
    check(checkpoints.per_layer(family, tmp_path, **uncapped), "all-linear", vllm, tmp_path)


def test_what_vllm_has_no_adapters_for_is_refused_in_words(vllm: Engine, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not support LoRA"):
        check(checkpoints.per_layer("gpt2", tmp_path), ["c_fc"], vllm, tmp_path)
