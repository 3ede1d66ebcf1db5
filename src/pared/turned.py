"""A model in another basis of its residual stream, block by block: what a walk that narrows the stream goes through.

Hidden states are turned as they enter, blocks as they are used, and what leaves the last one is turned back for the norm
and the head behind it. Hidden states of the first channels alone are those of a model that was cut to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.calibration import Batch
from pared.rotation import Rotation, turned_block
from pared.spill import States
from pared.stream import Stream


class TurnedStream(Stream):
    """The model of a stream in the basis of a rotation."""

    def __init__(self, stream: Stream, rotation: Rotation) -> None:
        self.__dict__.update(stream.__dict__)
        self.rotation = rotation
        self._basis = rotation.basis.to(self.device, torch.float32)
        last = next(norm for reader, norm in rotation.fed_by.items() if self.layout.layer_of(reader) is None)
        self._last_norm = self.model.get_submodule(last.rpartition(".")[0])

    @contextlib.contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        with super().block(i) as block:
            turned = turned_block(self, block, i, self.rotation)
            if self.weights is not None:  # the other has been of use
                self.weights.unload(self.layout.block_tensors(i))
            yield turned

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> States:
        return self.pool.store((h.float() @ self._basis).to(h) for h in super().embed(batches).drain())

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, vocab] from what leaves the last block, [b, s, hidden] or the first of its channels."""
        kept = hidden.shape[-1]
        whole = F.pad(hidden.float(), (0, len(self._basis) - kept)) @ self._basis.T
        # The norm over all channels divides by what one over the first few divides by, but for the energy that those hold.
        held = self.rotation.held(kept) ** 0.5
        handle = self._last_norm.register_forward_hook(lambda module, args, out: out * held)
        try:
            return super().logits(whole.to(hidden))
        finally:
            handle.remove()
