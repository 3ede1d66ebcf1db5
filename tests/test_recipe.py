"""Recipes: what decides a run, validated."""

from __future__ import annotations

import pytest

from pared.errors import UsageError
from pared.recipe import load_recipe, make_recipe, shipped_recipes


def test_every_recipe_that_ships_is_valid_and_survives_its_own_text() -> None:
    for name in shipped_recipes():
        recipe = make_recipe(load_recipe(name))
        assert make_recipe(recipe.model_dump()) == recipe
    assert make_recipe(load_recipe("llm-pruner")).compensate == "none", "LLM-Pruner cuts and does not refit"


@pytest.mark.parametrize(
    ("name", "structures"), [("block-wise", ("kv", "ffn")), ("channel-wise", ("hidden",)), ("layer-wise,kv", ("layer", "kv"))]
)
def test_strategies_go_by_llm_pruners_names(name: str, structures: tuple[str, ...]) -> None:
    assert make_recipe(structures=name).structures == structures


def test_a_setting_that_is_none_overrides_nothing_and_others_do() -> None:
    assert make_recipe({"samples": 7, "seed": 3}, samples=None, seed=4).model_dump(include={"samples", "seed"}) == {
        "samples": 7,
        "seed": 4,
    }


@pytest.mark.parametrize("settings", [{"structurs": "kv"}, {"structures": "kv,heads"}, {"align": 0}, {"batch": "many"}])
def test_a_wrong_setting_is_named(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError) as error:
        make_recipe(**settings)
    assert f"--{next(iter(settings))}" in str(error.value)
