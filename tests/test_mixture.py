"""Whole layers go beside width only where that is measured to be better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import pared
import tiny
from pared.accounting import account
from pared.budget import Amount, Budget
from pared.budget.mixture import fewer_layers
from pared.budget.trials import Judges
from pared.calibration import Batch
from pared.compensate import compensate
from pared.modeling import blocks
from pared.plan import LayerPlan, Plan
from pared.proof import proved_layout
from pared.stream import Stream
from pared.surgery import cut_refitted
from pared.walk import Method

IDS = tiny.tokens(16, 24)
MIXED = ("layer", "kv", "query", "ffn")


def kl(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    p, q = (F.log_softmax(tiny.logits(m, ids).double(), -1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("gone", [[1], [1, 2], [0], [4]])
def test_a_trial_without_layers_is_the_model_without_them_bridged(gone: list[int]) -> None:
    model = tiny.model("llama", num_hidden_layers=5)
    layout = proved_layout(model.config)
    judges = Judges(Stream(model, layout), MIXED, [Batch(row[None], None) for row in IDS], 4)
    (found,) = judges.sequential([{i: {"layer": 0} for i in gone}], 1.0)
    now = account(layout)
    layers = [LayerPlan(source=i) for i in range(5) if i not in gone]
    plan = Plan(model_type="llama", before=now, after=now, layers=layers)
    method = Method(inputs=False, guarded=False)
    cut, _ = cut_refitted(model, layout, plan, compensate(Stream(model, layout), plan, judges.fit, method))
    ids = torch.cat([b.input_ids for b in judges.judged])
    assert abs(found - kl(model, cut, ids)) < 1e-4 * found


def settings(**more: Any) -> dict[str, Any]:
    return {"calibration": IDS, "structures": MIXED, "remove": 0.25, "dry_run": True, "align": 1, **more}


def test_layers_that_do_nothing_go_and_all_width_stays() -> None:
    model = tiny.model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for part in (blocks(model)[1][2].self_attn.o_proj, blocks(model)[1][2].mlp.down_proj):
            part.weight.zero_()
    # On text of its own, greedily chosen, a model is at its best: nothing that goes can lower the loss.
    own = model.generate(tiny.tokens(16, 1), max_length=24, do_sample=False, suppress_tokens=[0, 1, 2])
    plan = pared.prune(model, **settings(calibration=own)).plan
    assert [layer.source for layer in plan.layers] == [0, 1, 3] and not any(layer.keep for layer in plan.layers)


def test_where_every_layer_matters_the_plan_is_that_of_width_alone() -> None:
    """No residual stream to speak of: each layer's output is a hundred times what it is given, so none can be passed by."""
    model = tiny.model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for block in blocks(model)[1]:
            block.self_attn.o_proj.weight.mul_(10)
            block.mlp.down_proj.weight.mul_(10)
    mixed, width = (pared.prune(model, **settings(structures=s)).plan for s in (MIXED, MIXED[1:]))
    assert mixed.layers == width.layers and mixed.removed == width.removed


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_shapes_with_fewer_layers_meet_the_amount(share: float) -> None:
    budget = Budget(proved_layout(tiny.model("llama", num_hidden_layers=8).config), Amount(share), MIXED)
    found = fewer_layers(budget)
    assert [s.layers for s in found] == sorted({s.layers for s in found}, reverse=True) and found[0].layers < 8
    assert all(s.removed >= budget.target for s in found)
    assert len([s for s in found if not any(n < budget.full()[a] for a, n in s.sizes.items())]) <= 1


def test_quick_runs_score_layers_beside_second_order_width() -> None:
    result = pared.prune(tiny.model("llama", num_hidden_layers=4), **settings(effort="quick"))
    assert result.plan.provenance["recipe"]["criterion"] == "obs" and result.plan.removed >= 0.25
    assert result.scores is not None and (None, "layer") in result.scores.of
