"""Each criterion against its own definition, computed by hand on a model that is resident."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import tiny
from pared.calibration import Batch
from pared.criteria import get_criterion
from pared.depth import Depth
from pared.estimate import estimate
from pared.modeling import blocks
from pared.proof import proved_layout
from pared.scores import Scores
from pared.stream import Stream

BATCHES = [Batch(tiny.tokens(3, 12)), Batch(tiny.tokens(2, 8, seed=4))]
SEQUENCES = [row[None] for batch in BATCHES for row in batch.input_ids]
D, QUERY = 4, 2  # of the tiny Llama
PARTS = {  # local name -> how its entries lie: units first, everything else after
    "ffn": {
        "mlp.gate_proj": lambda w: w,
        "mlp.up_proj": lambda w: w,
        "mlp.down_proj": lambda w: w.T,
    },
    "kv": {
        "self_attn.q_proj": lambda w: w.reshape(-1, QUERY * D * w.shape[1]),
        "self_attn.k_proj": lambda w: w.reshape(-1, D * w.shape[1]),
        "self_attn.v_proj": lambda w: w.reshape(-1, D * w.shape[1]),
        "self_attn.o_proj": lambda w: w.T.reshape(-1, QUERY * D * w.shape[0]),
    },
    "query": {
        "self_attn.q_proj": lambda w: w.reshape(-1, D * w.shape[1]),
        "self_attn.o_proj": lambda w: w.T.reshape(-1, D * w.shape[0]),
    },
}
CONSUMER = {"ffn": "mlp.down_proj", "kv": "self_attn.o_proj", "query": "self_attn.o_proj"}
WIDE = {"ffn": 1, "kv": QUERY * D, "query": D}


def scores(model: PreTrainedModel, name: str, axes: tuple[str, ...], **options: Any) -> Scores:
    return estimate(Stream(model, proved_layout(model.config)), get_criterion(name), axes, BATCHES, **options)


def loss_sum(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def mean_loss(model: PreTrainedModel, batches: list[Batch] = BATCHES) -> Tensor:
    tokens = sum(b.input_ids[:, 1:].numel() for b in batches)
    return sum((loss_sum(model, b.input_ids) for b in batches), torch.zeros(())) / tokens


@pytest.mark.parametrize("axis", PARTS)
def test_taylor_vector_is_the_slope_of_the_loss_by_finite_differences(axis: str) -> None:
    """d loss / d s where one tensor's part of one structure is scaled by 1 + s, in float64, summed over tensors."""
    model = tiny.model("llama")
    found = scores(model, "taylor-vector", (axis,))
    exact, step = in_float64(tiny.model("llama")), 1e-4
    for layer, unit in ((0, 0), (1, 3), (2, 1)):
        want = 0.0
        for name, units_first in PARTS[axis].items():
            weight = blocks(exact)[1][layer].get_submodule(name).weight
            change = torch.zeros_like(units_first(weight.detach())).contiguous()
            change[unit] = units_first(weight.detach())[unit]
            loss = []
            for sign in (1, -1):
                with torch.no_grad():
                    before = weight.clone()
                    weight.add_(as_weight(change, axis, name, weight), alpha=sign * step)
                    loss.append(float(mean_loss(exact)))
                    weight.copy_(before)
            want += abs(loss[0] - loss[1]) / (2 * step)
        assert abs(float(found.of[layer, axis][unit]) - want) <= 1e-5 * max(want, 1e-2)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """All of it: transformers' norms go through fp32 whatever the weights are."""

    def norm(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return module.weight * args[0] * torch.rsqrt(args[0].square().mean(-1, keepdim=True) + module.variance_epsilon)  # type: ignore[operator]

    for name, module in model.double().named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_hook(norm)
    return model


def as_weight(units_first: Tensor, axis: str, name: str, weight: Tensor) -> Tensor:
    """The reverse of PARTS."""
    by_column = name.endswith(("down_proj", "o_proj"))
    return units_first.reshape(-1, weight.shape[0]).T if by_column else units_first.reshape(weight.shape)


@pytest.mark.parametrize("axis", PARTS)
def test_the_taylor_family_follows_from_gradients_of_single_sequences(axis: str) -> None:
    model = tiny.model("llama")
    model.zero_grad()
    mean_loss(model).backward()
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    fisher = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for ids in SEQUENCES:
        model.zero_grad()
        (loss_sum(model, ids) / (ids.shape[1] - 1)).backward()
        for n, p in model.named_parameters():
            fisher[n] += p.grad.square() / len(SEQUENCES)  # type: ignore[union-attr]
    found = {name: scores(model, name, (axis,)) for name in ("taylor", "taylor-second", "taylor-mixed")}
    for layer in range(3):
        total = dict.fromkeys(found, torch.zeros(()))
        for name, units_first in PARTS[axis].items():
            full = f"model.layers.{layer}.{name}.weight"
            w, g, f = (units_first(t.detach()) for t in (model.get_parameter(full), first[full], fisher[full]))
            total["taylor"] = total["taylor"] + (w * g).abs().sum(1)
            total["taylor-second"] = total["taylor-second"] + (w * w * f).sum(1) / 2
            total["taylor-mixed"] = total["taylor-mixed"] + (w * g - w * w * f / 2).abs().sum(1)
        for name, want in total.items():
            assert tiny.close(found[name].of[layer, axis], want), name


@pytest.mark.parametrize("axis", PARTS)
def test_activation_criteria_follow_from_what_enters_the_consumer(axis: str) -> None:
    model = tiny.model("llama")
    found = {name: scores(model, name, (axis,)) for name in ("wanda_sp", "flap", "minitron")}
    for layer in range(3):
        module, entered = blocks(model)[1][layer].get_submodule(CONSUMER[axis]), []
        handle = module.register_forward_pre_hook(lambda m, args, to=entered: to.append(args[0].detach().flatten(0, 1)))
        for batch in BATCHES:
            tiny.logits(model, batch.input_ids)
        handle.remove()
        x, w = torch.cat(entered), module.weight.detach()
        want = {
            "wanda_sp": w.abs().sum(0) * x.norm(dim=0),
            "flap": x.var(0) * w.square().sum(0),
            "minitron": x.abs().mean(0),
        }
        for name, channels in want.items():
            assert tiny.close(found[name].of[layer, axis], channels.reshape(-1, WIDE[axis]).sum(1)), name


@pytest.mark.parametrize("axis", PARTS)
def test_magnitudes_are_norms_of_the_group(axis: str) -> None:
    model = tiny.model("llama")
    for name, power in (("l1", 1), ("l2", 2)):
        found = scores(model, name, (axis,))
        for layer in range(3):
            parts = (f(blocks(model)[1][layer].get_submodule(n).weight.detach()) for n, f in PARTS[axis].items())
            assert tiny.close(found.of[layer, axis], sum((p.abs() ** power).sum(1) for p in parts))  # type: ignore[arg-type]


def test_channels_of_experts_are_scored_in_each_expert() -> None:
    model = tiny.model("mixtral")
    found = scores(model, "l2", ("ffn",))
    for layer, block in enumerate(blocks(model)[1]):
        gate, up = block.mlp.experts.gate_up_proj.detach().chunk(2, dim=1)
        down = block.mlp.experts.down_proj.detach()
        want = gate.square().sum(2) + up.square().sum(2) + down.square().sum(1)
        assert tiny.close(found.of[layer, "ffn"], want.flatten())


def test_hidden_channels_are_scored_by_what_all_blocks_hold_of_them() -> None:
    model = tiny.model("llama")
    want = torch.zeros(model.config.hidden_size)
    for block in blocks(model)[1]:
        for name, p in block.named_parameters():
            along = 0 if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")) else 1
            want += p.detach().abs().transpose(0, along if p.ndim == 2 else 0).reshape(len(want), -1).sum(1)
    assert tiny.close(scores(model, "l1", ("hidden",)).of[None, "hidden"], want)


def without(model: PreTrainedModel, gone: set[int], batches: list[Batch] = BATCHES) -> float:
    """Mean loss where some layers hand on what they are given."""

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    handles = [blocks(model)[1][i].register_forward_hook(skip, with_kwargs=True) for i in gone]
    with torch.no_grad():
        loss = float(mean_loss(model, batches))
    for handle in handles:
        handle.remove()
    return loss


@pytest.mark.parametrize("wanted", [1, 3, 99])
def test_the_perplexity_criterion_measures_again_after_each_removal(wanted: int) -> None:
    model = tiny.model("llama", num_hidden_layers=6)
    gone: list[int] = []
    for _ in range(min(wanted, 5)):
        losses = {i: without(model, {*gone, i}) for i in range(6) if i not in gone}
        gone.append(min(losses, key=lambda i: losses[i]))
    found = scores(model, "perplexity", ("layer",), depth=Depth(wanted)).of[None, "layer"]
    assert found.argsort()[: len(gone)].tolist() == gone
    for i in set(range(6)) - set(gone):
        assert abs(float(found[i]) - losses[i]) < 1e-5


def test_the_search_goes_as_far_as_layers_really_go() -> None:
    model = tiny.model("llama", num_hidden_layers=6, vocab_size=640)  # half of it is embeddings: a fifth is two layers and more
    ids = tiny.tokens(4, 12)
    plan = tiny.cut(
        model, structures=("layer",), criterion="perplexity", of="params", remove=0.3, calibration=ids, dry_run=True
    ).plan
    gone: list[int] = []
    while len(gone) < 6 - len(plan.layers):
        losses = {i: without(model, {*gone, i}, [Batch(ids)]) for i in range(6) if i not in gone}
        gone.append(min(losses, key=lambda i: losses[i]))
    assert len(gone) > 3 and sorted(gone) == sorted(set(range(6)) - {layer.source for layer in plan.layers})


def test_block_influence_is_how_far_a_layer_turns_its_input() -> None:
    model = tiny.model("llama")
    found = scores(model, "block_influence", ("layer",)).of[None, "layer"]
    for layer, block in enumerate(blocks(model)[1]):
        cosines: list[Tensor] = []

        def look(m: nn.Module, args: tuple[Tensor], out: Tensor, to: list[Tensor] = cosines) -> None:
            to.append(F.cosine_similarity(args[0], out, dim=-1).flatten())

        handle = block.register_forward_hook(look)
        for batch in BATCHES:
            tiny.logits(model, batch.input_ids)
        handle.remove()
        assert abs(float(found[layer]) - (1 - float(torch.cat(cosines).mean()))) < 1e-6
