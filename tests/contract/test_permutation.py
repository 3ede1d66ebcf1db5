"""The order of units means nothing: a model whose channels and heads change places is pruned to the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from pared.modeling import blocks
from pared.proof import proved_layout

# Which of the orders below each tensor's entries follow, and along which dimension. Written from the families' own
# forward code, not from what pared finds out about them.
MOVES: dict[str, tuple[int, str]] = {
    "self_attn.q_proj.weight": (0, "heads"),
    "self_attn.q_proj.bias": (0, "heads"),
    "self_attn.q_norm.weight": (0, "heads"),
    "self_attn.k_proj.weight": (0, "groups"),
    "self_attn.k_proj.bias": (0, "groups"),
    "self_attn.k_norm.weight": (0, "groups"),
    "self_attn.v_proj.weight": (0, "groups"),
    "self_attn.v_proj.bias": (0, "groups"),
    "self_attn.qkv_proj.weight": (0, "fused"),
    "self_attn.o_proj.weight": (1, "heads"),
    "mlp.gate_proj.weight": (0, "ffn"),
    "mlp.gate_proj.bias": (0, "ffn"),
    "mlp.up_proj.weight": (0, "ffn"),
    "mlp.up_proj.bias": (0, "ffn"),
    "mlp.gate_up_proj.weight": (0, "pair"),
    "mlp.down_proj.weight": (1, "ffn"),
    "mlp.experts.gate_up_proj": (1, "pair"),
    "mlp.experts.down_proj": (2, "ffn"),
    "mlp.dense_h_to_4h.weight": (0, "ffn"),
    "mlp.dense_h_to_4h.bias": (0, "ffn"),
    "mlp.dense_4h_to_h.weight": (1, "ffn"),
    "mlp.c_fc.weight": (1, "ffn"),
    "mlp.c_fc.bias": (0, "ffn"),
    "mlp.c_proj.weight": (0, "ffn"),
}
STRUCTURES = {
    "bloom": None,
    "llama-mha": ("kv", "ffn"),
    "llama-mqa-tied": ("query", "ffn"),
    "gpt_neox": ("ffn",),
    "gpt2": ("ffn",),
}
FAMILIES = [f for f in tiny.FAMILIES if STRUCTURES.get(f, ()) is not None]


def shuffled(model: PreTrainedModel) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """The model with the units of every layer in another order, and for each layer and axis which unit is where now."""
    sizes = proved_layout(model.config).sizes_at(0)
    out, orders = copy.deepcopy(model), []
    attends = "kv" in proved_layout(model.config).keys
    for i, block in enumerate(blocks(out)[1]):
        generator = torch.Generator().manual_seed(i)
        ffn = torch.randperm(sizes["ffn"], generator=generator)
        kv = torch.randperm(sizes["kv"], generator=generator)
        wide = sizes["query"] * sizes["d"]
        heads = (kv[:, None] * wide + torch.arange(wide)).flatten()
        groups = (kv[:, None] * sizes["d"] + torch.arange(sizes["d"])).flatten()
        n, m = len(heads), len(groups)
        along = {
            "ffn": ffn,
            "pair": torch.cat([ffn, ffn + sizes["ffn"]]),
            "heads": heads,
            "groups": groups,
            "fused": torch.cat([heads, n + groups, n + m + groups]),
        }
        for name, p in block.named_parameters():
            if name in MOVES:
                dim, order = MOVES[name]
                # Norms of single heads have one head's size, and the same weights for all.
                if p.shape[dim] == len(along[order]) and (attends or not name.startswith("self_attn")):
                    p.data = p.data.index_select(dim, along[order])
        query = (kv[:, None] * sizes["query"] + torch.arange(sizes["query"])).flatten()
        orders.append({"ffn": ffn, "kv": kv, "query": query})
    return out, orders


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_units_have_shuffled_scores_and_the_same_result(family: str, shape: str) -> None:
    model = tiny.model(family)
    other, orders = shuffled(model)
    assert tiny.close(tiny.logits(other), tiny.logits(model)) and not tiny.equal_states(other, model)
    structures = STRUCTURES.get(family) or ("kv", "query", "ffn")
    remove = 0.5 if len(structures) > 1 else 0.3
    settings = {"criterion": "taylor", "structures": structures, "shape": shape, "remove": remove}
    one, two = tiny.cut(model, **settings), tiny.cut(other, **settings)
    assert one.scores is not None and two.scores is not None
    for (layer, axis), score in one.scores.of.items():
        assert layer is not None
        order = orders[layer][axis]
        rows = score.reshape(-1, len(order))  # one row, or one for each expert
        assert tiny.close(two.scores.of[layer, axis].reshape(rows.shape), rows[:, order])
    assert one.plan.after == two.plan.after
    assert tiny.close(tiny.logits(two.model), tiny.logits(one.model))
