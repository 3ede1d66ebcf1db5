"""Pruned checkpoints small enough to serve in a test, with heads of sizes that vLLM's attention on a CPU has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import tiny
from pared.accounting import account
from pared.plan import LayerPlan, Plan, to_ranges
from pared.proof import proved_layout
from pared.run import apply_plan
from pared.structure import Layout

_SIZES = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 96, "max_position_embeddings": 128}
_GQA = {**_SIZES, "num_key_value_heads": 4, "head_dim": 32}
# Families of tiny.FAMILIES -> settings at which they have heads of 32.
SIZES: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "llama-biases": _GQA,
    "mistral": _GQA,
    "qwen2": {k: v for k, v in _GQA.items() if k != "head_dim"},
    "qwen3": _GQA,
    "gemma": _GQA,
    "gemma2": {**_GQA, "query_pre_attn_scalar": 32},
    "gemma3_text": {**_GQA, "query_pre_attn_scalar": 32},
    "phi3": {k: v for k, v in _GQA.items() if k != "head_dim"},
    "glm": _GQA,
    "glm4": _GQA,
    "olmo2": {k: v for k, v in _GQA.items() if k != "head_dim"},
    "mixtral": _GQA,
    "gpt_neox": _SIZES,
    "gpt2": {k: v for k, v in _SIZES.items() if k != "intermediate_size"},
    "bloom": {k: v for k, v in _SIZES.items() if k != "intermediate_size"},
}


def model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model whose every part matters: where a family multiplies its embeddings, they are made smaller by as much.

    Left large, a tied embedding drowns the blocks, and each token is followed by itself whatever they do.
    """
    built = tiny.model(family, **{**SIZES[family], **changes})
    embedding, ids = built.get_input_embeddings(), tiny.tokens(1)
    with torch.no_grad():
        embedding.weight /= embedding(ids).norm() / embedding.weight[ids].norm()
    return built


def dense(family: str, folder: Path, **changes: Any) -> Path:
    return tiny.save(model(family, **changes), folder / f"{family}-dense")


def uniform(family: str, folder: Path, **changes: Any) -> Path:
    """A fifth less, in the family's own form."""
    out = folder / f"{family}-uniform"
    tiny.cut(dense(family, folder, **changes), out=out, remove=0.2)
    return out


def per_layer(family: str, folder: Path, *, multiple: int = 1, **changes: Any) -> Path:
    """No two layers alike: fewer KV groups in one, fewer query heads in another, and as many channels as come.

    multiple: of what all these numbers are.
    """
    source = dense(family, folder, **changes)
    layout = proved_layout(model(family, **changes).config)
    out = folder / f"{family}-per-layer"
    return apply_plan(source, plan_of(layout, [_layer(layout, i, multiple) for i in range(layout.num_layers)]), out)


def with_biases(family: str, folder: Path, *, shape: str = "per-layer") -> Path:
    """A fifth less, and biases where the family has none, fitted to random text."""
    out = folder / f"{family}-biases"
    settings = {"compensate": "sequential", "add_bias": True, "criterion": "wanda_sp", "allocate": "uniform", "align": 8}
    structures = ("kv",) if family == "mixtral" else ("ffn",)
    remove = 0.02 if family == "mixtral" else 0.2
    tiny.cut(dense(family, folder), out=out, shape=shape, structures=structures, remove=remove, **settings)
    return out


def without_parts(family: str, folder: Path, skips: Sequence[Sequence[str]], *, multiple: int = 1, **changes: Any) -> Path:
    """Layers of which some have no attention, no MLP, or neither, and the others sizes of their own."""
    changes = {"num_hidden_layers": len(skips), **changes}
    source = dense(family, folder, **changes)
    layout = proved_layout(model(family, **changes).config)
    layers = [LayerPlan(source=i, skip=list(s)) if s else _layer(layout, i, multiple) for i, s in enumerate(skips)]  # type: ignore[arg-type]
    return apply_plan(source, plan_of(layout, layers), folder / f"{family}-without-parts")


def plan_of(layout: Layout, layers: list[LayerPlan]) -> Plan:
    whole = account(layout)
    return Plan(model_type=layout.model_type, shape="per-layer", before=whole, after=whole, layers=layers)


def _layer(layout: Layout, i: int, multiple: int) -> LayerPlan:
    keep: dict[str, str | list[str]] = {}
    sizes = layout.sizes_at(i)
    proved = {a for a in ("kv", "query", "ffn") if a in sizes and a in layout.proofs and layout.proofs[a].holds}
    groups = sizes.get("kv", 0)
    if "kv" in proved and i % 3 == 0:
        groups = (sizes["kv"] - 1 - i % 2) // multiple * multiple
        keep["kv"] = some(sizes["kv"], groups, seed=i)
    if "query" in proved and sizes["query"] > 1 and i % 3 == 1:
        keep["query"] = [some(sizes["query"], 1, seed=10 * i + g) for g in range(groups)]
    if "ffn" in proved:
        width = sizes["ffn"] // (2 + i % 3) // 8 * 8
        if layout.parents.get("ffn") is not None:  # channels of each expert
            keep["ffn"] = [some(sizes["ffn"], width, seed=10 * i + e) for e in range(sizes[layout.parents["ffn"]])]
        else:
            keep["ffn"] = some(sizes["ffn"], (width + i) // multiple * multiple, seed=i)
    return LayerPlan(source=i, keep=keep)


def some(total: int, count: int, *, seed: int) -> str:
    """Random units to keep, as a plan says them."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return to_ranges(sorted(order[:count].tolist()))
