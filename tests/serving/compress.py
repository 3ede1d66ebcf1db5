"""Quantises a checkpoint with llm-compressor, in its own environment: compress.py CHECKPOINT SCHEME TOKENS.json OUT."""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def main(checkpoint: str, scheme: str, tokens: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    with open(tokens) as file:
        rows = json.load(file)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(scheme=scheme, targets="Linear", ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
    )
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
