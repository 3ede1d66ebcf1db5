"""Which channels each expert keeps: those that second-order selection on its own tokens finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pared
import pared.errors
import tiny
from pared import expertfit
from pared.accounting import account
from pared.axes import Nested
from pared.calibration import Batch
from pared.compensate import compensate
from pared.leastsquares import DAMPING
from pared.plan import Plan, layer_plan
from pared.source import Source
from pared.stream import Stream, observed
from pared.walk import Method

# family -> (the channels inside experts, settings)
FAMILIES = {"mixtral": ("ffn", {"intermediate_size": 8}), "qwen3_moe": ("expert_ffn", {"moe_intermediate_size": 8})}


def inputs(stream: Stream, layer: int, name: str, batches: list[Batch]) -> dict[int, Tensor]:
    """What enters a stack of matrices, by the expert: all but the tokens that are held out."""
    found: dict[int, list[Tensor]] = {}

    def see(_: str, a: Tensor, expert: int | None) -> None:
        found.setdefault(int(expert or 0), []).append(a[torch.arange(len(a)) % expertfit.HELD_OUT != expertfit.HELD_OUT - 1])

    hidden = stream.embed(batches)
    for i in range(layer):
        with stream.block(i) as block, torch.no_grad():
            hidden = stream.through(block, i, hidden)
    with stream.block(layer) as block, torch.no_grad(), observed(block, [name], see):
        stream.through(block, layer, hidden)
    return {e: torch.cat(parts) for e, parts in found.items()}


def left_by_the_best_refit(a: Tensor, w: Tensor, gone: int) -> float:
    """min over W' of E||W a - W' a_S||^2 + ridge ||W' - W||^2 without one channel, from the tokens [tokens, n] themselves."""
    a, w = a.double(), w.double()
    c = a.T @ a / len(a)
    c += DAMPING * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    stay = torch.tensor([j for j in range(len(c)) if j != gone])
    rest = c[gone, gone] - c[gone, stay] @ torch.linalg.solve(c[stay][:, stay], c[stay, gone])
    return float(w[:, gone].square().sum() * rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_loses_the_channel_that_trying_every_one_finds(family: str) -> None:
    axis, settings = FAMILIES[family]
    model = tiny.model(family, **settings)
    source = Source.open(model)
    layer = next(i for i, own in enumerate(source.layout.layer_sizes) if axis in own)
    sizes = source.layout.sizes_at(layer)
    first = Nested("expert", torch.arange(sizes[axis] - 1).expand(sizes["expert"], -1))
    layers = [layer_plan(i, {axis: first} if i == layer else {}, source.layout.sizes_at(i)) for i in range(3)]
    now = account(source.layout)
    plan = Plan(model_type=source.layout.model_type, before=now, after=now, layers=layers)
    batches = [Batch(rows, None) for rows in tiny.tokens(48, 24, seed=1).split(8)]
    stream = Stream(model, source.layout)
    done = list(compensate(stream, plan, batches, Method(reselect=frozenset({axis}), inputs=False)))[layer]
    ((name, _),) = expertfit.stacks_of(source.layout, layer, {axis: first}).items()
    w = model.get_parameter(f"{source.layout.prefix}.{layer}.{name}").detach()
    kept = plan.with_layer(layer, done.layer).selection(layer, source.layout)[axis]
    assert isinstance(kept, Nested)
    seen = inputs(stream, layer, name, batches)
    assert len(seen) == sizes["expert"]
    for e, a in seen.items():
        costs = [left_by_the_best_refit(a, w[e], j) for j in range(sizes[axis])]
        assert kept.index[e].tolist() == [j for j in range(sizes[axis]) if j != costs.index(min(costs))]
    assert done.tensors[name].shape[2] == sizes[axis] - 1


def test_costs_are_those_of_single_removals_and_count_tokens() -> None:
    model = tiny.model("mixtral", intermediate_size=8)
    source = Source.open(model)
    stream = Stream(model, source.layout)
    batches = [Batch(rows, None) for rows in tiny.tokens(48, 24, seed=1).split(8)]
    hidden = stream.embed(batches)
    name = next(n for n in expertfit.stacks_of(source.layout, 0, {"ffn": Nested("expert", torch.zeros(0, 0))}))
    with stream.block(0) as block, torch.no_grad():
        costs = expertfit.removal_costs(stream, block, 0, name, hidden)
        seen: dict[int, list[Tensor]] = {}
        with observed(block, [name], lambda _, a, e: seen.setdefault(int(e or 0), []).append(a)):
            stream.through(block, 0, hidden)
        w = dict(block.named_parameters())[name].detach()
    total = sum(b.input_ids.numel() for b in batches)
    assert costs.shape == (len(w), 8)
    for e, parts in seen.items():
        a = torch.cat(parts)
        alone = torch.tensor([left_by_the_best_refit(a, w[e], j) for j in range(8)])
        # The first to go costs what it costs alone.
        assert int(costs[e].argmin()) == int(alone.argmin())
        assert float(costs[e].min()) == pytest.approx(float(alone.min()) * len(a) / total, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_narrowed_by_second_order_selection_are_written_as_they_are_made(family: str, tmp_path: Path) -> None:
    axis, _ = FAMILIES[family]
    model = tiny.model(family)
    settings = {"calibration": tiny.tokens(32, 24), "structures": ("ffn",), "remove": 0.3, "align": 1, "criterion": "obs"}
    live = pared.prune(model, **settings)
    written = pared.prune(tiny.save(model, tmp_path / "dense"), out=tmp_path / "out", **settings)
    assert tiny.equal_states(pared.load(tmp_path / "out"), live.model) and written.plan.layers == live.plan.layers
    layout = Source.open(model).layout
    layer = next(i for i, own in enumerate(layout.layer_sizes) if axis in own)
    kept = live.plan.selection(layer, layout)[axis]
    assert isinstance(kept, Nested) and len({tuple(row) for row in kept.index.tolist()}) > 1, "each expert has its own"
    cut = pared.prune(model, **{**settings, "compensate": "none"})
    assert live.plan.after == cut.plan.after and live.plan.removed >= 0.3


def test_weighted_selection_inside_experts_is_refused_with_what_does_it() -> None:
    with pytest.raises(pared.errors.UsageError, match="weighted second-order selection"):
        pared.prune(tiny.model("mixtral"), calibration=tiny.tokens(), structures=("ffn",), criterion="obs-fisher", remove=0.2)
