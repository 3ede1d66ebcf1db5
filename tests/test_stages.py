"""A block in stages: each stage from the stream that enters it gives what the whole block gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from pared.blockparts import consumers_of
from pared.calibration import Batch
from pared.source import Source
from pared.spill import States
from pared.stages import Dense, Remembered, Stages, consumer_at, reads, run_from, stages_of
from pared.stream import Stream

# family -> whether stages run apart, whether the drift has a place, whether something runs after the last consumer
KINDS = {
    "llama": (True, True, False),
    "phi3": (True, True, False),
    "gpt2": (True, True, False),
    "mixtral": (True, True, True),  # experts are no consumer: they run after the only one
    "gpt_neox": (False, True, False),  # attention and MLP side by side
    "gemma2": (False, False, False),  # norms after both
}


def taken_apart(family: str) -> tuple[Stream, Any, Stages, States]:
    model = tiny.model(family)
    stream = Stream(model, Source.open(model).layout)
    x = stream.embed([Batch(rows, None) for rows in tiny.tokens(6, 12).split(2)])
    with stream.block(0) as block:
        weights = {n: p.detach() for n, p in block.named_parameters()}
        names = [n for n in weights if "norm" not in n and weights[n].ndim == 2]
        consumers = list(consumers_of(stream.layout, 0, weights))
        producers = [n for n in names if n not in consumers]
        with torch.no_grad():
            return stream, block, stages_of(stream, block, 0, x[0][:1], consumers, producers), x


@pytest.mark.parametrize("family", KINDS)
def test_a_trial_run_tells_whether_stages_run_apart(family: str) -> None:
    _, _, stages, _ = taken_apart(family)
    assert (stages.apart, stages.adds, stages.rest) == KINDS[family]


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_stage_by_stage_is_the_whole_block(family: str) -> None:
    stream, block, stages, x = taken_apart(family)
    whole = [stream.run(block, 0, h) for h in x]
    dense = Dense(stream, block, 0, stages, x[:])
    kept = Remembered(stream, block, 0, stages, x, 2)
    for stage in range(len(stages.order)):
        if stages.apart:
            assert torch.allclose(run_from(stream, block, 0, stages, stage, dense.at[0]), whole[0], atol=1e-5)
        for b in range(len(x)):
            entered = dense.entering(stage)[b]
            seen = dense.consumer(stage, b)
            again = consumer_at(stream, block, 0, stages, stage, entered)
            assert again.y is None and torch.equal(again.residual, seen.residual) and torch.equal(again.a, seen.a)
            if b < 2:
                assert torch.equal(kept.consumer(stage, b).y, seen.y) and kept.consumer(stage, b).a is None
    dense.finish()
    for b, want in enumerate(whole):
        assert torch.allclose(dense.at[b], want, atol=1e-5) and torch.allclose(kept.at[b], want, atol=1e-5)
    assert all(torch.equal(x[b], kept.entering(0)[b]) for b in range(2)), "streams of several walks stay as they were"


@torch.no_grad()
def test_matrices_that_read_one_tensor_are_found_together() -> None:
    stream, block, stages, x = taken_apart("llama")
    first, second = stages.producers(0), stages.producers(1)
    assert [len(g) for g in first] == [3] and [len(g) for g in second] == [2]
    normed = block.input_layernorm(x[1])
    assert torch.equal(reads(stream, block, 0, stages, 0, first[0][0], x[1]), normed)


def test_children_that_were_passed_by_are_back_afterwards() -> None:
    stream, block, stages, x = taken_apart("llama")
    children = dict(block._modules)
    with torch.no_grad():
        run_from(stream, block, 0, stages, 1, x[0])
    assert dict(block._modules) == children
