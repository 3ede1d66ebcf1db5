"""Quantise after pruning: pruned models in llm-compressor's and torchao's formats, served by vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import pared
import tiny
from engine import Engine, Request, check_greedy, requests
from pared.report.formats import formats
from pared.report.inspection import describe

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
COMPRESSOR = ROOT / ".venv-llmcompressor" / "bin" / "python"


def agreement(model: PreTrainedModel, wanted: list[Request], got: list[list[int]]) -> float:
    """Share of tokens that the model, in fp32, would have chosen too."""
    same = total = 0
    for request, tokens in zip(wanted, got, strict=True):
        ids = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1].argmax(-1).tolist()
        same, total = same + sum(a == b for a, b in zip(best, tokens, strict=True)), total + len(tokens)
    return same / total


@pytest.fixture(scope="module", params=["uniform", "per-layer"])
def pruned(request: pytest.FixtureRequest, storyteller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint, and beside it text of its own."""
    folder = tmp_path_factory.mktemp("pruned")
    settings = {"criterion": "l2", "structures": ("ffn",), "remove": 0.1, "align": 64, "shape": request.param}
    tiny.cut(storyteller, out=folder / "model", **settings)
    model = pared.load(folder / "model", dtype=torch.float32).eval()
    starts = torch.randint(3, model.config.vocab_size, (32, 4), generator=torch.Generator().manual_seed(0))
    texts = model.generate(starts, max_new_tokens=92, do_sample=True, min_new_tokens=92)
    (folder / "tokens.json").write_text(json.dumps(texts.tolist()))
    return folder


@pytest.mark.parametrize(
    ("scheme", "form", "dtype", "least", "size"),
    [
        ("W8A8", "W8A8, FP8 in vLLM", "bfloat16", 0.95, 0.4),
        ("W4A16/64", "W4A16 in vLLM on a CPU", "bfloat16", 0.75, 0.3),  # no fp32 kernel on a CPU
    ],
)
def test_llm_compressors_checkpoints_are_served(
    scheme: str, form: str, dtype: str, least: float, size: float, pruned: Path, vllm: Engine, tmp_path: Path
) -> None:
    if not COMPRESSOR.exists():
        pytest.skip("llm-compressor's environment is not there: make vllm-test")
    described = describe(pruned / "model")
    assert {f["format"]: f["fits"] for f in formats(described.config, described.per_layer, described.layout)}[form]
    script = [COMPRESSOR, Path(__file__).parent / "compress.py"]
    command = [*script, pruned / "model", scheme, pruned / "tokens.json", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    model = pared.load(pruned / "model", dtype=torch.float32).eval()
    # Embeddings stay as they are, in fp32.
    embedded = 4 * model.get_input_embeddings().weight.numel()
    weights = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) - embedded
    assert weights < size * (4 * sum(p.numel() for p in model.parameters()) - embedded)
    texts = json.loads((pruned / "tokens.json").read_text())
    wanted = [Request(row[:24], 24, arrives=i) for i, row in enumerate(texts)]
    assert agreement(model, wanted, vllm.serve(tmp_path / "out", wanted, dtype=dtype)) >= least


@pytest.mark.parametrize("when", ["saved", "while loading"])
def test_torchaos_int8_is_served(when: str, pruned: Path, vllm: Engine, tmp_path: Path) -> None:
    """Written quantised by transformers, or quantised by vLLM as it reads: the tokens are those of transformers' own int8."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    how = Int8WeightOnlyConfig(version=2)
    settings = {"quantization_config": TorchAoConfig(how), "dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(pruned / "model", **settings, trust_remote_code=True).eval()
    path, engine = pruned / "model", {}
    if when == "saved":
        path = tmp_path / "int8"
        model.save_pretrained(path)
    else:
        text = json.dumps(config_to_dict(how))
        engine = {"quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": text}}
    wanted = requests(model.config.vocab_size, count=24)
    got = vllm.serve(path, wanted, **engine)
    assert got != vllm.serve(pruned / "model", wanted)
    assert check_greedy(model, wanted, got) > 100
