"""Per-layer checkpoints of families that derive things from the depth, the hidden size or a layer's number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
import tiny
from pared.modeling import hf_quiet

_SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}

# what follows from what -> (config class, settings, structures that go)
FORMS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "residuals scaled by the depth": ("MiniCPM3Config", {**_SMALL, **_LATENT, "intermediate_size": 48}, ("layer",)),
    "logits scaled by the hidden size": ("MiniCPM3Config", {**_SMALL, **_LATENT, "intermediate_size": 48}, ("hidden",)),
    "biases in the last layer only": ("GPTNeoXJapaneseConfig", _SMALL, ("layer",)),
    "experts in every other layer": (
        "Llama4TextConfig",
        {**_GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2, "head_dim": 8},
        ("layer",),
    ),
    "SSM heads tied to the hidden size": (
        "BambaConfig",
        {**_GROUPED, **_SSM, "attn_layer_indices": [1]},
        ("hidden",),
    ),
    "embeddings scaled by the hidden size": ("BioGptConfig", {**_SMALL, "intermediate_size": 48}, ("hidden",)),
    "rotary tables from a read-only head size": ("FalconConfig", {**_SMALL, "new_decoder_architecture": False}, ("hidden",)),
    "a norm over all heads": (
        "BitNetConfig",
        {**_GROUPED, "num_attention_heads": 8, "num_key_value_heads": 4},
        ("query", "kv"),
    ),
}

CHILD = """
import sys
sys.modules["pared"] = None  # an import of it would fail
import torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (path, info)
    saved = torch.load(path + "/../want.pt")
    with torch.no_grad():
        got = model(input_ids=saved["ids"], use_cache=False).logits
    assert torch.allclose(got, saved["logits"], atol=1e-5), (path, (got - saved["logits"]).abs().max())
    model.save_pretrained(path + "/../again")
    again = AutoModelForCausalLM.from_pretrained(path + "/../again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(input_ids=saved["ids"], use_cache=False).logits, got), path
"""


def dense(name: str) -> PreTrainedModel:
    kind, settings, _ = FORMS[name]
    with hf_quiet():
        built = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings), dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built


@pytest.mark.parametrize("name", FORMS)
def test_what_was_cut_is_written_loaded_and_cut_again(name: str, tmp_path: Path) -> None:
    source = tiny.save(dense(name), tmp_path / "dense")
    structures = FORMS[name][2]
    settings = {"structures": structures, "shape": "per-layer", "remove": 0.25 if structures == ("layer",) else 0.1}
    tiny.cut(source, out=tmp_path / "out", **settings)
    live = tiny.cut(pared.load(source), **settings).model
    assert torch.equal(tiny.logits(pared.load(tmp_path / "out")), tiny.logits(live))
    tiny.cut(tmp_path / "out", out=tmp_path / "twice", **settings)
    again = tiny.cut(pared.load(tmp_path / "out"), **settings).model
    assert torch.equal(tiny.logits(pared.load(tmp_path / "twice")), tiny.logits(again))


def test_stock_transformers_builds_them_from_the_file_they_carry(tmp_path: Path) -> None:
    paths = []
    for i, (name, (_, _, structures)) in enumerate(FORMS.items()):
        folder = tmp_path / str(i)
        source = tiny.save(dense(name), folder / "dense")
        remove = 0.25 if structures == ("layer",) else 0.1
        tiny.cut(source, out=folder / "out", structures=structures, shape="per-layer", remove=remove)
        ids = tiny.tokens(2, 8)
        torch.save({"ids": ids, "logits": tiny.logits(pared.load(folder / "out"), ids)}, folder / "want.pt")
        paths.append(str(folder / "out"))
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
