"""Small checkpoints with a tokenizer, for tests that train."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
import tiny

WORDS = [f"w{i}" for i in range(tiny.VOCAB - 4)]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; opens each text with <s>."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "assistant": 3, **{w: i + 4 for i, w in enumerate(WORDS)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    built = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        built.chat_template = CHAT
    return built


def checkpoint(path: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    tiny.save(tiny.model(family, seed=seed, **changes), path)
    tokenizer().save_pretrained(path)
    return path


def pruned(dense: Path, out: Path, **settings: Any) -> Path:
    pared.prune(
        dense,
        out=out,
        calibration=tiny.tokens(),
        **{"criterion": "random", "compensate": "none", "remove": 0.3, "align": 1, **settings},
    )
    return out


def text(path: Path, documents: int = 40, *, seed: int = 0, low: int = 5, high: int = 30) -> Path:
    g = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(documents):
        size = int(torch.randint(low, high, (1,), generator=g))
        lines.append(" ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (size,), generator=g)))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def loaded(path: Path) -> PreTrainedModel:
    return pared.load(path, dtype=torch.float32)


def same_weights(one: Path, other: Path) -> bool:
    return tiny.equal_states(pared.load(one), pared.load(other))


def environment() -> dict[str, str]:
    src = Path(__file__).parents[1] / "src"
    return {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def models_in(root: Path) -> Path:
    """A dense model, a pruned one and a per-layer one, in a directory."""
    checkpoint(root / "dense")
    pruned(root / "dense", root / "pruned")
    pruned(root / "dense", root / "per-layer", shape="per-layer", allocate="global")
    return root
