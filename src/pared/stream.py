"""Running a causal language model block by block: the engine behind every statistic, gradient and evaluation.

The model's own code around its decoder blocks (embedding, masks, rotary tables, final norm, head) is run with the
blocks replaced by stand-ins: in the first pass they record what each block is called with, in the last one they hand
in the hidden states. Between the two, one block at a time is loaded, run over every batch, and freed. A model that is
resident already goes the same way, with nothing to load, so both give the same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling, process
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.distributed import Share
from pared.errors import ModelError
from pared.spill import Pool, States
from pared.structure import Layout


class _StandIn(nn.Module):
    """Takes a block's place while the code around the blocks runs."""

    def __init__(self, block: nn.Module, act: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_act", act)

    def __getattr__(self, name: str) -> Any:  # attention_type and the like, which some models read off a block
        return getattr(self._block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._act(args, kwargs)


@dataclass
class Calls:
    """What one block is called with, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool


# Tokens of a sequence that are enough to see how a block works.
PROBE = 64

Visit = Callable[[int, nn.Module, States], States]
Around = Callable[[int, nn.Module], contextlib.AbstractContextManager[None]]


def nothing_around(i: int, block: nn.Module) -> contextlib.AbstractContextManager[None]:
    """No hooks on a block."""
    return contextlib.nullcontext()


class _Ahead:
    """Reads the block that comes next, in the order in which the last two came, while one is at work; where reading takes
    so little against the work that waiting for it is not felt, it is left until it is needed, and so is its memory."""

    SHARE = 0.05

    def __init__(self, weights: modeling.Weights, layout: Layout, dtype: torch.dtype | None, device: torch.device) -> None:
        self._weights, self._dtype, self._device = weights, dtype, device
        self._layout = layout
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pared-ahead")
        if device.type == "cuda":  # memory is page-locked for the current device, which every thread has one of
            self._reader.submit(torch.cuda.set_device, device)
        self._last: int | None = None
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._since = self._reading = 0.0

    def take(self, i: int) -> dict[str, Tensor]:
        """What block i is made of, read before or now; begins with the one after it where that is worth while."""
        foreseen, self._next = self._next, None
        began = time.monotonic()
        got = foreseen[1].result() if foreseen is not None and foreseen[0] == i else self._fetch(self._layout.block_tensors(i))
        after = 2 * i - self._last if self._last is not None and abs(i - self._last) == 1 else -1
        worked, self._since = began - self._since, time.monotonic()
        self._last = i
        if 0 <= after < self._layout.num_layers and self._reading >= self.SHARE * worked:
            self._next = after, self._reader.submit(self._fetch, self._layout.block_tensors(after))
        return got

    def _fetch(self, names: list[str]) -> dict[str, Tensor]:
        began = time.monotonic()
        got = self._weights.fetch(names, self._dtype, self._device)
        self._reading = time.monotonic() - began
        return got


class Stream:
    """A causal language model that runs block by block.

    Made from a checkpoint (blocks are read when they are used and freed after) or from a live model (nothing is moved).
    dtype: what to compute in; None keeps the weights' own. pool: where hidden states wait. ahead: read the next block
    while one is at work, which takes the memory of one more.
    """

    def __init__(
        self,
        source: Checkpoint | PreTrainedModel,
        layout: Layout,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        pool: Pool | None = None,
        ahead: bool = False,
    ) -> None:
        self.layout, self.dtype, self.device = layout, dtype, process.with_index(device)
        self.pool = pool or Pool()
        self.share: Share | None = None  # which of the sequences of all processes are here, where they are some
        if isinstance(source, PreTrainedModel):
            self.model, self.weights = source, None
            self.device = next(source.parameters()).device
        else:
            if self.pool.room is None:
                process.keep_freed_memory()
            else:
                process.keep_no_freed_memory()
            config, per_layer = modeling.make_config(source.config)
            self.model = modeling.skeleton(config, per_layer, dtype=dtype or modeling.checkpoint_dtype(source))
            self.weights = modeling.Weights(source, self.model)
        self._ahead = _Ahead(self.weights, layout, dtype, self.device) if ahead and self.weights is not None else None
        self._layers = modeling.blocks(self.model)[1]
        self._calls: dict[tuple[int, ...], list[Calls]] = {}
        self.around: Around = nothing_around  # hangs around each block while all batches run through it
        self._tuples = False  # whether blocks return a tuple: what a stand-in has to return too

    @property
    def num_layers(self) -> int:
        return self.layout.num_layers

    # ---- the parts of the model ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Block i, resident and in eval mode; its memory is given back on leaving."""
        block = self._layers[i]
        if self.weights is None:
            training = block.training
            try:
                with _plain_experts(self.model):
                    yield block.eval()
            finally:
                block.train(training)
            return
        names = self.layout.block_tensors(i)
        self.weights.load(names, self.dtype, self.device, self._ahead.take(i) if self._ahead else None)
        modeling.fill_buffers(self.model, block, self.device)
        try:
            with _plain_experts(self.model):
                yield block
        finally:
            self.weights.unload(names)
            for p in block.parameters():
                p.grad = None

    @contextlib.contextmanager
    def outside(self, *, front: bool) -> Iterator[None]:
        """What lies before (front) or after the blocks, resident. The large matrix of the other end stays on disk."""
        if self.weights is None:
            yield
            return
        other = self.model.get_output_embeddings() if front else self.model.get_input_embeddings()
        left_out = {id(p) for p in other.parameters()} if other is not None else set()
        keep = self.model.get_input_embeddings() if front else self.model.get_output_embeddings()
        left_out -= {id(p) for p in keep.parameters()} if keep is not None else set()
        state = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        names = [n for n in self.layout.tensors if self.layout.layer_of(n) is None and id(state[n]) not in left_out]
        self.weights.load(names, self.dtype, self.device)
        modeling.fill_buffers(self.model, self.model, self.device)
        try:
            yield
        finally:
            self.weights.unload(names)
            self.model.tie_weights()

    # ---- running ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> States:
        """The hidden states that enter block 0: for each batch [b, s, hidden]."""
        entered = self.pool.store()
        with self.outside(front=True):
            for batch in batches:
                ids = batch.input_ids.to(self.device)
                hidden, calls = self._enter(ids)
                entered.append(hidden)
                # Gradients run rows of a batch on their own, and blocks are taken apart on few tokens.
                for part in (ids[:1], ids[:1, :PROBE]):
                    if tuple(part.shape) not in self._calls:
                        self._enter(part)
                if not _agree(calls[0], self._calls[1, ids.shape[1]][0]):
                    raise ModelError(
                        "the positions or masks of this model follow from its tokens, and those of the texts given differ",
                        where="calibration",
                        fix="give texts of equal length whose special tokens stand in the same places, or texts without any",
                    )
        return entered

    def _enter(self, ids: Tensor) -> tuple[Tensor, list[Calls]]:
        calls: list[Calls] = []
        first: list[Tensor] = []

        def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            first.append(hidden)
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            calls.append(Calls(args[1:], rest, not args))
            return (hidden,) if self._tuples else hidden

        base = getattr(self.model, self.model.base_model_prefix, self.model)
        with self._stand_ins([record] * self.num_layers):
            try:
                base(input_ids=ids, use_cache=False)
            except (AttributeError, TypeError, RuntimeError, IndexError) as error:
                if self._tuples:
                    raise ModelError(f"this model can not be run block by block: {error}") from error
                # Some families' blocks return a tuple; the code around them fails at once on anything else.
                self._tuples = True
                return self._enter(ids)
        self._calls.setdefault(tuple(ids.shape), calls)
        return first[0], calls

    @contextlib.contextmanager
    def _stand_ins(self, acts: Sequence[Callable[..., Any]]) -> Iterator[None]:
        originals = list(self._layers)
        training = self.model.training
        self.model.eval()
        for i, act in enumerate(acts):
            self._layers[i] = _StandIn(originals[i], act)
        try:
            yield
        finally:
            for i, block in enumerate(originals):
                self._layers[i] = block
            self.model.train(training)

    def run(self, block: nn.Module, i: int, hidden: Tensor) -> Tensor:
        """One block on one batch of hidden states [b, s, hidden]."""
        call = self._calls[tuple(hidden.shape[:2])][i]
        out = block(hidden_states=hidden, **call.kwargs) if call.by_name else block(hidden, *call.args, **call.kwargs)
        self._tuples = isinstance(out, tuple | list)
        return out[0] if self._tuples else out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, vocab] from the hidden states that leave the last block. Needs `outside(front=False)`."""
        last = self.num_layers - 1

        def inject(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (hidden,) if self._tuples else hidden

        def ignore(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entered = args[0] if args else kwargs["hidden_states"]
            return (entered,) if self._tuples else entered

        placeholder = torch.zeros_like(hidden, requires_grad=False)
        with self._stand_ins([ignore] * last + [inject]):
            return self.model(inputs_embeds=placeholder, use_cache=False).logits

    def forward(
        self,
        batches: Sequence[Batch],
        visit: Visit | None = None,
        *,
        start: tuple[int, States] | None = None,
        after: Callable[[int, States], None] | None = None,
    ) -> States:
        """All batches through all blocks. `visit` may take a block's place: (i, block, inputs) -> outputs.

        start: the block to begin with, and what enters it. after: called with what leaves each block.
        """
        hidden = self.embed(batches)  # in any case: it shows what the blocks are called with
        first, hidden = start or (0, hidden)
        for i in range(first, self.num_layers):
            with self.block(i) as block, torch.no_grad(), self.around(i, block):
                hidden = self.through(block, i, hidden) if visit is None else visit(i, block, hidden)
            if after is not None:
                after(i, hidden)
        return hidden

    def through(self, block: nn.Module, i: int, hidden: States, *, keep: bool = False) -> States:
        """One block on every batch. What went in is given up on the way, unless `keep`."""
        return self.pool.store(self.run(block, i, h) for h in (hidden if keep else hidden.drain()))


def _agree(call: Calls, single: Calls) -> bool:
    """Whether every row of a batch's call is what the call of a single row is, so that one can stand for all."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, tuple | list):
            return all(map(same, one, other))
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape[1:] == other.shape[1:] and len(other) == 1:
            return bool((one == other).all())
        return True

    return same(call.args, single.args) and all(same(v, single.kwargs.get(k)) for k, v in call.kwargs.items())


def unpadded(batches: Sequence[Batch]) -> list[Batch]:
    """The same documents without padding: rows are trimmed to their own tokens and those of equal length put together.

    Padding can then touch no statistic, on whichever side it was.
    """
    out: list[Batch] = []
    for batch in batches:
        if batch.attention_mask is None or bool(batch.attention_mask.all()):
            out.append(Batch(batch.input_ids, None))
            continue
        by_length: dict[int, list[Tensor]] = {}
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            row = ids[mask.bool()]
            if len(row) > 1:
                by_length.setdefault(len(row), []).append(row)
        out.extend(Batch(torch.stack(rows), None) for _, rows in sorted(by_length.items()))
    return out


@contextlib.contextmanager
def _plain_experts(model: PreTrainedModel) -> Iterator[None]:
    """Have experts run as a plain loop, where the input of every expert's matrices can be observed."""
    configs = _configs(model)
    before = [c._experts_implementation for c in configs]
    for config in configs:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._experts_implementation = own


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Observing what a block's matrices are multiplied with

# name of the weight inside the block, input [tokens, n], the expert it belongs to (None where there are none)
Observe = Callable[[str, Tensor, int | None], None]


@contextlib.contextmanager
def observed(block: nn.Module, names: Sequence[str], observe: Observe) -> Iterator[None]:
    """Call `observe` with the inputs of the named weights (local names) whenever the block runs."""
    handles, stacked = [], {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = block.get_submodule(owner)
        weight = getattr(module, leaf)
        if weight.ndim == 3:
            stacked[name] = weight
        else:

            def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                observe(name, args[0].detach().reshape(-1, args[0].shape[-1]), None)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        if stacked:
            with _ExpertInputs(stacked, observe):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _ExpertInputs(TorchFunctionMode):
    """Sees the products with single experts' slices of 3-D weights: F.linear(x, w[e]) and x @ w[e]."""

    def __init__(self, weights: dict[str, Tensor], observe: Observe) -> None:
        super().__init__()
        self._observe = observe
        self._ranges = [(w.data_ptr(), w.stride(0) * w.element_size(), w.shape[0], name) for name, w in weights.items()]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
            and isinstance(args[1], Tensor)
            and args[1].ndim == 2
        ):
            at = args[1].data_ptr()
            for start, step, count, name in self._ranges:
                if start <= at < start + step * count:
                    self._observe(name, args[0].detach().reshape(-1, args[0].shape[-1]), (at - start) // step)
        return func(*args, **(kwargs or {}))
