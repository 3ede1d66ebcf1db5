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


def test_an_adapter_is_served_as_if_it_were_merged(vllm: Engine, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    path = checkpoints.without_parts("llama", tmp_path, [["attention"], [], [], ["mlp"]])
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    adapted: Any = get_peft_model(
        pared.load(path, dtype=torch.float32), LoraConfig(target_modules=names, r=8, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    got = vllm.serve(path, WANTED, enable_lora=True, max_lora_rank=8, lora=str(tmp_path / "adapter"))
    plain = vllm.serve(path, WANTED, enable_lora=True, max_lora_rank=8)
    assert got != plain
    assert check_greedy(pared.load(path, dtype=torch.float32).eval(), WANTED, plain) > 100
    assert check_greedy(adapted.merge_and_unload().eval(), WANTED, got) > 100
