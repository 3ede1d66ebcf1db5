"""Quantise after pruning: torchao and bitsandbytes in transformers, llm-compressor's checkpoints in vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

import checkpoints
import pared
import tiny
from engine import Engine, Request
from pared.report.formats import formats
from pared.report.inspection import describe

pytestmark = pytest.mark.vllm  # their packages are in vLLM's environment

ROOT = Path(__file__).resolve().parents[2]
COMPRESSOR = ROOT / ".venv-llmcompressor" / "bin" / "python"


def settings(kind: str) -> Any:
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    weight_only = Int8WeightOnlyConfig(version=2)
    return TorchAoConfig(weight_only if kind == "int8" else Int8DynamicActivationInt8WeightConfig(version=2))


def quantised(path: Path, kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, quantization_config=settings(kind), device_map="cpu"
    )


@pytest.mark.parametrize("kind, error", [("int8", 0.03), ("int8 dynamic", 0.06), ("nf4", 0.4)])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_pruned_checkpoint_is_quantised_like_any_other(kind: str, error: float, shape: str, tmp_path: Path) -> None:
    path = checkpoints.uniform("qwen3", tmp_path) if shape == "uniform" else checkpoints.per_layer("qwen3", tmp_path)
    want = tiny.logits(pared.load(path, dtype=torch.float32).eval())
    model = quantised(path, kind).eval()
    got = tiny.logits(model)
    assert 0 < float((got - want).norm() / want.norm()) < error
    ids = tiny.tokens(2, 8)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 12)


def agreement(model: PreTrainedModel, wanted: list[Request], got: list[list[int]]) -> float:
    """Share of tokens that the model, in fp32, would have chosen too."""
    same = total = 0
    for request, tokens in zip(wanted, got, strict=True):
        ids = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1].argmax(-1).tolist()
        same, total = same + sum(a == b for a, b in zip(best, tokens, strict=True)), total + len(tokens)
    return same / total


@pytest.mark.parametrize("scheme, least", [("W8A8", 0.95), ("W4A16", 0.8)])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_llm_compressors_checkpoints_are_served(
    scheme: str, least: float, shape: str, storyteller: Path, vllm: Engine, tmp_path: Path
) -> None:
    if not COMPRESSOR.exists():
        pytest.skip("llm-compressor's environment is not there: make vllm-test")
    path = tmp_path / "pruned"
    # Channels in multiples of 128, which is the group of W4A16.
    tiny.cut(storyteller, out=path, criterion="l2", structures=("ffn",), remove=0.1, align=128, shape=shape)
    described = describe(path)
    fits = {f["format"]: f["fits"] for f in formats(described.config, described.per_layer, described.layout)}
    assert fits["W8A8, FP8 in vLLM"] and fits["W4A16 in vLLM on a CPU"]
    model = pared.load(path, dtype=torch.float32).eval()
    starts = torch.randint(3, model.config.vocab_size, (32, 4), generator=torch.Generator().manual_seed(0))
    texts = model.generate(starts, max_new_tokens=92, do_sample=True, min_new_tokens=92)
    (tmp_path / "tokens.json").write_text(json.dumps(texts.tolist()))
    command = [COMPRESSOR, Path(__file__).parent / "compress.py", path, scheme, tmp_path / "tokens.json", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert weights < 0.8 * 4 * sum(p.numel() for p in model.parameters())
    wanted = [Request(row[:24], 24, arrives=i) for i, row in enumerate(texts.tolist())]
    assert agreement(model, wanted, vllm.serve(tmp_path / "out", wanted)) >= least
