"""What a recipe leaves open, decided for one model: structures, criterion, allocation, calibration."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from pared import modeling
from pared.calibration import Calibration, load_calibration, sample_from_model
from pared.criteria import WHOLE, get_criterion
from pared.effort import GENERATIONS, narrows, reconstruction, tried
from pared.errors import ModelError
from pared.recipe import WINDOWS, Recipe, make_recipe
from pared.source import Source
from pared.structure import SUBLAYERS, Layout

DEFAULT_STRUCTURES = ("kv", "query", "ffn")
DEFAULT_SEQ_LEN = 512


def default_structures(layout: Layout) -> tuple[str, ...]:
    """What goes where nothing is named: heads and FFN channels, but of mixtures of experts channels alone.

    There heads are few of the parameters and serve every token: an equal share of them was measured to cost more.
    """
    routed = any(layout.prunable(a) and parent == "expert" for a, parent in layout.parents.items())
    return ("ffn",) if routed else DEFAULT_STRUCTURES


def resolve_axes(layout: Layout, structures: tuple[str, ...] | None, *, shape: str = "per-layer") -> tuple[str, ...]:
    """The axes that the named structures are in this model. ModelError where one is not proved, with the reason.

    shape: "uniform" leaves out axes that the family's config has no size for; where nothing else is left, that is said.
    """
    chosen: list[str] = []
    apart: list[str] = []
    for structure in structures or default_structures(layout):
        named = [a for a in layout.proofs if a == structure or (structure == "ffn" and a.endswith("ffn"))]
        proved = [a for a in named if layout.prunable(a)]
        if shape == "uniform" and (odd := [a for a in proved if not layout.prunable(a, stock=True)]):
            if structures is not None:
                raise _only_per_layer(layout, odd)
            apart += odd
            proved = [a for a in proved if a not in odd]
        if not proved and structures is not None:
            reason = (
                "; ".join(layout.proofs[a].reason for a in named)
                or f"no layout with more than one unit of it was found in {layout.model_type}"
            )
            raise ModelError(
                f"{structure!r} can not be removed from this model: {reason}",
                where="--structures",
                fix=f"it can lose {', '.join(a for a in layout.proofs if layout.prunable(a)) or 'nothing'}",
            )
        chosen += proved
    if not chosen and apart:
        raise _only_per_layer(layout, apart)
    if not chosen:
        raise ModelError(f"no structure of {layout.model_type} is proved to be removable", fix="pared inspect says why")
    return tuple(dict.fromkeys(chosen))


def removable(layout: Layout) -> tuple[tuple[str, ...], str]:
    """What is removed by default and the shape that can say it: uniform, or per-layer where the config has no words for it."""
    for shape in ("uniform", "per-layer"):
        with contextlib.suppress(ModelError):
            return resolve_axes(layout, None, shape=shape), shape
    return (), "uniform"  # nothing is proved; the proofs say why


def _only_per_layer(layout: Layout, axes: list[str]) -> ModelError:
    return ModelError(
        f"a {layout.model_type} config has no sizes of its own for {', '.join(axes)}: no stock checkpoint can say the result",
        where="--shape uniform",
        fix="--shape per-layer, which carries them in a form of its own",
    )


def scored_axes(layout: Layout, recipe: Recipe) -> tuple[str, ...]:
    """The axes whose units are scored: all but the vocabulary, about which a text decides."""
    return tuple(a for a in resolve_axes(layout, recipe.structures, shape=recipe.shape) if a != "vocab")


def resolve(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with everything that it left open decided.

    Second-order selection where every structure is a dense layer's own; weighted by gradients where layers compete by
    score. Layers beside them go by the loss without. Where only what is whole goes (layers, attention, MLPs): its
    influence, at the highest effort the loss without. Elsewhere (experts' channels, hidden channels) first-order Taylor
    scores all kinds alike.
    """
    axes = scored_axes(source.layout, recipe)
    if not axes:
        narrows(recipe, source.layout, axes)  # which says where that can not be
        return recipe
    inside = not {"layer", "hidden"} & set(axes)
    routed = {"expert", *(a for a, parent in source.layout.parents.items() if parent == "expert")}
    inner = {a for a in axes if a not in SUBLAYERS} | (routed if "mlp" in axes else set())
    inner -= {"layer"} if inner - {"layer"} else set()  # scored by themselves then
    dense = all(a in get_criterion("obs").axes_or(axes) and a not in routed for a in inner)
    quick = recipe.effort == "quick"
    dense_inputs = quick and not recipe.reconstruct and recipe.criterion != "rotation"
    compensate = recipe.compensate or ("refit" if dense_inputs else "sequential")
    searches = (
        tried(source.layout, axes)
        and not quick
        and compensate == "sequential"
        and recipe.criterion in (None, "obs", "obs-fisher")
    )
    allocate = recipe.allocate or ("uniform" if recipe.shape == "uniform" or not inside else "search" if searches else "global")
    criterion = recipe.criterion
    if criterion is None and set(axes) <= set(WHOLE):
        criterion = "perplexity" if recipe.effort == "max" else "block_influence"
    elif criterion is None:
        criterion = "taylor" if not dense else "obs-fisher" if allocate in ("global", "search", "latency") else "obs"
    steps, together = reconstruction(recipe, compensate, allocate)
    generations = recipe.search_steps or GENERATIONS[recipe.effort]
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    seq_len = recipe.seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    resolved = make_recipe(
        recipe.model_dump(),
        allocate=allocate,
        criterion=criterion,
        compensate=compensate,
        add_bias=compensate == "bias" if recipe.add_bias is None else recipe.add_bias,
        reconstruct=steps,
        step_windows=together,
        search_steps=generations if allocate == "search" else recipe.search_steps,
        seq_len=seq_len,
    )
    narrows(resolved, source.layout, axes)
    return resolved


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """What blocks are computed in: on a CPU fp32 unless told otherwise, on a GPU what the checkpoint has."""
    if recipe.dtype != "auto":
        return modeling.COMPUTE[recipe.dtype]
    return torch.float32 if recipe.device == "cpu" else None


def calibrate(source: Source, recipe: Recipe, ids: torch.Tensor | None = None) -> Calibration:
    """Calibration windows as the recipe says."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)

    def sampler(samples: int, length: int, seed: int) -> torch.Tensor:
        model = source.resident(compute_dtype(recipe), recipe.device)
        return sample_from_model(model, source.get_tokenizer(), samples, length, seed)

    what: Any = ids if ids is not None else recipe.calibration
    tokenizer = cast(PreTrainedTokenizerBase, source.tokenizer) if ids is not None else source.get_tokenizer()
    return load_calibration(
        what,
        tokenizer,
        samples=recipe.windows,
        seq_len=recipe.seq_len or DEFAULT_SEQ_LEN,
        seed=recipe.seed,
        sampler=sampler,
        max_positions=limit,
        least=WINDOWS if recipe.samples is None else None,
    )
