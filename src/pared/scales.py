"""Factors around the blocks that follow from the hidden size: of the input embeddings, and between the last norm and the head.

Measured on small instances: what enters the first block when the embeddings are doubled, and what enters the head, over
what the last norm gives. A model that loses hidden channels has these factors made up for in its weights.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pared import modeling
from pared.errors import ModelError
from pared.miniature import Miniature, probe_ids, random_model
from pared.per_layer import blocks
from pared.structure import HIDDEN, raw_key

_SAME = 1e-3  # relative spread of the elements' ratios up to which they are one factor (some are kept in bfloat16)


@dataclass(frozen=True)
class Scales:
    """What embeddings and what leaves the last norm are multiplied with."""

    embeddings: float = 1.0
    head: float = 1.0


def measured(small: Miniature, hidden: int | None = None) -> Scales:
    """The scales of instances with a hidden size, None for the miniature's own. ModelError where there is none."""
    try:
        made = small.make(**({} if hidden is None else {raw_key(small.config, HIDDEN): hidden}))
        return _scales(random_model(made))
    except (*modeling.REJECTED, RuntimeError, IndexError, AssertionError) as error:
        raise ModelError(f"no small instance has {hidden} hidden channels: {error}") from error


def at_hidden(small: Miniature, hidden: int) -> Scales:
    """The scales at a hidden size: measured, or where no instance can be made, by the power that they follow."""
    with contextlib.suppress(ModelError):
        return measured(small, hidden)
    base = getattr(small.make(), HIDDEN)
    one, two = measured(small, base), measured(small, 2 * base)

    def carried(a: float, b: float) -> float:
        power = round(4 * math.log2(b / a)) / 4
        return float(a * (hidden / base) ** power)

    return Scales(carried(one.embeddings, two.embeddings), carried(one.head, two.head))


def follow_hidden(small: Miniature) -> bool:
    """Whether either scale is another one at another hidden size."""
    try:
        one, two = measured(small), measured(small, 2 * getattr(small.make(), HIDDEN))
    except ModelError:
        return False
    return any(abs(a / b - 1) > 1e-6 for a, b in ((one.embeddings, two.embeddings), (one.head, two.head)))


def last_norm(model: nn.Module) -> str | None:
    """The name of the last norm with weights outside of the blocks."""
    prefix = blocks(model)[0] + "."  # type: ignore[arg-type]
    found = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not n.startswith(prefix)]
    return next((n for n in reversed(found) if getattr(model.get_submodule(n), "weight", None) is not None), None)


def _scales(model: PreTrainedModel) -> Scales:
    seen: dict[str, Tensor] = {}
    embedding, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), last_norm(model)
    factor = 1.0

    def doubled(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * factor

    def enters(key: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[key] = (args[0] if args else kwargs["hidden_states"]).double()

        return look

    def leaves(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["norm"] = output.double()

    handles = [embedding.register_forward_hook(doubled)]
    handles.append(blocks(model)[1][0].register_forward_pre_hook(enters("block"), with_kwargs=True))
    if head is not None and norm is not None:
        handles.append(head.register_forward_pre_hook(enters("head"), with_kwargs=True))
        handles.append(model.get_submodule(norm).register_forward_hook(leaves))
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(), use_cache=False)
            once, out = seen["block"], _ratio(seen.get("head"), seen.get("norm"))
            factor = 2.0
            model(input_ids=probe_ids(), use_cache=False)
            table = embedding.get_parameter("weight").double()[probe_ids()]
    finally:
        for handle in handles:
            handle.remove()
    return Scales(_ratio(seen["block"] - once, table), out)


def _ratio(value: Tensor | None, of: Tensor | None) -> float:
    """The factor between two tensors; 1 where it is not one and the same for all of their elements."""
    if value is None or of is None or value.shape != of.shape:
        return 1.0
    ratio = float((value * of).sum() / (of * of).sum())
    spread = float((value - ratio * of).abs().max() / value.abs().max().clamp(min=1e-12))
    return ratio if spread < _SAME and ratio > 0 else 1.0
