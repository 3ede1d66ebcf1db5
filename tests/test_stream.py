"""Running block by block: what the whole model computes at once, its logits, losses, gradients and inputs of matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import tiny
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.criteria import Criterion, Group, Stats
from pared.estimate import estimate
from pared.gradients import forward_with_loss, walk_back
from pared.modeling import blocks
from pared.proof import proved_layout
from pared.stream import Stream

DIFFERENTIATED = ["llama", "llama-biases", "gemma2", "gpt2", "bloom", "gpt_neox", "phi3", "mixtral"]
BATCHES = [Batch(tiny.tokens(3, 14)), Batch(tiny.tokens(2, 9, seed=4)), Batch(tiny.tokens(1, 14, seed=5))]


def stream_of(model: PreTrainedModel, path: Path | None = None) -> Stream:
    """From the live model, or from its checkpoint written to `path`."""
    layout = proved_layout(model.config)
    return Stream(model if path is None else Checkpoint.open(tiny.save(model, path)), layout)


def observed(model: PreTrainedModel, needs: Any, axes: tuple[str, ...]) -> dict[tuple[int, str], tuple[Group, Stats]]:
    """What a criterion of that kind gets to see of every layer and axis."""
    seen: dict[tuple[int, str], tuple[Group, Stats]] = {}

    def look(group: Group, stats: Stats) -> Tensor:
        seen[group.layer or 0, group.axis] = group, stats
        return torch.zeros(group.units)

    estimate(stream_of(model), Criterion("look", look, needs, "", None, False, ""), axes, BATCHES)
    return seen


def mean_loss(model: PreTrainedModel) -> Tensor:
    """Over every predicted token of every batch, by the whole model at once."""
    total, count = torch.zeros(()), 0
    for batch in BATCHES:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum")
        count += logits.shape[0] * logits.shape[1]
    return total / count


@pytest.mark.parametrize("where", ["live", "disk"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_block_by_block_is_the_whole_model(family: str, where: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    stream = stream_of(model, None if where == "live" else tmp_path / "model")
    long = [Batch(tiny.tokens(2, 3 * tiny.WINDOW)), Batch(tiny.tokens(1, 5))]
    with torch.no_grad():
        hidden = stream.forward(long)
        with stream.outside(front=False):
            got = [stream.logits(h) for h in hidden]
    for batch, logits in zip(long, got, strict=True):
        assert tiny.close(logits, tiny.logits(model, batch.input_ids))


@pytest.mark.parametrize("family", ["llama", "llama-mqa-tied", "mixtral", "gpt2"])
def test_a_streamed_checkpoint_holds_one_block_at_a_time(family: str, tmp_path: Path) -> None:
    stream = stream_of(tiny.model(family), tmp_path / "model")

    def resident() -> set[int]:
        return {i for i, b in enumerate(blocks(stream.model)[1]) if any(not p.is_meta for p in b.parameters())}

    def look(i: int, block: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
        assert resident() == {i}
        return [stream.run(block, i, h) for h in hidden]

    stream.forward(BATCHES, look)
    assert resident() == set() and all(p.is_meta for p in stream.model.parameters())


@pytest.mark.parametrize("family", DIFFERENTIATED)
def test_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    loss = mean_loss(model)
    loss.backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    stream = stream_of(model, tmp_path / "model")
    state = forward_with_loss(stream, BATCHES)
    assert abs(state.loss - float(loss.detach())) < 1e-5
    seen = set()

    def compare(i: int, block: nn.Module, found: Any) -> None:
        for local, got in found.first.items():
            name = f"{stream.layout.prefix}.{i}.{local}"
            seen.add(name)
            assert tiny.close(got, want[name]), name  # type: ignore[arg-type]

    walk_back(stream, BATCHES, state, compare)
    assert seen == {n for n in want if stream.layout.layer_of(n) is not None}


@pytest.mark.parametrize(
    ("family", "spared"),
    [("llama", "mlp.down_proj.weight"), ("gpt_neox", "mlp.dense_4h_to_h.weight"), ("gemma2", None), ("mixtral", None)],
)
def test_a_product_is_spared_only_where_its_value_is_only_added(family: str, spared: str | None) -> None:
    model = tiny.model(family)
    stream = stream_of(model)
    state = forward_with_loss(stream, BATCHES)
    assert state.last == [spared] * stream.num_layers
    before = {n: m.forward for n, m in model.named_modules()}
    walk_back(stream, BATCHES, state, lambda i, block, found: None)
    assert {n: m.forward for n, m in model.named_modules()} == before


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_squared_gradients_are_the_mean_over_sequences_alone(family: str) -> None:
    model = tiny.model(family)
    sequences = [row[None] for batch in BATCHES for row in batch.input_ids]
    want: dict[str, Tensor] = {}
    for ids in sequences:
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, ids[0, 1:]).backward()
        for name, p in model.named_parameters():
            grad = p.grad if p.grad is not None else torch.zeros_like(p)
            want[name] = want.get(name, torch.zeros_like(p)) + grad.square() / len(sequences)
    model.zero_grad()
    stream = stream_of(model)

    def compare(i: int, block: nn.Module, found: Any) -> None:
        for local, got in found.squared.items():
            assert tiny.close(got, want[f"{stream.layout.prefix}.{i}.{local}"]), local

    walk_back(stream, BATCHES, forward_with_loss(stream, BATCHES), compare, squared=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_moments_are_those_of_what_enters_each_matrix(family: str) -> None:
    model = tiny.model(family)
    axes = ("ffn",) if family == "gpt2" else ("kv", "ffn")
    entered: dict[tuple[int, str], list[Tensor]] = {}
    seen = observed(model, "activations", axes)
    for (layer, axis), (group, _) in seen.items():
        (name,) = group.inputs
        module = blocks(model)[1][layer].get_submodule(name.removesuffix(".weight"))

        def keep(_: nn.Module, args: tuple[Tensor], key: tuple[int, str] = (layer, axis)) -> None:
            entered.setdefault(key, []).append(args[0].detach().flatten(0, 1))

        module.register_forward_pre_hook(keep)
    for batch in BATCHES:
        tiny.logits(model, batch.input_ids)
    assert seen.keys() == entered.keys()
    for key, (group, stats) in seen.items():
        x, moments = torch.cat(entered[key]).double(), stats.moments[next(iter(group.inputs))]
        assert int(moments.count) == len(x) == sum(b.input_ids.numel() for b in BATCHES)
        assert tiny.close(moments.total, x.sum(0)) and tiny.close(moments.absolute, x.abs().sum(0))
        assert tiny.close(moments.norm.double(), x.norm(dim=0)) and tiny.close(moments.variance.double(), x.var(0))


def test_every_expert_sees_the_tokens_that_are_routed_to_it() -> None:
    model = tiny.model("mixtral")
    seen = observed(model, "activations", ("ffn",))
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks(model)[1]]
    for layer, block in enumerate(blocks(model)[1]):
        block.mlp.experts.register_forward_pre_hook(lambda m, args, at=layer: calls[at].append((args[0], args[1])))
    for batch in BATCHES:
        tiny.logits(model, batch.input_ids)
    for layer, block in enumerate(blocks(model)[1]):
        moments = seen[layer, "ffn"][1].moments["mlp.experts.down_proj"]
        pairs, down = block.mlp.experts.gate_up_proj.detach(), block.mlp.experts.down_proj
        assert moments.count.shape == (down.shape[0], 1) and moments.total.shape == (down.shape[0], down.shape[2])
        for expert in range(len(pairs)):
            routed = [h.flatten(0, -2)[(chosen == expert).any(-1).flatten()] for h, chosen in calls[layer]]
            gate, up = (torch.cat(routed) @ pairs[expert].T).chunk(2, dim=-1)
            x = (F.silu(gate) * up).double()
            assert int(moments.count[expert]) == len(x) > 0
            assert tiny.close(moments.absolute[expert], x.abs().sum(0)) and tiny.close(
                moments.square[expert], x.square().sum(0)
            )
