"""What goes whole is bridged by the consumer before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import pared
import tiny
from pared.calibration import Batch
from pared.compensate import compensate
from pared.modeling import blocks
from pared.plan import Plan
from pared.proof import proved_layout
from pared.stream import Stream
from pared.surgery import cut_model
from pared.walk import Method

IDS = tiny.tokens(8, 24)


def repaired(model: PreTrainedModel, plan: Plan, mode: str, **settings: Any) -> list[dict[str, Tensor]]:
    stream = Stream(model, proved_layout(model.config))
    return [r.tensors for r in compensate(stream, plan, [Batch(row[None], None) for row in IDS], Method(mode=mode, **settings))]


@pytest.mark.parametrize("gone", [1, 2])
def test_the_consumer_before_a_gap_is_the_least_squares_bridge(gone: int) -> None:
    """No other weights come nearer on calibration, and a map of the consumer's output (the usual repair) least of all."""
    model = tiny.model("llama", num_hidden_layers=4)
    layout = proved_layout(model.config)
    states = tiny.hidden_states(model, IDS)
    kept = [i for i in range(4) if not 1 <= i <= gone]
    new = repaired(model, tiny.skipping(layout, [[]] * 4, kept), "refit", guarded=False)[0]
    assert new.keys() == {"mlp.down_proj.weight"}
    block = blocks(model)[1][0]
    seen: list[Tensor] = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    tiny.hidden_states(model, IDS)
    handle.remove()
    a = seen[0].flatten(0, 1).double()
    m = a @ block.mlp.down_proj.weight.detach().double().T  # what the consumer gives
    rest = states[1].flatten(0, 1).double() - m
    aim = states[1 + gone].flatten(0, 1).double() - rest

    def error(w: Tensor) -> float:
        return float((a @ w.detach().T.double() - aim).square().sum())

    best = new["mlp.down_proj.weight"]
    folded = torch.linalg.lstsq(m, aim).solution.T @ block.mlp.down_proj.weight.detach().double()
    ridge = 1.05  # the refit is damped a little towards the original weights
    assert error(best) <= ridge * error(folded) < ridge * error(block.mlp.down_proj.weight)
    for seed in range(5):
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))
        assert error(best) < error(best + 0.05 * noise)


def test_an_mlp_that_goes_is_bridged_by_the_attention_before_it() -> None:
    model = tiny.model("llama")
    layout = proved_layout(model.config)
    plan = tiny.skipping(layout, [["mlp"], [], []])
    new = repaired(model, plan, "refit", guarded=False)
    assert new[0].keys() == {"self_attn.o_proj.weight"} and not new[1] and not new[2]
    states = tiny.hidden_states(model, IDS)
    plain = cut_model(model, layout, plan)
    off = [float((tiny.hidden_states(plain, IDS)[1] - states[1]).square().sum())]
    blocks(plain)[1][0].self_attn.o_proj.weight.data = new[0]["self_attn.o_proj.weight"]
    off.append(float((tiny.hidden_states(plain, IDS)[1] - states[1]).square().sum()))
    assert off[1] < off[0]


@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "sequential"), ("gpt2", "refit"), ("gemma2", "sequential"), ("phi3", "refit")]
)
def test_a_checkpoint_and_a_live_model_give_the_same_bits(family: str, mode: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    settings: dict[str, Any] = {
        "structures": ("attention", "mlp"),
        "shape": "per-layer",
        "remove": 0.4,
        "criterion": "taylor",
        "compensate": mode,
        "calibration": IDS,
    }
    live = pared.prune(model, **settings)
    pared.prune(tiny.save(model, tmp_path / "dense"), out=tmp_path / "out", **settings)
    assert live.plan.changes_blocks(proved_layout(model.config))
    assert tiny.equal_states(live.model, pared.load(tmp_path / "out"))


def test_nothing_is_bridged_where_nothing_goes() -> None:
    model = tiny.model("llama")
    assert not any(repaired(model, tiny.skipping(proved_layout(model.config), [[]] * 3), "sequential"))


def test_on_a_trained_model_the_bridge_helps(storyteller: Path) -> None:
    from transformers import AutoTokenizer

    from pared.evaluate.perplexity import Windows, logits_of, measure

    tokenizer = AutoTokenizer.from_pretrained(storyteller)
    dense = pared.load(storyteller, dtype=torch.float32)
    text = pared.calibration.sample_from_model(dense, tokenizer, 40, 96, 1)
    held = Windows(text[32:], torch.ones(8, dtype=torch.long), None, 8, text[32:].numel())
    kl = {}
    for mode in ("none", "refit", "sequential"):
        result = pared.prune(
            dense,
            calibration=text[:32],
            structures=("layer",),
            remove=0.15,
            compensate=mode,
            tokenizer=tokenizer,
            criterion="block_influence",
        )
        kl[mode] = measure(logits_of(result.model), held, against=logits_of(dense)).kl or 0.0
    assert max(kl["refit"], kl["sequential"]) < kl["none"], kl
