"""Routers of experts: which experts the tokens visit, and what a router does when it may choose from some alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pared.axes import Name
from pared.structure import Layout

# A logit that no router chooses: exp and sigmoid of it are exactly zero, and sums of a few are still finite.
NEVER = -1e30


@dataclass(frozen=True)
class Visits:
    """One batch of tokens on its way into a block's experts.

    hidden: [tokens, hidden]. index: int64 [tokens, k], the experts that each token visits. gate: [tokens, k], what
    their outputs are multiplied with. output: j -> [tokens, hidden], the output of every token's j-th expert, without
    the gate.
    """

    hidden: Tensor
    index: Tensor
    gate: Tensor
    output: Callable[[int], Tensor]


def expert_modules(layout: Layout, layer: int, block: nn.Module) -> list[nn.Module]:
    """The modules of a block that hold its experts, one stack of matrices for all of them."""
    found: dict[str, nn.Module] = {}
    for name in layout.block_tensors(layer):
        if len(layout.shapes[name]) == 3 and layout.tensors[name].dims[0] == Name("expert"):
            owner = layout.local(name).rpartition(".")[0]
            found[owner] = block.get_submodule(owner)
    return list(found.values())


@contextlib.contextmanager
def watched(modules: Sequence[nn.Module], see: Callable[[Visits], None]) -> Iterator[None]:
    """Call `see` with what the experts are given whenever their block runs.

    Experts say which tokens they are given by their arguments: hidden states, one integer tensor [tokens, k], and one
    of gates of the same shape. Of experts that have other arguments nothing is seen.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visits = _visits(module, args, kwargs)
        if visits is not None:
            with torch.no_grad():
                see(visits)

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _visits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Visits | None:
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {k: v.detach() for k, v in given.items() if isinstance(v, Tensor)}
    at_index = next((k for k, v in tensors.items() if v.dtype == torch.int64 and v.ndim == 2), None)
    if at_index is None:
        return None
    index = tensors.pop(at_index)
    at_gate = next((k for k, v in tensors.items() if v.shape == index.shape), None)
    at_hidden = next((k for k, v in tensors.items() if k != at_gate and v.is_floating_point()), None)
    if at_gate is None or at_hidden is None:
        return None
    hidden, gate = tensors[at_hidden], tensors[at_gate]

    def output(j: int) -> Tensor:
        chosen = {**given, at_hidden: hidden, at_index: index[:, j : j + 1], at_gate: torch.ones_like(gate[:, :1])}
        # The class's own code, past the hooks.
        return (
            type(module)
            .forward(module, *(chosen[i] for i in range(len(args))), **{k: v for k, v in chosen.items() if isinstance(k, str)})
            .reshape(len(index), -1)
        )

    return Visits(hidden, index, gate, output)


@contextlib.contextmanager
def restricted(model: nn.Module, layout: Layout, removed: Mapping[int, Tensor]) -> Iterator[None]:
    """The routers of a model (fp32, changed in place) choose as if some experts did not exist.

    removed: layer -> experts int64 [n]. Their logits, where the router's matrix makes them, and all that a router adds
    for each expert are so low that neither softmax nor sigmoid nor a choice of the best gives them anything.
    """
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    routers: dict[int, Tensor] = {}
    for layer, gone in removed.items():
        for name in layout.block_tensors(layer):
            signature, tensor = layout.tensors[name], state.get(name)
            if tensor is None:
                continue
            if signature.axes == {"expert"}:
                with torch.no_grad():
                    tensor.index_fill_(signature.dims_of("expert")[0], gone, NEVER)
            elif tensor.ndim == 2 and signature.dims[0] == Name("expert"):
                routers[tensor.data_ptr()] = gone
    with _Restricted(routers):
        yield


class _Restricted(TorchFunctionMode):
    """Lowers the logits of some experts wherever a router's matrix is multiplied with tokens."""

    def __init__(self, routers: dict[int, Tensor]) -> None:
        super().__init__()
        self._routers = routers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and (gone := self._routers.get(args[1].data_ptr())) is not None:
            return out.index_fill(-1, gone, NEVER)
        return out
