"""Per-layer checkpoints in a transformers that knows nothing of pared: the modelling file that they carry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pared
import tiny
from pared.per_layer import split
from pared.remote_code import FILE

# family -> what is removed. Heads tied to the hidden size, ALiBi, learned positions, biases, experts, tied
# embeddings, sublayers.
CASES: dict[str, tuple[str, ...]] = {
    "llama": ("kv", "query", "ffn"),
    "gemma2": ("query", "ffn"),
    "mixtral": ("kv",),
    "gpt2": ("kv", "ffn"),
    "gpt_neox": ("hidden",),
    "bloom": ("kv", "ffn"),
    "qwen3": ("attention", "mlp", "ffn"),
    "mistral": ("kv", "ffn"),
}
# Biases that the family does not have.
SETTINGS: dict[str, dict[str, Any]] = {"mistral": {"compensate": "bias"}, "mixtral": {"remove": 0.03}}

CHILD = """
import sys
sys.modules["pared"] = None  # an import of it would fail
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    saved = torch.load(path + "/../want.pt")
    ids = saved["ids"]
    with torch.no_grad():
        # The other process may use another number of threads.
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, saved["logits"], atol=1e-5), path
    cached, plain = (model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain) and torch.equal(cached, saved["generated"]), path
    eager = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        assert torch.allclose(eager(input_ids=ids, use_cache=False).logits, saved["logits"], atol=1e-4), path
    static = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, cached), path
    model.save_pretrained(path + "/../again")
    again = AutoModelForCausalLM.from_pretrained(path + "/../again", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    loss = again(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad and p.numel()), path
    fresh = type(model)(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
"""


def test_stock_transformers_builds_it_from_the_file_it_carries(tmp_path: Path) -> None:
    paths = []
    for family, structures in CASES.items():
        folder = tmp_path / family
        source = tiny.save(tiny.model(family), folder / "dense")
        settings = {"remove": 0.3, **SETTINGS.get(family, {})}
        tiny.cut(source, out=folder / "out", structures=structures, shape="per-layer", **settings)
        assert split(pared.load(folder / "out").config.to_dict())[1], "the layers of this result are all alike"
        model = pared.load(folder / "out")
        ids = tiny.tokens(2, 8)
        generated = model.generate(ids, max_new_tokens=6, do_sample=False)
        torch.save({"ids": ids, "logits": tiny.logits(model, ids), "generated": generated}, folder / "want.pt")
        paths.append(str(folder / "out"))
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_a_pruned_checkpoint_trains_as_an_adapter_and_saves(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = tiny.save(tiny.model(family), tmp_path / "dense")
    tiny.cut(source, out=tmp_path / "out", structures=CASES[family], shape="per-layer", remove=0.3)
    model = pared.load(tmp_path / "out")
    names = {"bloom": ["query_key_value", "dense"], "gpt2": ["c_attn", "c_proj"]}[family]
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=names, r=2, fan_in_fan_out=family == "gpt2"))
    before = tiny.logits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
        optimizer.step()
    assert not torch.equal(tiny.logits(adapted), before)


def test_the_file_is_read_before_it_is_run(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("bloom"), tmp_path / "dense")
    tiny.cut(source, out=tmp_path / "out", structures=("kv",), shape="per-layer", remove=0.1)
    text = (tmp_path / "out" / FILE).read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "copy", "inspect", "collections", "typing", "torch", "transformers"}
