"""Quantises a checkpoint by GPTQ with llm-compressor, in its own environment: compress.py CHECKPOINT SCHEME TOKENS.json OUT.

SCHEME is the name of one of llm-compressor's, or W4A16/N for four bits in groups of N inputs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def how(scheme: str) -> dict[str, Any]:
    """The part of the recipe that says what weights become."""
    name, _, group = scheme.partition("/")
    if not group:
        return {"scheme": name, "targets": "Linear"}
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=int(group), symmetric=True)
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}


def main(checkpoint: str, scheme: str, tokens: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    with open(tokens) as file:
        rows = json.load(file)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(ignore=["lm_head"], **how(scheme)),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
