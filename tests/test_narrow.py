"""A narrower residual stream beside smaller blocks: the model in another basis is the same model, what is left of it is
refitted, and trial models say what the cut ones do."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pared
import tiny
from command import pared as command
from pared.axes import Nested
from pared.budget import Amount, Budget
from pared.budget.narrow import allocate_narrowed
from pared.budget.trials import ENOUGH, Judges, score_shapes
from pared.budget.uniform import Shape, allocate_uniform, per_layer
from pared.calibration import Batch, sample_from_model, together
from pared.checkpoint import Checkpoint
from pared.compensate import compensate
from pared.effort import narrows
from pared.errors import ModelError, UsageError
from pared.evaluate.perplexity import Windows, logits_of, measure
from pared.plan import LayerPlan, Plan, to_ranges
from pared.recipe import make_recipe
from pared.resolve import resolve
from pared.rotation import find_rotation
from pared.source import Source
from pared.stream import Stream
from pared.surgery import cut_refitted
from pared.turned import TurnedStream
from pared.verify import verify
from pared.walk import Method

IDS = tiny.tokens(8, 24)
MANY = tiny.tokens(ENOUGH, 12)
FAMILIES = ["llama", "llama-biases", "llama-mqa-tied", "qwen3", "gemma", "phi3"]
Kept = dict[str, Tensor | Nested]


def turned(model: PreTrainedModel | Path, ids: Tensor = IDS) -> TurnedStream:
    source = Source.open(model)
    stream = Stream(source.runnable, source.untied().layout)
    return TurnedStream(stream, find_rotation(stream, [Batch(ids, None)], lambda *a: None))


def narrow_plan(stream: TurnedStream, hidden: int, **keep: str) -> Plan:
    from pared.accounting import account

    now = account(stream.layout)
    return Plan(
        model_type=stream.layout.model_type,
        before=now,
        after=now,
        hidden=to_ranges(range(hidden)),
        rotated=True,
        layers=[LayerPlan(source=i, keep=dict(keep)) for i in range(stream.num_layers)],
    )


def made(model: PreTrainedModel, stream: TurnedStream, plan: Plan, method: Method | None) -> PreTrainedModel:
    """The model cut as a plan says, refitted by a method."""
    kept = plan.sizes(None, stream.layout)["hidden"]
    done = None if method is None else compensate(stream, plan, [Batch(IDS, None)], method)
    return cut_refitted(model, stream.layout, plan, done, functools.partial(stream.rotation.reader, stream.layout, kept=kept))[
        0
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_stream_is_the_same_model(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    for what in (model, tiny.save(model, tmp_path / "dense")):
        stream = turned(what)
        last = stream.forward([Batch(IDS, None)])
        with stream.outside(front=False):
            assert tiny.close(stream.logits(last[0]), tiny.logits(model, IDS), 1e-4)
        assert not tiny.close(last[0], tiny.hidden_states(model, IDS)[-1], 1e-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_channels_give_the_logits_of_the_model_cut_to_them(family: str) -> None:
    model = tiny.model(family)
    stream = turned(model)
    small = made(model, stream, narrow_plan(stream, 24), None)
    entered = Stream(small, Source.open(small).layout).forward([Batch(IDS, None)])[0]
    assert tiny.close(stream.logits(entered), tiny.logits(small, IDS), 1e-4)


def test_a_walk_that_keeps_every_channel_changes_nothing() -> None:
    model = tiny.model("llama")
    stream = turned(model)
    same = made(model, stream, narrow_plan(stream, 32), Method())
    assert tiny.close(tiny.logits(same, IDS), tiny.logits(model, IDS), 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_makes_up_for_hidden_channels(family: str) -> None:
    model = tiny.model(family)
    stream = turned(model)
    plan = narrow_plan(stream, 24, ffn="0-39")
    off = {
        name: float((tiny.logits(made(model, stream, plan, method), IDS) - tiny.logits(model, IDS)).square().mean())
        for name, method in (
            ("cut", None),
            ("consumers", Method(inputs=False)),
            ("all", Method()),
            ("chosen", Method(reselect=frozenset({"ffn"}))),
        )
    }
    assert off["chosen"] < off["cut"] and off["all"] < off["consumers"] < off["cut"], off


def test_a_consumer_comes_as_near_as_least_squares_can() -> None:
    """The last matrix of the first block, whose target is the part of the dense stream that stays."""
    model = tiny.model("llama")
    stream = turned(model)
    plan = narrow_plan(stream, 24)
    small = made(model, stream, plan, Method(alpha=1.0, inputs=False, guarded=False))
    seen: list[Tensor] = []
    block = small.model.layers[0]
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        after = tiny.hidden_states(small, IDS)[1]
    handle.remove()
    dense = tiny.hidden_states(model, IDS)[1].double() @ stream.rotation.basis
    a, w = seen[0].flatten(0, 1).double(), block.mlp.down_proj.weight.detach().double()
    weight = 1 / (dense.square().mean(-1).flatten() + 1e-6)
    target = (dense[..., :24] - after).flatten(0, 1) + a @ w.T

    def error(of: Tensor) -> float:
        return float(
            (weight[:, None] * (target - a @ of.T).square()).sum() / weight.sum() + 1e-2 * ridge * (of - cut).square().sum()
        )

    cut = (stream.rotation.basis.T @ model.model.layers[0].mlp.down_proj.weight.detach().double())[:24]
    ridge = float((weight[:, None] * a.square()).sum() / weight.sum() / a.shape[1])
    best = error(w)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert error(w + 1e-2 * torch.randn(w.shape, generator=generator, dtype=torch.float64)) > best
    assert best < error(cut)


def test_trials_say_what_the_cut_model_loses() -> None:
    model = tiny.model("llama")
    stream = turned(model)
    told: list[str] = []
    judges = Judges(
        Stream(model, stream.layout),
        ("ffn",),
        [Batch(row[None], None) for row in MANY],
        8,
        progress=lambda stage, done, total: told.append(stage),
    )
    judges.turn()
    shapes = [{i: {"ffn": 40, **more} for i in range(3)} for more in ({}, {"hidden": 28})]
    wide, narrow = judges.narrowed(shapes)
    assert wide == pytest.approx(judges._walked(judges.stream, shapes[:1], judges.again, judges.compared)[0], rel=1e-3)
    assert narrow > wide
    # What was compared in the model's own basis is not made again: the same numbers, and nothing is run for them.
    judges.uniform([shapes[0], {**shapes[0], 2: {"ffn": 41}}])
    told.clear()
    assert judges.narrowed(shapes[:1])[0] == pytest.approx(wide, rel=1e-3) and not told
    assert judges.narrowed(shapes) == pytest.approx([wide, narrow], rel=1e-3) and set(told) == {"narrow trials"}
    # Of hidden channels alone nothing is refitted by any choice: a model made by the walk itself.
    few = together([Batch(row[None], None) for row in MANY[:8]], 8)
    found = score_shapes(stream, lambda *a: judges_levels(stream, *a), [{i: {"hidden": 28} for i in range(3)}], few, few)
    plan = narrow_plan(stream, 28)
    done = compensate(stream, plan, few, Method(inputs=False, guarded=False))
    small = cut_refitted(model, stream.layout, plan, done, functools.partial(stream.rotation.reader, stream.layout, kept=28))[0]
    cut = Windows(MANY[:8], torch.zeros(8, dtype=torch.int64), None, 8, MANY[:8].numel())
    log = [torch.log_softmax(tiny.logits(m, cut.ids).double(), -1) for m in (model, small)]
    assert found[0] == pytest.approx(float((log[0].exp() * (log[0] - log[1])).sum(-1).mean()), rel=1e-3)


def judges_levels(stream: Stream, i: int, block: Any, dense: Any) -> Any:
    from pared.budget.levels import measure_levels

    return measure_levels(stream, block, i, dense, ["ffn"])


def test_hidden_channels_go_where_that_loses_clearly_less() -> None:
    layout = Source.open(tiny.model("llama")).untied().layout
    budget = Budget(layout, Amount(0.3, "block-params"), ("kv", "query", "ffn"), align=1)
    wide = allocate_uniform(budget)
    asked: list[list[Any]] = []

    def judge(loss: dict[int | None, float], shapes: list[Any]) -> list[float]:
        asked.append([shape[0].get("hidden") for shape in shapes])
        return [loss.get(shape[0].get("hidden"), 9.0) for shape in shapes]

    def best(**loss: float) -> Shape:
        asked.clear()
        return allocate_narrowed(budget, wide, functools.partial(judge, {int(k[1:]) or None: v for k, v in loss.items()}))

    first, *_ = [h for h in range(31, 0, -1) if best(h0=1.0, **{f"h{h}": 0.5}).hidden == h]
    chosen = best(h0=1.0, **{f"h{first}": 0.5})
    assert chosen.removed >= budget.target and chosen.hidden == first and len(asked) == 2
    assert best(h0=1.0, **{f"h{h}": 0.97 for h in range(1, 32)}) is wide, "not clearly better"
    assert best(h0=1.0) is wide and len(asked) == 1, "a little did not help: more is not tried"
    assert (
        sum(budget.block_amount(i, own) for i, own in per_layer(budget, chosen).items())
        <= budget.before.block_params - budget.target
    )


@pytest.fixture(scope="module")
def spare(storyteller: Path) -> tuple[PreTrainedModel, Any, Tensor, Windows]:
    """The shipped model, whose residual stream has directions to spare: tokenizer, calibration and test text of its own."""
    model = pared.load(storyteller, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(storyteller)
    calibration, test = (sample_from_model(model, tokenizer, n, 64, seed) for n, seed in ((ENOUGH, 0), (16, 1)))
    return model, tokenizer, calibration, Windows(test, torch.ones(len(test), dtype=torch.int64), None, len(test), test.numel())


def text_of(spare: tuple[PreTrainedModel, Any, Tensor, Windows], folder: Path) -> Path:
    """The calibration windows as a file of text."""
    rows = [json.dumps({"text": spare[1].decode(row, skip_special_tokens=True)}) for row in spare[2]]
    (folder / "text.jsonl").write_text("\n".join(rows))
    return folder / "text.jsonl"


def kl(spare: tuple[PreTrainedModel, Any, Tensor, Windows], model: PreTrainedModel | None) -> float:
    assert model is not None
    return measure(logits_of(model), spare[3], against=logits_of(spare[0])).kl or 0.0


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_the_default_takes_what_the_stream_has_to_spare(spare: Any, storyteller: Path, tmp_path: Path, shape: str) -> None:
    settings: dict[str, Any] = {"remove": 0.2, "calibration": spare[2], "reconstruct": 4, "shape": shape, "search_steps": 1}
    wide = pared.prune(spare[0], narrow=False, **settings)
    narrow = pared.prune(spare[0], **settings)
    written = pared.prune(storyteller, out=tmp_path / "out", **settings)
    assert wide.plan.hidden is None and not wide.plan.rotated
    assert narrow.plan.rotated and narrow.plan.removed >= 0.2 and narrow.plan.layers == written.plan.layers
    assert kl(spare, narrow.model) < 0.8 * kl(spare, wide.model)
    if shape == "uniform":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert type(stock) is type(spare[0]) and not stock.config.tie_word_embeddings
    else:
        stock = pared.load(tmp_path / "out", dtype=torch.float32)
    assert verify(tmp_path / "out") == []
    assert stock.config.hidden_size == written.plan.sizes(None, Source.open(storyteller).layout)["hidden"] < 192
    assert sum(p.numel() for p in stock.parameters()) == written.plan.after.params
    assert tiny.close(tiny.logits(stock, spare[3].ids), tiny.logits(narrow.model, spare[3].ids), 2e-2)


def test_a_new_user_is_told_what_became_of_the_stream(spare: Any, storyteller: Path, tmp_path: Path) -> None:
    flags = (
        "--calibration",
        text_of(spare, tmp_path),
        "--samples",
        ENOUGH,
        "--seq-len",
        32,
        "--remove",
        0.2,
        "--reconstruct",
        0,
    )
    done = command("prune", storyteller, "-o", tmp_path / "out", *flags)
    assert done.code == 0, done.err
    hidden = Checkpoint.open(tmp_path / "out").config["hidden_size"]
    assert hidden < 192 and hidden % 8 == 0 and f"hidden {hidden}" in done.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{hidden} channels, in a basis of its own" in card and "{" not in card.partition("```")[0]


def test_hidden_channels_alone_are_made_up_for_too(spare: Any) -> None:
    settings: dict[str, Any] = {"criterion": "rotation", "structures": ("hidden",), "remove": 0.3, "calibration": spare[2]}
    cut = pared.prune(spare[0], compensate="none", **settings)
    refitted = pared.prune(spare[0], reconstruct=0, **settings)
    quick = pared.prune(spare[0], effort="quick", **settings)
    assert cut.plan.hidden == refitted.plan.hidden == quick.plan.hidden
    assert kl(spare, quick.model) == pytest.approx(kl(spare, refitted.model), rel=1e-3)
    with pytest.raises(UsageError, match="basis of their own"):
        pared.prune(spare[0], compensate="refit", **settings)
    assert kl(spare, refitted.model) < 0.9 * kl(spare, cut.model)


def test_where_it_is_not_tried() -> None:
    tied, own = Source.open(tiny.model("llama-mqa-tied")), Source.open(tiny.model("llama"))

    def would(source: Source, **settings: Any) -> bool:
        recipe = resolve(make_recipe({"remove": 0.2, "samples": ENOUGH, **settings}), source)
        return narrows(recipe, source.layout, ("kv", "query", "ffn"))

    assert would(own) and would(tied) and would(own, shape="per-layer") and would(own, of="params")
    assert not would(tied, of="params"), "its head would be counted once more"
    assert would(tied, of="params", narrow=True)
    for settings in ({"narrow": False}, {"structures": ("kv", "query", "ffn")}, {"samples": ENOUGH - 1}, {"effort": "quick"}):
        assert not would(own, **settings), settings
    assert not would(own, of="kv-cache") and not would(own, criterion="taylor") and not would(own, compensate="refit")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"effort": "quick"}, "--compensate sequential"),
        ({"structures": ("vocab",), "keep_tokens_from": "words.txt"}, "the whole vocabulary"),
        ({"samples": 8}, "calibration windows"),
        ({"criterion": "taylor"}, "--criterion obs"),
        ({"of": "kv-cache"}, "an amount"),
        ({"structures": ("layer", "ffn")}, "no whole layers"),
        ({"shape": "per-layer", "allocate": "global"}, "--allocate"),
    ],
)
def test_asked_for_where_it_can_not_be(settings: dict[str, Any], wanted: str) -> None:
    recipe = make_recipe({"samples": ENOUGH, "remove": 0.3, "narrow": True, **settings})
    with pytest.raises(UsageError, match=wanted) as caught:
        resolve(recipe, Source.open(tiny.model("llama")))  # before anything is read
    assert caught.value.where == "--narrow" and caught.value.fix == "--no-narrow"


def test_a_model_that_another_basis_would_change_keeps_its_channels_and_says_why() -> None:
    settings: dict[str, Any] = {"calibration": MANY, "remove": 0.3, "reconstruct": 0}
    found = pared.prune(tiny.model("gpt_neox"), **settings)
    assert not found.plan.rotated and "norm" in found.plan.provenance["narrow"]["refused"]
    with pytest.raises(ModelError, match="can not be rotated"):
        pared.prune(tiny.model("gpt_neox"), narrow=True, **settings)


def test_a_plan_alone_keeps_every_channel(spare: Any, storyteller: Path, tmp_path: Path) -> None:
    """For it holds no basis."""
    flags = ("--calibration", text_of(spare, tmp_path), "--samples", ENOUGH, "--seq-len", 32, "--remove", 0.2)
    done = command("plan", storyteller, "-o", tmp_path / "plan.json", *flags)
    assert done.code == 0, done.err
    assert not Plan.load(tmp_path / "plan.json").rotated
    assert command("apply", storyteller, tmp_path / "plan.json", "-o", tmp_path / "out").code == 0
    assert Checkpoint.open(tmp_path / "out").config["hidden_size"] == 192
