"""One orthogonal basis for the residual stream of a whole model, so that hidden channels can go in the order of their energy.

RMS norms without their scales do not see a rotation of the stream: the scales are folded into the matrices that read them,
everything that writes to the stream is turned by Q and everything that reads it turned back, and the model gives the same
logits. Q is the principal basis of the tokens that the norms see, each at unit length. Computational invariance and the
basis as in SliceGPT (arXiv:2401.15024), with one Q for all blocks: what is left after the cut is a stock checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pared import surgery
from pared.axes import Name, names
from pared.calibration import Batch
from pared.distributed import once, total
from pared.errors import ModelError
from pared.journal import Journal
from pared.stream import Stream, unpadded
from pared.structure import Layout

# A turned block differs from the original by rounding alone; a norm that subtracts the mean, by everything.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rotation:
    """basis: float64 [hidden, hidden], a column for each new channel, by falling energy [hidden]; the energies sum to 1.

    fed_by: matrix that reads the stream -> the norm (its weight) in front of it. offsets: what a norm adds to its weight.
    """

    basis: Tensor
    energy: Tensor
    fed_by: dict[str, str]
    offsets: dict[str, float]

    def held(self, kept: int) -> float:
        """The share of the energy that the first channels hold."""
        return float(self.energy[:kept].sum())

    def factor(self, kept: int) -> float:
        """What norms over `kept` channels are multiplied with: the mean runs over fewer, and those hold a part of the energy."""
        return math.sqrt(len(self.energy) / kept * self.held(kept))

    def power(self, of: Mapping[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
        """Mean squares of gradients by channel, [hidden], in this basis, as if channels of the model's own did not correlate."""
        square = self.basis.square().float().T
        return {key: square @ value.to(square) for key, value in of.items()}

    def norm(self, name: str, old: Tensor, kept: int) -> Tensor:
        """The weight of a norm (its name, and the old weight) over so many channels."""
        return torch.full_like(old, self.factor(kept) - self.offsets[name])

    def reader(self, layout: Layout, read: Callable[[str], Tensor], kept: int) -> Callable[[str], Tensor]:
        """Tensors of the turned model, all channels still there, from those of the original by the same names."""

        def turned(name: str) -> Tensor:
            norm = self.fed_by.get(name)
            scale = None if norm is None else read(norm).double() + self.offsets[norm]
            old = read(name)
            if name in self.offsets:
                return self.norm(name, old, kept)
            return turn(layout, name, old, self.basis.to(old.device), scale)

        return turned

    def write(self, journal: Journal) -> None:
        """Note it, so that a run which stopped goes on in the same basis."""
        journal.write_tensors("rotation", {"basis": [self.basis], "energy": [self.energy]})
        journal.write("rotation", {"fed_by": self.fed_by, "offsets": self.offsets})

    @classmethod
    def read(cls, journal: Journal) -> Rotation:
        found, tensors = journal.read("rotation"), journal.read_tensors("rotation")
        return cls(tensors["basis"][0], tensors["energy"][0], found["fed_by"], found["offsets"])


def turn(layout: Layout, name: str, tensor: Tensor, basis: Tensor, scale: Tensor | None) -> Tensor:
    """A tensor in the new basis. scale: of the norm in front of a matrix, folded into the dimension that reads it."""
    out = tensor
    for dim, node in enumerate(layout.tensors[name].dims):
        if node == Name("hidden"):
            moved = out.double().movedim(dim, -1)
            if scale is not None and dim == layout.consumers.get(name):
                moved = moved * scale
            out = (moved @ basis).movedim(-1, dim)
    return out.to(tensor.dtype).contiguous()


def find_rotation(
    stream: Stream, batches: Sequence[Batch], progress: Callable[[str, int, int], None], name: str = "rotation"
) -> Rotation:
    """The principal basis of the stream on calibration tokens, and which norm is in front of what. name: for progress.

    ModelError, with the reason, where the model is not the same in another basis: each block is tried in one.
    """
    layout = stream.layout
    d = layout.sizes["hidden"]
    if odd := [n for n, s in layout.tensors.items() if any("hidden" in names(x) and x != Name("hidden") for x in s.dims)]:
        raise _refused(f"{odd[0]} holds hidden channels in an order of its own")
    trial = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    second = torch.zeros(d, d, dtype=torch.float64)
    found = Rotation(trial, torch.full((d,), 1 / d, dtype=torch.float64), {}, {})
    hidden = stream.embed(unpadded(batches))
    for i in range(stream.num_layers):
        with stream.block(i) as block, torch.no_grad():
            norms = _norms(layout, block, f"{layout.prefix}.{i}.")
            matrices = [n for n in layout.block_tensors(i) if n in layout.consumers and _reads(layout, n)]
            first = _feeds(stream, block, i, norms, matrices, hidden[0], found)
            handles = [norms[n].register_forward_pre_hook(_gather(second)) for n in first]
            before, sample = hidden[0], None
            after = stream.pool.store()
            for h in hidden.drain():
                after.append(stream.run(block, i, h))
                sample = after[0] if sample is None else sample
            for handle in handles:
                handle.remove()
            _check(stream, block, i, found, before, after[0])
            hidden = after
        progress(name, i + 1, stream.num_layers)
    _outside(stream, found)
    for h in hidden.drain():
        _gather(second)(nn.Identity(), (h,))
    total(second)
    energy, basis = once(lambda: tuple(torch.linalg.eigh(second / second.trace())))  # one basis for all processes
    return Rotation(basis.flip(1), energy.flip(0).clamp(min=0), found.fed_by, found.offsets)


def _refused(why: str) -> ModelError:
    return ModelError(
        f"this model can not be rotated: {why}", where="--criterion rotation", fix="choose channels instead: --criterion taylor"
    )


def _reads(layout: Layout, name: str) -> bool:
    return layout.tensors[name].dims[layout.consumers[name]] == Name("hidden")


def _norms(layout: Layout, module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The norms over the hidden channels in a module, by the full name of their weight."""
    out = {}
    for name, part in module.named_modules():
        full = f"{prefix}{name}.weight"
        known = full in layout.tensors and layout.tensors[full].dims == (Name("hidden"),)
        if known and "norm" in type(part).__name__.lower():
            out[full] = part
    return out


def _gather(second: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = torch.nn.functional.normalize(args[0].reshape(-1, args[0].shape[-1]).float(), dim=-1)
        second.add_((x.T @ x).double().cpu())

    return hook


def _feeds(
    stream: Stream,
    block: nn.Module,
    i: int,
    norms: dict[str, nn.Module],
    matrices: list[str],
    hidden: Tensor,
    found: Rotation,
) -> list[str]:
    """Note the norm whose output each matrix reads; gives the norms."""
    outputs: dict[int, str] = {}
    alive: list[Tensor] = []  # an address means one tensor for as long as it lives
    inputs: dict[str, int] = {}
    handles = []
    for name, module in norms.items():

        def gave(m: nn.Module, args: object, out: Tensor, name: str = name) -> None:
            alive.append(out)
            outputs[out.untyped_storage().data_ptr()] = name

        handles.append(module.register_forward_hook(gave))
    for name in matrices:

        def reads(m: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0].untyped_storage().data_ptr()

        owner = block.get_submodule(stream.layout.local(name).rpartition(".")[0])
        handles.append(owner.register_forward_pre_hook(reads))
    try:
        stream.run(block, i, hidden)
    finally:
        for handle in handles:
            handle.remove()
    for name in matrices:
        if inputs.get(name) not in outputs:
            raise _refused(f"{name} does not read what a norm gives")
        found.fed_by[name] = outputs[inputs[name]]
    if idle := norms.keys() - set(found.fed_by.values()):
        raise _refused(f"{min(idle)} scales what is written to the stream, and not what is read from it")
    found.offsets.update({n: surgery.norm_offset(m) for n, m in norms.items()})
    return list(norms)


def turned_block(stream: Stream, block: nn.Module, i: int, rotation: Rotation) -> nn.Module:
    """Block i in another basis, all channels still there."""
    layout, state = stream.layout, block.state_dict()
    read = rotation.reader(layout, lambda n: state[layout.local(n)], layout.sizes["hidden"])
    tensors = {layout.local(n): read(n) for n in layout.block_tensors(i) if layout.local(n) in state}
    return surgery.rebuilt(block, stream.model, layout, i, {}, tensors)


def _check(stream: Stream, block: nn.Module, i: int, found: Rotation, before: Tensor, after: Tensor) -> None:
    """ModelError unless the block, turned by any basis, does in it what the block does."""
    layout, moved = stream.layout, turned_block(stream, block, i, found)
    basis = found.basis.to(before)
    want = after @ basis
    off = once(lambda: float((stream.run(moved, i, before @ basis) - want).norm() / want.norm()))
    if not off <= TOLERANCE:
        kinds = sorted({type(m).__name__ for m in _norms(layout, block, f"{layout.prefix}.{i}.").values()})
        raise _refused(f"a block in another basis differs by {off:.1e} (norms that subtract the mean do: {', '.join(kinds)})")


def _outside(stream: Stream, found: Rotation) -> None:
    """The norm behind the blocks, and the head that reads it."""
    layout = stream.layout
    norms = {n: m for n, m in _norms(layout, stream.model, "").items() if layout.layer_of(n) is None}
    readers = [n for n in layout.tensors if layout.layer_of(n) is None and n in layout.consumers and _reads(layout, n)]
    if len(norms) != 1 or len(readers) != 1:
        raise _refused(f"outside of the blocks it has {len(norms)} norms and {len(readers)} matrices that read the stream")
    (norm, module), (reader,) = *norms.items(), readers
    found.fed_by[reader] = norm
    found.offsets[norm] = surgery.norm_offset(module)
