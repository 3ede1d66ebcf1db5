"""Recipes: everything that decides a pruning run, as one validated record that is saved beside its result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pared.errors import UsageError

Settings = TypeVar("Settings", bound=BaseModel)
Structure = Literal["kv", "query", "ffn", "expert", "hidden", "layer", "attention", "mlp", "vocab"]
# LLM-Pruner's names for what to remove, for people who come from it.
STRATEGIES: dict[Any, tuple[str, ...]] = {"block-wise": ("kv", "ffn"), "channel-wise": ("hidden",), "layer-wise": ("layer",)}

# Calibration windows, and how many of them the highest effort takes.
WINDOWS, MOST_WINDOWS = 128, 512


class Recipe(BaseModel):
    """Settings of one run. Unknown keys are refused; a recipe can not name code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    remove: float | None = Field(
        default=0.2, description="share to remove, in (0, 1); of the vocabulary alone by default all that is not needed"
    )
    of: Literal["params", "block-params", "flops", "kv-cache"] = Field(
        default="block-params", description="what the share is of; params for the vocabulary alone"
    )
    structures: tuple[Structure, ...] | None = Field(
        default=None, description="what may be removed; by default heads and FFN channels, of experts channels"
    )
    narrow: bool | None = Field(
        default=None,
        description="whether hidden channels may go as well, in a basis of their own; by default where no structures are "
        "named and that was measured to lose less",
    )
    effort: Literal["quick", "default", "max"] = Field(
        default="default",
        description="quick: refit on dense inputs; default: refit in the walk, a short reconstruction; max: a longer search and reconstruction",
    )
    keep_tokens_from: str | None = Field(
        default=None, description="for vocab: .txt, .jsonl or hub data set whose tokens are kept"
    )
    min_count: int = Field(default=1, ge=1, description="for vocab: tokens seen less often than this are not needed")
    criterion: str | None = Field(
        default=None, description="how importance is measured; by default the best that fits the structures"
    )
    reduction: Literal["sum", "mean", "max", "prod", "first", "last"] = Field(
        default="sum", description="how the parts of a structure in several tensors become one score"
    )
    shape: Literal["uniform", "per-layer"] = Field(default="uniform", description="equal sizes in all layers, or each its own")
    allocate: Literal["uniform", "global", "search", "latency"] | None = Field(
        default=None,
        description="by default uniform; for per-layer shapes search, and global where effort is quick; latency: the share is of "
        "the time that blocks take here",
    )
    latency_batch: int = Field(
        default=1, ge=1, description="for latency: sequences of --context tokens that are timed together"
    )
    latency_table: str | None = Field(
        default=None, description="for latency: file that measured times are kept in and read from"
    )
    search_steps: int | None = Field(default=None, ge=1, description="generations of a search; by default by effort")
    search_minutes: float | None = Field(
        default=None, gt=0, description="end a search after this time as well; its result then depends on the machine"
    )
    compensate: Literal["none", "bias", "refit", "sequential"] | None = Field(
        default=None, description="how what stays is refitted to make up for what went; by default by effort"
    )
    add_bias: bool | None = Field(
        default=None,
        description="matrices back into the residual stream get a bias where the model has none; by default with "
        "--compensate bias",
    )
    reconstruct: int | None = Field(
        default=None, ge=0, description="steps of gradient descent on each block after its refit; by default by effort"
    )
    step_windows: int | None = Field(
        default=None,
        ge=1,
        description="windows in each step of --reconstruct; by default --batch, and 1 in the steps of the default effort",
    )
    align: int | None = Field(
        default=None, ge=1, description="kept channels are a multiple of this; by default a fine power of two"
    )
    keep_first: int = Field(default=0, ge=0, description="layers at the start that are left alone")
    keep_last: int = Field(default=0, ge=0, description="layers at the end that are left alone")
    iterative_steps: int = Field(default=1, ge=1, description="remove in this many steps, measuring anew after each")
    calibration: str = Field(default="self", description="text file, .jsonl, hub data set, or self: text that the model writes")
    samples: int | None = Field(
        default=None,
        description=f"calibration windows; by default {WINDOWS}, and at the highest effort up to {MOST_WINDOWS}, as the text has them",
    )
    seq_len: int | None = Field(default=None, description="tokens in a window; by default 512, or what the model can take")
    batch: int = Field(default=8, ge=1, description="windows that run together")
    context: int = Field(default=1024, ge=1, description="tokens that flops are counted at, and a time is measured for")
    seed: int = Field(default=0, description="of calibration windows, sampled text and random choices")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="what to compute in")
    device: str = Field(default="cpu", description="where to compute")

    @field_validator("structures", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        named = [v.strip() for v in value.split(",")] if isinstance(value, str) else value
        if not isinstance(named, list | tuple):
            return value
        return tuple(dict.fromkeys(s for v in named for s in STRATEGIES.get(v, (v,))))

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and cls._split(data.get("structures")) in (("vocab",), ["vocab"]):
            return {"remove": None, "of": "params", **data}
        return data

    @property
    def windows(self) -> int:
        """Calibration windows. Gradient descent on the blocks wants more of them than the solves do."""
        if self.samples is not None:
            return self.samples
        return MOST_WINDOWS if self.effort == "max" else WINDOWS

    @property
    def step_of(self) -> int:
        """Calibration windows in a step of reconstruction."""
        return self.step_windows or self.batch

    @property
    def share(self) -> float:
        """The share to remove; where a text decides about the amount, one that stands for none in particular."""
        return 0.5 if self.remove is None else self.remove

    def to_yaml(self) -> str:
        data = self.model_dump(mode="json")
        return yaml.safe_dump(data, sort_keys=False)


def make_recipe(base: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    """A recipe from a base and settings that override it. UsageError names the setting that is wrong."""
    return validated(Recipe, base, settings)


def validated(kind: type[Settings], base: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Settings:
    """Settings of one kind, from a base and those that override it. UsageError names the one that is wrong."""
    data = {**(base or {}), **{k: v for k, v in settings.items() if v is not None}}
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else kind.__name__.lower()
        unknown = first["type"] == "extra_forbidden"
        near = difflib.get_close_matches(name, kind.model_fields, 1) if unknown else []
        raise UsageError(
            f"unknown setting {name!r}" if unknown else f"{first['msg']}: {first['input']!r}",
            where=f"--{name.replace('_', '-')}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        ) from error


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with pared."""
    return {p.stem: p for p in sorted(Path(str(files("pared") / "recipes")).glob("*.yaml"))}


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The settings in a recipe file, or in the shipped recipe of that name."""
    path = shipped_recipes().get(str(name), Path(name))
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        near = difflib.get_close_matches(str(name), shipped_recipes(), 1)
        raise UsageError(
            f"no recipe {str(name)!r}", fix=f"did you mean {near[0]!r}?" if near else "pared ls recipes lists those that ship"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError("the recipe is not YAML", where=path) from error
    if not isinstance(data, dict):
        raise UsageError("the recipe holds no settings", where=path)
    make_recipe(data)
    return data
