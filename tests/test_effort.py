"""What an effort stands for, and what is left to the walk that refits."""

from __future__ import annotations

from typing import Any

import pytest

import pared
import tiny
from pared import walk
from pared.budget.trials import ENOUGH
from pared.effort import STEPS, measures, no_scores, refits_inputs, reselected
from pared.recipe import WINDOWS, Recipe, make_recipe
from pared.resolve import resolve
from pared.source import Source


def resolved(family: str = "llama", **settings: Any) -> tuple[Recipe, Source]:
    source = Source.open(tiny.model(family))
    return resolve(make_recipe(**settings), source), source


@pytest.mark.parametrize(
    ("effort", "shape", "allocate", "compensate", "steps"),
    [
        ("quick", "uniform", "uniform", "refit", 0),
        ("quick", "per-layer", "global", "refit", 0),
        ("default", "uniform", "uniform", "sequential", WINDOWS // 2),
        ("default", "per-layer", "search", "sequential", WINDOWS * 2),
        ("max", "uniform", "uniform", "sequential", STEPS),
        ("max", "per-layer", "search", "sequential", STEPS),
    ],
)
def test_an_effort_decides_what_was_left_open(effort: str, shape: str, allocate: str, compensate: str, steps: int) -> None:
    recipe, _ = resolved(effort=effort, shape=shape)
    assert (recipe.allocate, recipe.compensate, recipe.reconstruct) == (allocate, compensate, steps)
    assert resolve(recipe, _) == recipe


def test_what_was_asked_for_goes_over_the_effort() -> None:
    recipe, _ = resolved(effort="max", shape="per-layer", allocate="global", reconstruct=0, compensate="refit")
    assert (recipe.allocate, recipe.compensate, recipe.reconstruct, recipe.criterion) == ("global", "refit", 0, "obs-fisher")
    assert resolved(criterion="taylor", shape="per-layer")[0].allocate == "global", "a search selects by obs"
    assert resolved(compensate="none", effort="max")[0].reconstruct == 0


def test_the_default_effort_reconstructs_in_steps_of_one_window_where_there_are_enough() -> None:
    few, enough = (resolved(samples=n)[0] for n in (ENOUGH - 1, ENOUGH))
    assert (few.reconstruct, enough.reconstruct, enough.step_of) == (0, ENOUGH // 2, 1)
    assert resolved(reconstruct=10)[0].step_of == resolved(effort="max")[0].step_of == resolved()[0].batch == 8
    assert resolved(reconstruct=10, step_windows=2)[0].step_of == resolved(step_windows=2)[0].step_of == 2
    assert resolved(compensate="none")[0].reconstruct == resolved(effort="quick")[0].reconstruct == 0


def test_token_ids_given_directly_say_how_many_windows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, real = tiny.model("llama"), set[tuple[int, int]](), walk.reconstruct

    def watched(*args: Any, **more: Any) -> tuple[float, float]:
        seen.add((more["steps"], more["sequences"]))
        return real(*args, **more)

    monkeypatch.setattr(walk, "reconstruct", watched)
    moved, transfer = [0], walk.transfer

    def counted(*args: Any, **more: Any) -> Any:
        moved[0] += 1
        return transfer(*args, **more)

    monkeypatch.setattr(walk, "transfer", counted)
    for rows, expected in ((16, set()), (ENOUGH, {(ENOUGH // 2, 1)})):
        pared.prune(model, calibration=tiny.tokens(rows, 12), remove=0.3, align=1)
        assert seen == expected
        assert (moved[0] > 0) == bool(expected), "few leave what runs before the consumers as it is"
    assert refits_inputs(resolved(effort="max", samples=16)[0])


def test_sizes_are_measured_where_the_walk_chooses_the_units() -> None:
    recipe, source = resolved()
    assert reselected(recipe, source.layout) >= {"kv", "query", "ffn"} and measures(recipe, source.layout, ("kv", "ffn"))
    for settings in ({"criterion": "taylor"}, {"compensate": "refit"}, {"iterative_steps": 2}):
        assert not measures(*(pair := resolved(**settings))[:1], pair[1].layout, ("kv", "ffn"))
    experts, other = resolved("mixtral", criterion="obs", structures=("kv",))
    assert {"ffn", "kv"} <= reselected(experts, other.layout) and not measures(experts, other.layout, ("ffn",))
    weighted, _ = resolved("mixtral", criterion="obs-fisher", structures=("kv",))
    assert "ffn" not in reselected(weighted, other.layout)


def test_heads_that_the_config_names_are_settled_before_the_walk() -> None:
    recipe, source = resolved("bloom", criterion="obs", structures=("kv",), shape="per-layer")
    assert source.layout.head_arguments and "kv" not in reselected(recipe, source.layout)
    assert "ffn" in reselected(recipe, source.layout)


def test_the_stand_in_for_scores_has_one_for_every_unit() -> None:
    layout = resolved()[1].layout
    of = no_scores(layout, ("kv", "query", "ffn")).of
    assert {k: len(v) for k, v in of.items()} == {
        (i, a): n for i in range(3) for a, n in (("kv", 4), ("query", 8), ("ffn", 48))
    }
