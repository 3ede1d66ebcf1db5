"""What people do with a per-layer checkpoint in a transformers that knows nothing of pared: caches, Trainer, PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import pared
import tiny

# Full attention, windows in some layers, windows in all, positions learned, ALiBi, experts, layers without attention or MLP.
CASES: dict[str, tuple[str, ...]] = {
    "llama": ("kv", "query", "ffn"),
    "gemma3_text": ("kv", "query", "ffn"),
    "mistral": ("query", "ffn"),
    "gpt2": ("kv", "ffn"),
    "bloom": ("kv", "ffn"),
    "mixtral": ("kv",),
    "qwen3": ("attention", "mlp", "ffn"),
}

CHILD = """
import sys
sys.modules["pared"] = None  # an import of it would fail
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()

def logits(of):
    with torch.no_grad():
        return of(input_ids=ids, use_cache=False).logits

for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    saved = torch.load(path + "/../want.pt")
    ids, want = saved["ids"], saved["generated"]
    check(path, model, ids, want)
"""

CACHES = """
def check(path, model, ids, want):
    def generate(**settings):
        return model.generate(ids, max_new_tokens=10, do_sample=False, **settings)

    for attention in ("sdpa", "eager"):
        if attention == "eager" or model._supports_sdpa:
            model.set_attn_implementation(attention)
        assert torch.equal(generate(), want), (path, attention)
        assert torch.equal(generate(cache_implementation="dynamic"), want), (path, attention)
        assert torch.equal(generate(past_key_values=DynamicCache(config=model.config)), want), (path, attention)
        assert torch.equal(generate(past_key_values=DynamicCache()), want), (path, attention)
        if model._can_compile_fullgraph:  # else the family has no static cache
            assert torch.equal(generate(cache_implementation="static"), want), (path, attention)
            static = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 10)
            assert torch.equal(generate(past_key_values=static), want), (path, attention)
        # Sequences of unlike lengths at once: padding on the left changes no row.
        padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids[:, 3:]], dim=1)
        mask = (torch.arange(ids.shape[1]) >= 3).long().expand(2, -1)
        alone = model.generate(ids[:, 3:], max_new_tokens=6, do_sample=False)
        together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(together[:, 3:], alone), (path, attention)
"""

TRAINS = """
def check(path, model, ids, want):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = dict(use_cpu=True, max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no")
    before = logits(model)
    Trainer(model=model, args=TrainingArguments(output_dir=path + "/../run", **settings), train_dataset=rows).train()
    after = logits(model.eval())
    assert not torch.allclose(after, before, atol=1e-4)
    model.save_pretrained(path + "/../trained")
    again = AutoModelForCausalLM.from_pretrained(path + "/../trained", trust_remote_code=True)
    assert torch.allclose(logits(again), after, atol=1e-5)

    adapted = get_peft_model(again, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    changed = logits(adapted.eval())
    assert not torch.allclose(changed, after, atol=1e-4)
    adapted.save_pretrained(path + "/../adapter")
    base = AutoModelForCausalLM.from_pretrained(path + "/../trained", trust_remote_code=True)
    loaded = PeftModel.from_pretrained(base, path + "/../adapter").eval()
    assert torch.allclose(logits(loaded), changed, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), changed, atol=1e-4)
"""


def checkpoint(family: str, folder: Path) -> Path:
    source = tiny.save(tiny.model(family), folder / "dense")
    remove = 0.03 if family == "mixtral" else 0.3
    tiny.cut(source, out=folder / "out", structures=CASES[family], shape="per-layer", remove=remove)
    model = pared.load(folder / "out")
    ids = tiny.tokens(2, 9)
    generated = model.generate(ids, max_new_tokens=10, do_sample=False)
    torch.save({"ids": ids, "generated": generated}, folder / "want.pt")
    return folder / "out"


def run(code: str, paths: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", code + CHILD, *map(str, paths)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_cache_gives_the_same_tokens(tmp_path: Path) -> None:
    run(CACHES, [checkpoint(family, tmp_path / family) for family in CASES])


def test_trainer_and_peft_change_it_and_it_comes_back(tmp_path: Path) -> None:
    run(TRAINS, [checkpoint(family, tmp_path / family) for family in ("llama", "qwen3")])
