"""Mixtures of experts: what is left of a router is the original one restricted, in every family and on disk."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import pared
import tiny
from pared.axes import Nested
from pared.budget import Amount, Budget
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.criteria import all_criteria, get_criterion
from pared.errors import ModelError, UsageError
from pared.estimate import estimate
from pared.modeling import blocks
from pared.plan import from_ranges
from pared.proof import TOLERANCE, proved_layout
from pared.run import Pruned, apply_plan
from pared.scores import Scores
from pared.stream import Stream
from pared.structure import Layout, experts_per_token
from pared.surgery import cut_model

# What has been proved of each family's experts so far, which must not shrink unseen.
ROUTED, BOTH = ("expert", "ffn"), ("expert", "expert_ffn", "shared_ffn")
FLOOR: dict[str, tuple[str, ...]] = dict.fromkeys(tiny.EXPERTS, ROUTED) | {
    "qwen2_moe": BOTH,
    "qwen3_moe": ("expert", "expert_ffn", "ffn"),
    "deepseek_v2": (*BOTH, "ffn"),
    "deepseek_v2-groups": (*BOTH, "ffn"),
    "deepseek_v3": (*BOTH, "ffn"),
    "ernie4_5_moe": (*BOTH, "ffn"),
    "glm4_moe": (*BOTH, "ffn"),
    "dots1": (*BOTH, "ffn"),
    "exaone_moe": (*BOTH, "ffn"),
    "hunyuan_v1_moe": ("expert", "ffn", "shared_ffn"),
}
FEW = ("mixtral-6", "deepseek_v3", "gpt_oss")  # softmax, sigmoid with groups and a correction, transposed with biases
SCORES_EXPERTS = sorted(n for n, c in all_criteria().items() if c.axes is None or "expert" in c.axes)


@lru_cache
def dense(family: str) -> tuple[PreTrainedModel, Layout]:
    model = tiny.model(family)
    generator = torch.Generator().manual_seed(9)
    for name, buffer in model.named_buffers():
        if "correction" in name:  # of a size at which it matters
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model, proved_layout(model.config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lru_cache(lambda family: tiny.save(dense(family)[0], tmp_path_factory.mktemp(family) / "dense"))


def kept_experts(result: Pruned, layout: Layout) -> dict[int, Tensor]:
    """The experts that stay, in each layer that has any."""
    out = {}
    for i, layer in enumerate(result.plan.layers):
        if "expert" in layout.layer_sizes[layer.source]:
            everyone = torch.arange(layout.layer_sizes[layer.source]["expert"])
            out[i] = result.plan.selection(i, layout).get("expert", everyone)
    return out  # type: ignore[return-value]


@pytest.mark.parametrize(("family", "axis"), [(f, a) for f in FLOOR for a in FLOOR[f]])
def test_what_was_proved_stays_proved(family: str, axis: str) -> None:
    proof = dense(family)[1].proofs[axis]
    assert proof.holds and proof.difference is not None and proof.difference <= TOLERANCE


@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_routed_channels_are_chosen_anew_in_each_expert(family: str) -> None:
    layout = dense(family)[1]
    routed = "expert_ffn" if "expert_ffn" in layout.keys else "ffn"
    assert layout.parents[routed] == "expert" and "shared_ffn" not in layout.parents


# ---------------------------------------------------------------------------------------------------------------------
# The router over the experts that stay is the original one restricted: references written from the papers


def softmax_router(module: Any, kept: Tensor, renormalise: bool) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def forward(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = h.reshape(-1, h.shape[-1]) @ module.weight.T
        gates, best = logits[:, kept].softmax(-1).topk(module.top_k)
        return logits, gates / gates.sum(-1, keepdim=True) if renormalise else gates, kept[best]

    return forward


def grouped_sigmoid_router(
    module: Any, kept: Tensor, groups: int, chosen: int, scale: float
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """DeepSeek V3, arXiv:2412.19437, equations 13 to 16: sigmoid affinities, chosen with a bias and weighted without."""

    def forward(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = h.reshape(-1, h.shape[-1]) @ module.weight.T
        affinity = logits[:, kept].sigmoid()
        choice = affinity + module.e_score_correction_bias[kept]
        out = []
        for a, c in zip(affinity, choice, strict=True):
            rows = c.reshape(groups, -1)
            best_groups = rows.sort(dim=1, descending=True).values[:, :2].sum(1).topk(chosen).indices
            inside = torch.full_like(rows, float("-inf"))
            inside[best_groups] = rows[best_groups]
            best = inside.flatten().topk(module.top_k).indices
            out.append((kept[best], scale * a[best] / a[best].sum()))
        return logits, torch.stack([g for _, g in out]), torch.stack([i for i, _ in out])

    return forward


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral-6", {}), ("qwen3_moe", {"norm_topk_prob": True}), ("qwen3_moe", {"norm_topk_prob": False}), ("deepseek_v3", {})],
)
def test_the_router_left_is_the_original_one_restricted(family: str, changes: dict[str, Any]) -> None:
    model = copy.deepcopy(dense(family)[0]) if not changes else tiny.model(family, **changes)
    layout = proved_layout(model.config)
    result = tiny.cut(model, structures=("expert",), shape="per-layer", remove=0.25)
    kept = kept_experts(result, layout)
    assert sum(len(k) for k in kept.values()) < sum(layout.layer_sizes[i]["expert"] for i in kept)
    for i, k in kept.items():
        gate = blocks(model)[1][i].mlp.gate
        if family == "deepseek_v3":
            gate.forward = grouped_sigmoid_router(gate, k, 3, 2, model.config.routed_scaling_factor)
        else:
            gate.forward = softmax_router(gate, k, changes.get("norm_topk_prob", True))
    want = tiny.logits(model)
    assert tiny.close(tiny.logits(result.model), want) and not tiny.close(want, tiny.logits(dense(family)[0]))


@pytest.mark.parametrize("family", [f for f in tiny.EXPERTS if dense(f)[1].runs])
def test_groups_lose_as_many_experts_each(family: str) -> None:
    layout = dense(family)[1]
    groups, n = layout.runs["expert"], max(s.get("expert", 0) for s in layout.layer_sizes)
    for shape in ("uniform", "per-layer"):
        for kept in kept_experts(tiny.cut(dense(family)[0], structures=("expert",), shape=shape), layout).values():
            assert len(set(torch.bincount(kept // (n // groups), minlength=groups).tolist())) == 1


# ---------------------------------------------------------------------------------------------------------------------
# On disk


@pytest.mark.parametrize("structures", [("expert",), ("expert", "ffn")])
@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_a_uniform_result_loads_in_transformers_and_counts_to_its_account(
    family: str, structures: tuple[str, ...], saved: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"structures": structures, "remove": 0.2 if structures == ("expert",) else 0.35}
    written = tiny.cut(saved(family), out=out, **settings)
    memory = tiny.cut(dense(family)[0], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert tiny.equal_states(model, memory.model) and torch.equal(tiny.logits(model), tiny.logits(memory.model))
    for path, counted in ((saved(family), written.plan.before), (out, written.plan.after)):
        sizes = {n: tiny.numel(t.shape) for n, t in Checkpoint.open(path).tensors.items()}
        assert counted.params == sum(sizes.values())
        assert counted.block_params == sum(n for name, n in sizes.items() if ".layers." in name)
    assert written.plan.removed >= settings["remove"]


@pytest.mark.parametrize("family", FEW)
def test_layers_may_keep_experts_of_different_numbers(family: str, saved: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"structures": ("expert", "ffn"), "shape": "per-layer", "criterion": "taylor", "remove": 0.3}
    result = tiny.cut(saved(family), out=tmp_path / "out", **settings)
    loaded, memory = pared.load(tmp_path / "out"), tiny.cut(dense(family)[0], **settings).model
    assert tiny.equal_states(loaded, memory) and torch.equal(tiny.logits(loaded), tiny.logits(memory))
    counted = sum(tiny.numel(t.shape) for t in Checkpoint.open(tmp_path / "out").tensors.values())
    assert result.plan.after.params == counted
    assert result.plan.removed >= 0.3


@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_cutting_nothing_is_bit_identical(family: str, saved: Any, tmp_path: Path) -> None:
    model, layout = dense(family)
    plan = tiny.cut(model, structures=("expert",), dry_run=True).plan
    layers = [layer.model_copy(update={"keep": {}}) for layer in plan.layers]
    nothing = plan.model_copy(update={"layers": layers, "after": plan.before})
    assert tiny.equal_states(cut_model(model, layout, nothing), model)
    source, written = Checkpoint.open(saved(family)), Checkpoint.open(apply_plan(saved(family), nothing, tmp_path / "out"))
    assert written.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(written.read(n), source.read(n)) for n in source.tensors)


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", FEW)
def test_what_was_pruned_can_be_pruned_again(family: str, shape: str, saved: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"structures": ("expert",), "shape": shape, "remove": 0.1, "criterion": "reap"}
    first = tiny.cut(saved(family), out=tmp_path / "once", **settings)
    second = tiny.cut(tmp_path / "once", out=tmp_path / "twice", **settings)
    twice = pared.load(tmp_path / "twice")
    assert second.plan.before == first.plan.after and second.plan.after.params < first.plan.after.params
    assert torch.isfinite(tiny.logits(twice)).all()


def test_two_steps_compose_to_one_plan_of_the_dense_model() -> None:
    model, layout = dense("mixtral-6")
    result = tiny.cut(model, structures=("expert", "ffn"), remove=0.4, criterion="taylor", iterative_steps=2)
    assert tiny.close(tiny.logits(cut_model(model, layout, result.plan)), tiny.logits(result.model))
    assert result.plan.removed >= 0.4


def test_a_width_that_shared_and_routed_experts_have_from_one_key_is_cut_in_both() -> None:
    model, layout = dense("ernie4_5_moe")  # two shared experts, as one MLP of twice the width
    assert layout.follows == {"shared_ffn": ("expert_ffn", 2)}
    result = tiny.cut(model, structures=("ffn",), remove=0.3)
    for i, layer in enumerate(result.plan.layers):
        kept = result.plan.selection(i, layout)
        if "expert" in layout.layer_sizes[layer.source]:
            routed, shared = kept["expert_ffn"], kept["shared_ffn"]
            assert isinstance(routed, Nested) and isinstance(shared, Tensor)
            assert len(shared) == 2 * routed.index.shape[1] == 2 * result.model.config.moe_intermediate_size  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Criteria


def score(source: Any, name: str, ids: list[Tensor], **settings: Any) -> Scores:
    model = source if isinstance(source, PreTrainedModel) else Checkpoint.open(source)
    config = source.config if isinstance(source, PreTrainedModel) else AutoConfig.from_pretrained(source)
    return estimate(
        Stream(model, proved_layout(config)), get_criterion(name), ("expert",), [Batch(i) for i in ids], seed=5, **settings
    )


@pytest.mark.parametrize("name", SCORES_EXPERTS)
class TestEveryCriterionOfExperts:
    def test_gives_one_finite_number_for_each_expert(self, name: str) -> None:
        model, layout = dense("deepseek_v3")
        found = score(model, name, [tiny.tokens()])
        assert found.of.keys() == {(i, "expert") for i, s in enumerate(layout.layer_sizes) if "expert" in s}
        for value in found.of.values():
            assert value.shape == (12,) and bool(value.isfinite().all()) and bool(value.std() > 0)

    def test_the_batch_split_changes_nothing(self, name: str) -> None:
        model, ids = dense("mixtral-6")[0], tiny.tokens(8)
        one, two = score(model, name, [ids]), score(model, name, list(ids.split(3)))
        assert all(tiny.close(two.of[k], v) for k, v in one.of.items())

    def test_a_streamed_checkpoint_scores_as_the_live_model_bit_by_bit(self, name: str, saved: Any) -> None:
        live, streamed = score(dense("mixtral-6")[0], name, [tiny.tokens()]), score(saved("mixtral-6"), name, [tiny.tokens()])
        assert all(torch.equal(streamed.of[k], v) for k, v in live.of.items())

    def test_experts_in_another_order_have_their_scores_in_that_order_and_the_same_result(self, name: str) -> None:
        model = dense("mixtral-6")[0]
        other, orders = copy.deepcopy(model), []
        for i, block in enumerate(blocks(other)[1]):
            order = torch.randperm(6, generator=torch.Generator().manual_seed(i))
            for p in (block.mlp.gate.weight, block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                p.data = p.data[order]
            orders.append(order)
        assert tiny.close(tiny.logits(other), tiny.logits(model)) and not tiny.equal_states(other, model)
        if name == "random":
            return
        one, two = (tiny.cut(m, structures=("expert",), criterion=name, shape="per-layer") for m in (model, other))
        assert one.scores is not None and two.scores is not None
        for i, order in enumerate(orders):
            assert tiny.close(two.scores.of[i, "expert"], one.scores.of[i, "expert"][order])
        assert one.plan.after == two.plan.after and tiny.close(tiny.logits(two.model), tiny.logits(one.model))


def test_reap_usage_and_output_are_what_their_formulas_say() -> None:
    model, ids = dense("mixtral-6")[0], tiny.tokens()
    seen: dict[int, Tensor] = {}
    handles = [
        b.mlp.register_forward_pre_hook(lambda m, a, i=i: seen.update({i: a[0].reshape(-1, 32)}))
        for i, b in enumerate(blocks(model)[1])
    ]
    tiny.logits(model, ids)
    for handle in handles:
        handle.remove()
    found = {name: score(model, name, [ids]) for name in ("reap", "expert-usage", "expert-output")}
    for i, block in enumerate(blocks(model)[1]):
        h, experts = seen[i], block.mlp.experts
        top, best = (h @ block.mlp.gate.weight.T).softmax(-1).topk(2)
        top = top / top.sum(-1, keepdim=True)
        for e in range(6):
            gate, up = (h @ experts.gate_up_proj[e].T).chunk(2, -1)
            norm = ((F.silu(gate) * up) @ experts.down_proj[e].T).norm(dim=-1)
            sent = (best == e).any(-1)
            weight = (top * (best == e)).sum(-1)
            assert torch.isclose(found["expert-usage"].of[i, "expert"][e], sent.float().mean())
            if sent.any():
                assert torch.isclose(found["reap"].of[i, "expert"][e], (weight * norm)[sent].mean(), rtol=1e-4)
                assert torch.isclose(found["expert-output"].of[i, "expert"][e], norm[sent].mean(), rtol=1e-4)
    tokens = ids.numel()
    assert all(v.sum() == 2 * tokens for v in found["reap"].visits.values()) and len(found["reap"].visits) == 3


@pytest.mark.parametrize("criterion", ["reap", "taylor", "expert-usage"])
def test_experts_without_visits_are_counted_said_and_the_first_to_go(criterion: str, saved: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(dense("gpt_oss")[0])
    for block in blocks(model)[1]:
        block.mlp.router.bias.data[3] = -1e4
    result = tiny.cut(model, structures=("expert",), criterion=criterion, remove=0.1)
    assert result.report["experts_never_routed"] == {"count": 3, "of": 18, "layers": {"0": "3", "1": "3", "2": "3"}}
    for kept in kept_experts(result, proved_layout(model.config)).values():
        assert 3 not in kept
    assert tiny.close(tiny.logits(result.model), tiny.logits(model))
    from pared.report.tables import pruned

    said = [p for p in pruned(result.report, {}) if isinstance(p, str)]
    assert any("3 of 18 experts were sent no token" in line for line in said)


def test_a_criterion_of_experts_says_where_it_does_not_fit() -> None:
    with pytest.raises(UsageError, match="does not score"):
        tiny.cut(dense("mixtral-6")[0], structures=("ffn",), criterion="reap", dry_run=True)
    with pytest.raises(ModelError, match="expert"):
        tiny.cut(tiny.model("llama"), structures=("expert",), dry_run=True)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize(("family", "least"), [("mixtral-6", 2), ("deepseek_v3", 6), ("deepseek_v2-groups", 6)])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_fewer_experts_than_a_token_visits_are_refused_before_weights_are_read(
    family: str, least: int, shape: str, saved: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    model = copy.deepcopy(dense(family)[0])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    tiny.save(model, broken)
    settings: dict[str, Any] = {"structures": ("expert",), "shape": shape, "criterion": "reap"}
    with pytest.raises(UsageError, match=rf"expert can give between 0% and .*%: of \d+ experts {least} have to stay") as error:
        tiny.cut(broken, remove=0.9, **settings)
    most = float(str(error.value).split("0% and ")[1].split("%")[0]) / 100
    result = tiny.cut(saved(family), remove=most, **settings)  # and as much as it says can be had
    assert {len(k) for k in kept_experts(result, dense(family)[1]).values()} == {least}
    assert torch.isfinite(tiny.logits(result.model)).all()


def test_a_router_that_sends_tokens_everywhere_has_no_expert_to_spare() -> None:
    model = tiny.model("mixtral-6", num_experts_per_tok=6)
    proof = proved_layout(model.config).proofs["expert"]
    assert proof.holds  # of a smaller instance; the bound is this model's own
    layout = proved_layout(model.config)
    assert Budget(layout, Amount(0.1), ("expert",)).levels("expert", 6) == [6]
    with pytest.raises(UsageError, match="6 have to stay"):
        tiny.cut(model, structures=("expert",), remove=0.1, dry_run=True)


def test_the_number_of_experts_per_token_is_found_in_every_config() -> None:
    found = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # some want arguments; those are no part of this law
            continue
        keys = [k for k in config.to_dict() if "per_tok" in k or k in ("moe_topk", "moe_k", "top_k_experts")]
        values = [v for k in keys if isinstance(v := getattr(config, k), int)]
        if values:
            found[model_type] = (experts_per_token(config), values[0])
    assert len(found) > 40 and all(got == want for got, want in found.values())
    for family, (_, settings) in tiny.EXPERTS.items():
        assert experts_per_token(tiny.config(family)) == 2, settings
    assert experts_per_token(tiny.config("llama")) is None


# ---------------------------------------------------------------------------------------------------------------------
# With everything else


@pytest.mark.parametrize("family", ["qwen2_moe", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe"])
def test_the_refit_of_what_stands_beside_experts_helps(family: str) -> None:
    model, ids = dense(family)[0], tiny.tokens(48)
    want = tiny.logits(model, ids)

    def error(mode: str) -> float:
        cut = tiny.cut(model, calibration=ids, criterion="taylor", compensate=mode, remove=0.2).model
        assert cut is not None
        return float((tiny.logits(cut, ids) - want).square().mean())

    assert error("sequential") < error("none")


def test_experts_go_with_heads_and_channels_under_one_budget() -> None:
    model, _ = dense("mixtral-6")
    result = tiny.cut(
        model,
        structures=("kv", "query", "ffn", "expert"),
        shape="per-layer",
        criterion="taylor",
        remove=0.4,
        compensate="sequential",
    )
    lost = {a for layer in result.plan.layers for a in layer.keep}
    assert {"expert", "ffn"} <= lost and result.plan.removed >= 0.4 and torch.isfinite(tiny.logits(result.model)).all()
    for layer in result.plan.layers:
        rows = layer.keep.get("ffn", [])
        experts = len(from_ranges(layer.keep["expert"])) if "expert" in layer.keep else 6  # type: ignore[arg-type]
        assert len(rows) in (0, experts)


@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_by_default_channels_go_and_heads_and_experts_stay(family: str) -> None:
    plan = tiny.cut(dense(family)[0], remove=0.2, dry_run=True).plan
    lost = {a for layer in plan.layers for a in layer.keep}
    assert lost and all(a.endswith("ffn") for a in lost) and plan.removed >= 0.2


def test_no_hook_is_left_on_the_model() -> None:
    model = dense("mixtral-6")[0]
    before = {n: len(m._forward_pre_hooks) for n, m in model.named_modules() if isinstance(m, nn.Module)}
    score(model, "reap", [tiny.tokens()])
    assert {n: len(m._forward_pre_hooks) for n, m in model.named_modules()} == before
