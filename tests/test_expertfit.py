"""Channels inside experts: what each expert keeps is refitted to the tokens that are sent to it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import pared
import tiny
from pared import expertfit
from pared.axes import Nested
from pared.calibration import Batch
from pared.compensate import compensate
from pared.plan import Plan
from pared.source import Source
from pared.stream import Stream, observed
from pared.surgery import cut_model
from pared.walk import Method

FAMILIES = ["mixtral-6", "qwen3_moe", "olmoe"]


def narrower(model: PreTrainedModel) -> Plan:
    """A plan by which experts lose channels, those with the least weights."""
    how = {"criterion": "l2", "compensate": "none", "structures": ("ffn",), "remove": 0.3, "align": 1}
    return pared.prune(model, calibration=tiny.tokens(), dry_run=True, **how).plan


def errors(family: str, mode: str) -> tuple[float, float]:
    """Of the outputs of all experts of layer 0 on the tokens that are sent to them: merely cut, and refitted."""
    model = tiny.model(family)
    source = Source.open(model)
    layer = next(i for i in range(3) if "expert" in source.layout.layer_sizes[i])
    axis = "expert_ffn" if "expert_ffn" in source.layout.keys else "ffn"
    assert source.layout.parents[axis] == "expert"
    batches = [Batch(rows, None) for rows in tiny.tokens(64, 24, seed=1).split(8)]
    plan = narrower(model)
    stream = Stream(model, source.layout)
    found = list(compensate(stream, plan, batches, Method(mode=mode)))
    ((name, axis),) = expertfit.stacks_of(source.layout, layer, plan.selection(layer, source.layout)).items()
    inputs: dict[int, list[torch.Tensor]] = {}
    # Before the first layer with experts nothing is cut in the mode that sees dense inputs.
    with stream.block(layer) as block, torch.no_grad():
        hidden = stream.embed(batches)
        for i in range(layer):
            with stream.block(i) as before:
                hidden = stream.through(before, i, hidden)
        with observed(block, [name], lambda n, a, e: inputs.setdefault(int(e or 0), []).append(a)):
            stream.through(block, layer, hidden)
        w = dict(block.named_parameters())[name].detach()
    dim = source.layout.consumers[f"{source.layout.prefix}.{layer}.{name}"]
    w = w if dim == 2 else w.transpose(1, 2)
    new = found[layer].tensors[name]
    new = new if dim == 2 else new.transpose(1, 2)
    keep = plan.selection(layer, source.layout)[axis]
    assert isinstance(keep, Nested) and len(inputs) == len(w)
    plain = refitted = 0.0
    for e, parts in inputs.items():
        a, kept = torch.cat(parts), keep.index[e]
        plain += float((a @ w[e].T - a[:, kept] @ w[e][:, kept].T).square().sum())
        refitted += float((a @ w[e].T - a[:, kept] @ new[e].T).square().sum())
    return plain, refitted


@pytest.mark.parametrize("family", FAMILIES)
def test_refitted_experts_give_more_of_what_they_gave(family: str) -> None:
    plain, refitted = errors(family, "refit")
    assert refitted < 0.95 * plain


def test_as_many_experts_at_once_as_there_is_room_for_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"calibration": tiny.tokens(32, 24), "structures": ("ffn",), "remove": 0.3, "align": 1, "batch": 4}
    at_once, one_by_one = (pared.prune(tiny.model("qwen3_moe"), **settings).model for _ in _rooms(monkeypatch))
    assert tiny.equal_states(at_once, one_by_one)


def _rooms(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    for room in (expertfit.ROOM, 1):
        monkeypatch.setattr(expertfit, "ROOM", room)
        yield room


def test_an_expert_that_no_token_visits_is_merely_cut() -> None:
    model = tiny.model("mixtral")
    source = Source.open(model)
    plan = narrower(model)
    cut = cut_model(model, source.layout, plan).state_dict()
    few = [Batch(tiny.tokens(1, 2), None)]  # two tokens, none of any expert's eighth
    refitted = list(compensate(Stream(model, source.layout), plan, few, Method(mode="refit", guarded=False)))
    for i, block in enumerate(refitted):
        for name in expertfit.stacks_of(source.layout, i, plan.selection(i, source.layout)):
            assert torch.allclose(block.tensors[name], cut[f"{source.layout.prefix}.{i}.{name}"])
