"""Attention beyond heads: the rank of values and the pairs of rotary dimensions, against heads and FFN channels.

    python benchmarks/attention_rank.py MODEL --calibration TRAIN --text TEST --out RESULT.md

MODEL is a directory of a Llama or of a family with its names; TRAIN and TEST are as in quality.py. Every row loses the same
share of block parameters: what it names from each layer, and FFN channels for the rest. All rows are made alike, block by
block on the pruned stream, with second-order selection and a least-squares refit of o_proj and down_proj to the dense
stream (damping 0.01, alpha 0.75), so that rows differ in what goes and in nothing else.

Ranks of values: in each KV group, with C the second moments of what its heads pass to o_proj and G = sum W^T W of the columns
of o_proj that read them, both summed over the query heads of the group, values keep the leading eigenvectors of
G^1/2 C G^1/2, the best common low-rank factor of the group's value and output maps. Rotary pairs: in each KV group entries i
and i + d/2 of queries and keys go together, those with the least E|q|^2 E|k|^2. Query heads are removed from every KV group.

Excess loss is log(perplexity pruned / dense). Weights are kept in their full shapes here, with the rank or the zeros that
the smaller ones would have; parameters are counted as of the smaller ones.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
from quality import Bench
from torch import Tensor, nn

from pared.axes import indices, parse
from pared.calibration import Batch, inference
from pared.elimination import Elimination, choose_units
from pared.evaluate.perplexity import logits_of, measure, protocol
from pared.leastsquares import DAMPING
from pared.moments import Moments2
from pared.stream import Stream

ALPHA = 0.75
O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"
Q_PROJ, K_PROJ = "self_attn.q_proj", "self_attn.k_proj"
# What goes from every layer beside FFN channels: KV groups, query heads of each group, dimensions of each group's values,
# rotary pairs of each group's queries and keys.
Loss = dict[str, int]
NAMES = {"kv": "KV groups", "query": "query heads of each group", "value": "value dimensions", "pair": "rotary pairs"}


class Shape:
    """The sizes of a model's blocks, and what its parts count."""

    def __init__(self, config: Any) -> None:
        self.hidden, self.ffn, self.heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.kv = config.num_key_value_heads
        self.query, self.d = self.heads // self.kv, getattr(config, "head_dim", None) or self.hidden // self.heads
        self.sizes = {"kv": self.kv, "query": self.query, "d": self.d, "ffn": self.ffn}
        self.block = self.hidden * (2 * self.d * (self.heads + self.kv) + 3 * self.ffn)

    def cost(self, loss: Loss) -> int:
        """Parameters of one block that a loss without FFN channels takes."""
        groups = self.kv - loss.get("kv", 0)
        heads = (self.query - loss.get("query", 0)) * groups
        value, pair = self.d - loss.get("value", 0), self.d - 2 * loss.get("pair", 0)
        return self.hidden * (2 * self.d * (self.heads + self.kv) - (heads + groups) * (value + pair))

    def channels(self, loss: Loss, share: float) -> int:
        """FFN channels that have to go as well; negative or all of them where the share is out of reach."""
        return math.ceil((share * self.block - self.cost(loss)) / (3 * self.hidden) - 1e-9)


class Pair:
    """The dense model and one that is pruned block by block, with their hidden states."""

    def __init__(self, dense: nn.Module, layout: Any, ids: Tensor) -> None:
        self.pruned = copy.deepcopy(dense)
        self.streams = [Stream(dense, layout), Stream(self.pruned, layout)]
        batches = [Batch(rows, None) for rows in ids.split(16)]
        self.hidden = [list(s.embed(batches)) for s in self.streams]

    def run(self, which: int, i: int, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        """Block i on all tokens: inputs and outputs [tokens, ..] of the named matrices, and what leaves it."""
        stream = self.streams[which]
        a: dict[str, list[Tensor]] = {n: [] for n in names}
        y: dict[str, list[Tensor]] = {n: [] for n in names}
        with stream.block(i) as block, torch.no_grad():

            def hook(name: str) -> Any:
                def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                    a[name].append(args[0].flatten(0, 1))
                    y[name].append(out.flatten(0, 1))

                return see

            handles = [block.get_submodule(n).register_forward_hook(hook(n)) for n in names]
            after = [stream.run(block, i, h) for h in self.hidden[which]]
            for handle in handles:
                handle.remove()
        return {n: torch.cat(v) for n, v in a.items()}, {n: torch.cat(v) for n, v in y.items()}, after

    def drift(self) -> Tensor:
        """What the residual streams differ by: [tokens, hidden]."""
        dense, pruned = (torch.cat([h.flatten(0, 1) for h in states]) for states in self.hidden)
        return dense - pruned


def refit(a: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """argmin E||target - W' a||^2 + ridge ||W' - w||^2."""
    sums = Moments2.zeros(a.shape[1], target.shape[1])
    sums.add(a, target)
    return sums.problem(centred=False).solved(w, DAMPING).float()


def eliminated(a: Tensor, target: Tensor, w: Tensor, text: str, shape: Shape, wanted: dict[str, int]) -> Tensor:
    """Columns of w [out, n] that stay, chosen by second-order selection. text: what the columns are, in the axes' notation."""
    node = parse(text).dims[0]
    keep = {}
    if wanted:
        sums = Moments2.zeros(a.shape[1], target.shape[1])
        sums.add(a, target)
        state = Elimination.from_sums(sums, w, centred=False, scale=sums.scale(centred=False))
        keep = choose_units(state, node, shape.sizes, {"query": "kv"}, wanted)
    stay = torch.zeros(w.shape[1], dtype=torch.bool)
    found = indices(node, shape.sizes, keep, w.shape[1])
    stay[slice(None) if found is None else found] = True
    return stay


def value_basis(a: Tensor, w: Tensor, shape: Shape) -> Tensor:
    """An invertible map of o_proj's inputs, the same for the heads of a KV group: [n, n], least important rows first."""
    basis = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    for group in torch.arange(w.shape[1]).reshape(shape.kv, shape.query, shape.d):
        c = sum(a[:, h].double().T @ a[:, h].double() for h in group) / len(a)
        g = sum(w[:, h].double().T @ w[:, h].double() for h in group)
        values, vectors = torch.linalg.eigh(g)  # type: ignore[arg-type]
        root = (vectors * values.clamp(min=1e-12 * float(values[-1])).sqrt()) @ vectors.T
        _, order = torch.linalg.eigh(root @ c @ root)
        for h in group:
            basis[h[:, None], h] = order.T @ root
    return basis


def drop_pairs_(block: nn.Module, q: Tensor, k: Tensor, gone: int, shape: Shape) -> None:
    """Set the rows of queries and keys to zero that belong to the rotary pairs with the least energy."""
    query = q.reshape(len(q), shape.kv, shape.query, 2, -1).square().mean(0).sum((1, 2))
    key = k.reshape(len(k), shape.kv, 2, -1).square().mean(0).sum(1)
    rows_q = torch.arange(shape.heads * shape.d).reshape(shape.kv, shape.query, 2, -1)
    rows_k = torch.arange(shape.kv * shape.d).reshape(shape.kv, 2, -1)
    for group, pairs in enumerate((query * key).argsort(1)[:, :gone]):
        block.get_submodule(Q_PROJ).weight[rows_q[group][..., pairs].flatten()] = 0
        block.get_submodule(K_PROJ).weight[rows_k[group][..., pairs].flatten()] = 0


@torch.no_grad()
def pruned(dense: nn.Module, layout: Any, ids: Tensor, loss: Loss, channels: int) -> nn.Module:
    """A copy of the model without what `loss` says and so many FFN channels of each layer, refitted."""
    shape, pair = Shape(dense.config), Pair(dense, layout, ids)
    for i in range(layout.num_layers):
        block = pair.pruned.get_submodule(f"{layout.prefix}.{i}")
        _, there, after = pair.run(0, i, [O_PROJ, DOWN])
        if loss.get("pair"):
            _, out, _ = pair.run(1, i, [Q_PROJ, K_PROJ])
            drop_pairs_(block, out[Q_PROJ], out[K_PROJ], loss["pair"], shape)
        drift = pair.drift()
        for name in (O_PROJ, DOWN):
            a, y, left = pair.run(1, i, [O_PROJ, DOWN])
            x, w = a[name], block.get_submodule(name).weight
            if name == DOWN:
                drift = drift + there[O_PROJ] - y[O_PROJ]
            target = y[name] + ALPHA * (drift + there[name] - y[name])
            basis = torch.eye(w.shape[1], dtype=torch.float64)
            if name == O_PROJ:
                wanted = {axis: shape.sizes[axis] - loss[axis] for axis in ("kv", "query") if loss.get(axis)}
                stay = eliminated(x, target, w, "(kv query d)", shape, wanted)
                if rank := loss.get("value"):
                    basis = value_basis(x, w, shape)
                    stay &= torch.arange(w.shape[1]) % shape.d >= rank
            else:
                stay = eliminated(x, target, w, "ffn", shape, {"ffn": shape.ffn - channels} if channels else {})
            before = w.double() @ torch.linalg.inv(basis)
            new = refit((x.double() @ basis.T)[:, stay].float(), target, before[:, stay].float())
            w.copy_((new.double() @ basis[stay]).float())
        pair.hidden = [after, pair.run(1, i, [])[2]]
        del left
    return pair.pruned


def losses(shape: Shape) -> list[Loss]:
    """What rows lose beside FFN channels."""
    quarter = max(1, shape.d // 4)
    parts: list[Loss] = [{}, {"kv": 1}, {"query": 1}, {"value": quarter // 2 or 1}, {"value": quarter}, {"value": shape.d // 2}]
    parts += [{"pair": 1}, {"pair": quarter}, {"query": 1, "value": quarter}, {"query": 1, "pair": 1}, {"kv": 1, "query": 1}]
    parts = [p for n, p in enumerate(parts) if p not in parts[:n]]
    return [p for p in parts if p.get("query", 0) < shape.query and p.get("kv", 0) < shape.kv]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", action="append")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=100)
    parser.add_argument("--remove", default="0.1,0.2,0.3,0.5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.text = (args.text or ["self"])[:1]
    bench = Bench(args)
    shape, shares = Shape(bench.dense.config), [float(r) for r in args.remove.split(",")]
    cut, base, reference = bench.scored[args.text[0]]
    rows = []
    for loss in losses(shape):
        cells = []
        for share in shares:
            channels = shape.channels(loss, share)
            if not 0 <= channels < shape.ffn:
                cells.append("—")
                continue
            found = []
            for seed in range(args.seeds):
                ids = bench.calibration(args.samples, args.seq_len, seed)
                made = pruned(bench.dense, bench.source.layout, ids, loss, channels)
                with inference(made), inference(bench.dense):
                    q = measure(logits_of(made), cut, against=reference)
                found.append((q.nll - base.nll, q.kl or 0.0))
            excess, kl = (sum(f[k] for f in found) / len(found) for k in (0, 1))
            cells.append(f"{excess:.3f} ({kl:.3f})")
        name = " and ".join(f"{n} {NAMES[axis]}" for axis, n in loss.items()) or "FFN channels alone"
        rows.append(f"| {name} | {shape.cost(loss) / shape.block:.1%} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    head = (__doc__ or "").split("\n\n")
    args.out.write_text(
        f"# Attention beyond heads: {Path(args.model).name}\n\n" + "\n\n".join(head[2:]).strip() + "\n\n"
        f"{shape.heads} heads in {shape.kv} KV groups, head size {shape.d}. Calibration: {Path(args.calibration).name}, "
        f"{args.samples} windows of {args.seq_len} tokens, {args.seeds} seed{'s' if args.seeds > 1 else ''}. A cell is excess loss "
        f"(KL), in nats per token; — where that loss alone is more, or FFN channels are too few. Text: {Path(args.text[0]).name} "
        f"(dense loss {base.nll:.3f}; {protocol(cut)}).\n\n"
        "| beside FFN channels goes | of the blocks | " + " | ".join(f"{r:.0%}" for r in shares) + " |\n"
        "| --- | --- |" + " --- |" * len(shares) + "\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
