"""A rotated model is the same model, and what is left of it after the cut is what its energy says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
import tiny
from pared.accounting import account
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.errors import ModelError, UsageError
from pared.plan import LayerPlan, Plan, to_ranges
from pared.proof import proved_layout
from pared.rotation import Rotation, find_rotation
from pared.run import apply_plan
from pared.source import Source
from pared.stream import Stream
from pared.surgery import cut_refitted
from pared.verify import verify

IDS = tiny.tokens(8, 24)
TURNS = ["llama", "llama-biases", "llama-mqa-tied", "mistral", "qwen2", "qwen3", "gemma", "phi3", "glm"]


def rotation_of(model: PreTrainedModel) -> Rotation:
    return find_rotation(Stream(model, proved_layout(model.config)), [Batch(IDS, None)], lambda *a: None)


def turned(model: PreTrainedModel, basis: Rotation, kept: int) -> PreTrainedModel:
    layout = Source.open(model).untied().layout
    now = account(layout)
    plan = Plan(
        model_type=layout.model_type,
        before=now,
        after=now,
        hidden=to_ranges(range(kept)),
        rotated=True,
        layers=[LayerPlan(source=i) for i in range(layout.num_layers)],
    )
    return cut_refitted(model, layout, plan, None, lambda read: basis.reader(layout, read, kept))[0]


@pytest.mark.parametrize("family", TURNS)
def test_a_rotation_changes_no_logit(family: str) -> None:
    model = tiny.model(family)
    basis = rotation_of(model)
    d = model.config.hidden_size
    assert torch.allclose(basis.basis.T @ basis.basis, torch.eye(d, dtype=torch.float64), atol=1e-10)
    assert bool((basis.energy.diff() <= 0).all()) and abs(float(basis.energy.sum()) - 1) < 1e-9
    same = turned(model, basis, d)
    assert tiny.close(tiny.logits(same), tiny.logits(model), 1e-4)
    assert not tiny.close(same.get_input_embeddings().weight, model.get_input_embeddings().weight, 1e-2)


def test_channels_without_energy_cost_nothing() -> None:
    """A stream that lives in a subspace, however it lies, is cut to it exactly: the norms' mean over fewer channels counts."""
    model = tiny.model("llama")
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(7))).Q[:, :20]
    inside = q @ q.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ inside)
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.copy_(inside @ part.weight)
    basis = rotation_of(model)
    assert float(basis.energy[20:].sum()) < 1e-6
    assert tiny.close(tiny.logits(turned(model, basis, 20)), tiny.logits(model), 1e-3)


@pytest.mark.parametrize(
    ("family", "why"),
    [("gpt2", "norm"), ("gpt_neox", "norm"), ("gemma2", "written to the stream"), ("olmo2", "norm"), ("mixtral", "")],
)
def test_a_model_that_another_basis_would_change_is_refused_with_the_reason(family: str, why: str) -> None:
    with pytest.raises(ModelError, match="can not be rotated") as caught:
        rotation_of(tiny.model(family))
    assert why in caught.value.what


def test_a_streamed_checkpoint_and_other_batches_have_the_same_basis(tmp_path: Path) -> None:
    model = tiny.model("llama")
    layout, one = proved_layout(model.config), rotation_of(model)
    saved = Checkpoint.open(tiny.save(model, tmp_path / "dense"))
    streamed = find_rotation(Stream(saved, layout), [Batch(IDS, None)], lambda *a: None)
    assert torch.equal(streamed.basis, one.basis) and torch.equal(streamed.energy, one.energy)
    padded = torch.cat([torch.zeros(8, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(8, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
    for batches in ([Batch(row[None], None) for row in IDS], [Batch(padded, mask)]):
        other = find_rotation(Stream(model, layout), batches, lambda *a: None)
        assert tiny.close(other.energy, one.energy, 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_written_is_a_stock_checkpoint(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    settings: dict[str, Any] = {"structures": ("hidden",), "criterion": "rotation", "remove": 0.4, "calibration": IDS}
    live = pared.prune(model, **settings)
    dense = tiny.save(model, tmp_path / "dense")
    written = pared.prune(dense, out=tmp_path / "out", **settings)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert verify(tmp_path / "out") == [] and not stock.config.tie_word_embeddings
    assert tiny.close(tiny.logits(stock), tiny.logits(live.model), 1e-4)
    assert sum(p.numel() for p in stock.parameters()) == written.plan.after.params
    assert live.plan.rotated and live.plan.removed >= 0.4
    with pytest.raises(UsageError, match="holds no basis"):
        apply_plan(dense, live.plan, tmp_path / "again")


def test_it_scores_hidden_channels_alone() -> None:
    for settings in ({"structures": ("ffn",)}, {"structures": ("hidden", "ffn")}):
        with pytest.raises(UsageError, match="does not score"):
            pared.prune(tiny.model("llama"), criterion="rotation", calibration=IDS, remove=0.3, **settings)
    with pytest.raises(UsageError, match="one step"):
        pared.prune(
            tiny.model("llama"), criterion="rotation", structures=("hidden",), calibration=IDS, remove=0.3, iterative_steps=2
        )


def test_the_head_of_a_tied_model_is_counted_once_more() -> None:
    tied = tiny.model("llama-mqa-tied")
    result = pared.prune(tied, criterion="rotation", structures=("hidden",), calibration=IDS, remove=0.3)
    left: list[Tensor] = list(result.model.parameters())
    assert sum(p.numel() for p in left) == result.plan.after.params
    assert result.plan.before.params == sum(p.numel() for p in tied.parameters()) + tied.lm_head.weight.numel()
