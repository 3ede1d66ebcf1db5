"""Every criterion through the same laws: larger means keep, and nothing but the text and the weights has a say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import tiny
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.criteria import REDUCTIONS, Criterion, all_criteria, get_criterion
from pared.depth import Depth
from pared.errors import UsageError
from pared.estimate import estimate
from pared.modeling import blocks
from pared.proof import proved_layout
from pared.scores import Scores
from pared.stream import Stream

AXES = ("kv", "query", "ffn", "hidden", "layer")
# Others: test_experts; test_rotation, for a basis of one's own is not to be had of every model.
CRITERIA = sorted(n for n, c in all_criteria().items() if c.needs != "rotation" and (c.axes is None or set(AXES) & set(c.axes)))
LENGTHS = (14, 9, 14, 5, 9, 14, 11, 14)
# Sums of products of floating point numbers, in another order.
ROUNDING = 1e-5


def axes_of(criterion: Criterion, model_type: str = "llama") -> tuple[str, ...]:
    """The axes that a criterion can score. Second moments are not kept for experts, whose channels mixtral's FFN axis is."""
    axes = tuple(a for a in AXES if criterion.axes is None or a in criterion.axes)
    return tuple(a for a in axes if a != "ffn" or model_type != "mixtral" or "second-moments" not in criterion.needs)


def rows() -> list[Tensor]:
    """Documents of several lengths."""
    return [tiny.tokens(1, n, seed=10 + i)[0] for i, n in enumerate(LENGTHS)]


def batches(size: int, *, pad: str | None = "right", documents: list[Tensor] | None = None) -> list[Batch]:
    """The documents in batches, padded on a side; None: each alone, without padding."""
    documents = rows() if documents is None else documents
    if pad is None:
        return [Batch(d[None], None) for d in documents]
    out = []
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        width = max(map(len, part)) + 2
        ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.long)
        for i, d in enumerate(part):
            at = slice(0, len(d)) if pad == "right" else slice(width - len(d), width)
            ids[i, at], mask[i, at] = d, 1
        out.append(Batch(ids, mask))
    return out


def score(
    source: PreTrainedModel | Path,
    name: str,
    given: Sequence[Batch],
    *,
    axes: Sequence[str] | None = None,
    reduction: str = "sum",
) -> Scores:
    criterion = get_criterion(name)
    model = source if isinstance(source, PreTrainedModel) else Checkpoint.open(source)
    config = source.config if isinstance(source, PreTrainedModel) else AutoConfig.from_pretrained(source)
    stream = Stream(model, proved_layout(config))
    axes = axes or axes_of(criterion, config.model_type)
    return estimate(stream, criterion, axes, given, reduction=reduction, seed=5, depth=Depth(2))


def assert_close(got: Scores, want: Scores) -> None:
    assert got.of.keys() == want.of.keys() and want.of
    for key, value in want.of.items():
        assert tiny.close(got.of[key], value, ROUNDING), key


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.model(request.param)


@pytest.mark.parametrize("name", CRITERIA)
class TestEveryCriterion:
    def test_gives_one_finite_number_for_each_unit(self, name: str, model: PreTrainedModel) -> None:
        layout = proved_layout(model.config)
        found = score(model, name, batches(4))
        assert found.comparable == get_criterion(name).comparable
        for (layer, axis), value in found.of.items():
            sizes = {**layout.sizes_at(layer or 0), "layer": layout.num_layers}
            units = sizes[axis] * sizes.get(layout.parents.get(axis, ""), 1)
            assert value.dtype == torch.float32 and value.shape == (units,) and bool(value.isfinite().all())
            assert bool(value.std() > 0) or "layer" in axis, "a criterion that tells nothing apart"

    @pytest.mark.parametrize("pad", ["left", None])
    def test_padding_changes_nothing(self, name: str, pad: str | None, model: PreTrainedModel) -> None:
        assert_close(score(model, name, batches(4, pad=pad)), score(model, name, batches(4)))

    @pytest.mark.parametrize("size", [1, 8])
    def test_the_batch_split_changes_nothing(self, name: str, size: int, model: PreTrainedModel) -> None:
        assert_close(score(model, name, batches(size)), score(model, name, batches(4)))

    def test_the_order_of_samples_changes_nothing(self, name: str, model: PreTrainedModel) -> None:
        assert_close(score(model, name, batches(4, documents=rows()[::-1])), score(model, name, batches(4)))

    def test_a_streamed_checkpoint_scores_as_the_live_model_bit_by_bit(
        self, name: str, model: PreTrainedModel, tmp_path: Path
    ) -> None:
        live = score(model, name, batches(4))
        streamed = score(tiny.save(model, tmp_path / "model"), name, batches(4))
        assert live.of.keys() == streamed.of.keys()
        assert all(torch.equal(live.of[k], streamed.of[k]) for k in live.of)

    @pytest.mark.parametrize("family", ["llama", "mixtral"])
    def test_leaves_the_model_as_it_is(self, name: str, family: str) -> None:
        model = tiny.model(family)
        before = {n: p.clone() for n, p in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        how = model.config._experts_implementation
        score(model.train(), name, batches(4))
        assert model.training and all(m.training for m in model.modules())
        model.eval()
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
        assert model.config._experts_implementation == how

    def test_is_kept_by_a_file(self, name: str, model: PreTrainedModel, tmp_path: Path) -> None:
        found = score(model, name, batches(4))
        found.save(tmp_path / "scores.safetensors")
        again = Scores.load(tmp_path / "scores.safetensors")
        assert again.comparable == found.comparable and again.of.keys() == found.of.keys()
        assert all(torch.equal(again.of[k], v) for k, v in found.of.items())

    def test_the_same_seed_gives_the_same_plan(self, name: str) -> None:
        axes = axes_of(get_criterion(name))
        structures = ("layer",) if axes == ("layer",) else ("kv", "query", "ffn")
        shape = "uniform" if axes == ("layer",) else "per-layer"
        plans = [
            tiny.cut(
                tiny.model("llama"), criterion=name, structures=structures, shape=shape, remove=0.3, seed=seed, dry_run=True
            ).plan
            for seed in (1, 1, 2)
        ]
        assert plans[0] == plans[1]
        assert (plans[0].layers == plans[2].layers) == (name != "random")

    @pytest.mark.parametrize("axis", ["kv", "query", "ffn", "hidden"])
    def test_a_structure_of_zeros_goes_first(self, name: str, axis: str) -> None:
        # A head without queries still averages its group's values: activations alone can not tell.
        if name == "random" or axis not in axes_of(get_criterion(name)) or (name, axis) == ("minitron", "query"):
            pytest.skip("this criterion does not judge that")
        model = tiny.model("llama")
        sizes = proved_layout(model.config).sizes_at(0)
        unit, layer = 2, 1
        silence(model, axis, unit, None if axis == "hidden" else layer, sizes)
        found = score(model, name, batches(4), axes=[axis])
        value = found.of[None if axis == "hidden" else layer, axis]
        assert value.argmin() == unit and (value == value[unit]).sum() == 1

    def test_unlike_text_gives_unlike_scores_unless_weights_are_all(self, name: str, model: PreTrainedModel) -> None:
        other = [tiny.tokens(1, n, seed=90 + i)[0] for i, n in enumerate(LENGTHS)]
        one, two = score(model, name, batches(4)), score(model, name, batches(4, documents=other))
        same = all(torch.equal(one.of[k], two.of[k]) for k in one.of)
        assert same == (get_criterion(name).needs == "weights")

    def test_without_calibration_it_says_so(self, name: str) -> None:
        criterion = get_criterion(name)
        if criterion.needs == "weights":
            assert score(tiny.model("llama"), name, []).of
        else:
            with pytest.raises(UsageError, match="calibration"):
                score(tiny.model("llama"), name, [])


def silence(model: PreTrainedModel, axis: str, unit: int, layer: int | None, sizes: dict[str, int]) -> None:
    """Set every weight of one structure of a Llama to zero."""
    d, g = sizes["d"], sizes["query"]
    along = {  # tensor -> (dimension, first, count)
        "ffn": {"gate_proj": (0, unit, 1), "up_proj": (0, unit, 1), "down_proj": (1, unit, 1)},
        "query": {"q_proj": (0, unit * d, d), "o_proj": (1, unit * d, d)},
        "kv": {
            "q_proj": (0, unit * g * d, g * d),
            "k_proj": (0, unit * d, d),
            "v_proj": (0, unit * d, d),
            "o_proj": (1, unit * g * d, g * d),
        },
        "hidden": dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (1, unit, 1))
        | dict.fromkeys(("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm"), (0, unit, 1)),
    }[axis]
    for i, block in enumerate(blocks(model)[1]):
        for name, p in block.named_parameters():
            part = name.split(".")[-2]
            if part in along and layer in (None, i):
                dim, first, count = along[part]
                p.data.narrow(dim, first, count).zero_()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_group_reductions_join_the_parts_of_each_tensor(reduction: str) -> None:
    model = tiny.model("llama")
    found = score(model, "l2", [], axes=["ffn"], reduction=reduction)
    for i, block in enumerate(blocks(model)[1]):
        mlp = block.mlp
        parts = torch.stack(
            [mlp.gate_proj.weight.square().sum(1), mlp.up_proj.weight.square().sum(1), mlp.down_proj.weight.square().sum(0)]
        ).detach()
        want = {
            "sum": parts.sum(0),
            "mean": parts.sum(0) / 3,
            "max": parts.max(0).values,
            "prod": parts[0] * parts[1] * parts[2],
            "first": parts[0],
            "last": parts[2],
        }[reduction]
        assert tiny.close(found.of[i, "ffn"], want)


def test_unknown_names_meet_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match="wanda_sp"):
        get_criterion("wanda")
    with pytest.raises(UsageError, match="reduction"):
        score(tiny.model("llama"), "l2", [], reduction="median")
    with pytest.raises(UsageError, match="does not score"):
        score(tiny.model("llama"), "flap", batches(4), axes=["layer"])


def test_half_precision_loses_no_gradient_to_underflow(tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=1, vocab_size=2000, max_position_embeddings=128)
    path = tiny.save(model, tmp_path / "model")
    ids = torch.randint(3, 2000, (128, 128), generator=torch.Generator().manual_seed(0))
    settings = {"criterion": "taylor", "structures": ("ffn",), "calibration": ids, "batch": 32, "dry_run": True}
    half, full = (tiny.cut(path, dtype=dtype, **settings).scores for dtype in ("float16", "float32"))
    assert half is not None and full is not None
    assert tiny.close(half.of[0, "ffn"], full.of[0, "ffn"], 0.01)


def test_gradient_weighted_selection_refuses_channels_of_experts() -> None:
    with pytest.raises(UsageError, match="experts"):
        score(tiny.model("mixtral"), "obs-fisher", batches(4), axes=["ffn"])


def test_a_layer_that_does_nothing_costs_nothing(stories260k: Path) -> None:
    model = tiny.AutoModelForCausalLM.from_pretrained(stories260k).eval()
    blocks(model)[1][2].self_attn.o_proj.weight.data.zero_()
    blocks(model)[1][2].mlp.down_proj.weight.data.zero_()
    ids = model.generate(torch.full((4, 1), 1), max_length=48, do_sample=False, suppress_tokens=[1, 2])
    for name in ("block_influence", "perplexity"):
        value = score(model, name, [Batch(ids)], axes=["layer"]).of[None, "layer"]
        assert value.argmin() == 2
