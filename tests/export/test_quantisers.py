"""Quantise after pruning, in transformers: torchao's int8 and bitsandbytes' NF4 weights of uniform and per-layer checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import pared
import tiny
from pared.report.formats import formats
from pared.report.inspection import describe

pytestmark = pytest.mark.llamacpp
pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

NF4 = "NF4 (bitsandbytes) on a CPU with AVX-512 BF16"
SHAPES = {"uniform": {"shape": "uniform"}, "per-layer": {"shape": "per-layer", "allocate": "global"}}


@pytest.fixture(scope="module", params=SHAPES)
def pruned(request: pytest.FixtureRequest, storyteller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / request.param
    tiny.cut(storyteller, out=out, criterion="l2", remove=0.2, align=64, **SHAPES[request.param])
    return out


def nf4(path: Path) -> PreTrainedModel:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    settings = {"quantization_config": how, "dtype": torch.float32, "device_map": "cpu", "trust_remote_code": True}
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


def int8(path: Path) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = pared.load(path, dtype=torch.float32).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    return model.eval()


def kl(p: Tensor, q: Tensor) -> float:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("quantise", "most"), [(int8, 1e-3), (nf4, 0.15)])
def test_a_pruned_checkpoint_stays_near_what_it_was(
    quantise: Callable[[Path], PreTrainedModel], most: float, pruned: Path
) -> None:
    whole = pared.load(pruned, dtype=torch.float32).eval()
    ids = whole.generate(torch.tensor([[1]]), max_new_tokens=63, do_sample=False)
    described = describe(pruned)
    assert {f["format"]: f["fits"] for f in formats(described.config, described.per_layer, described.layout)}[NF4]
    small = quantise(pruned)
    matrices = [m for n, m in small.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    assert len(matrices) == sum(isinstance(m, nn.Linear) and "lm_head" not in n for n, m in whole.named_modules())
    assert all(type(m.weight.data) is not Tensor or m.weight.dtype == torch.uint8 for m in matrices)
    assert 0 < kl(tiny.logits(whole, ids), tiny.logits(small, ids)) < most
    assert small.generate(ids[:, :8], max_new_tokens=8, do_sample=False).shape[1] == 16


def test_nf4_weights_are_saved_and_read_back(pruned: Path, tmp_path: Path) -> None:
    small, ids = nf4(pruned), tiny.tokens(2, 24)
    small.save_pretrained(tmp_path / "nf4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", trust_remote_code=True, dtype=torch.float32).eval()
    assert torch.equal(tiny.logits(again, ids), tiny.logits(small, ids))
