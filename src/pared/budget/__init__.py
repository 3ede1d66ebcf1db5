"""Budgets: how many units each layer and axis loses so that the whole meets the amount asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pared.accounting import AMOUNTS, Account, account, block_count, cache_entries
from pared.errors import UsageError
from pared.structure import Layout

Sizes = dict[str, int]


@dataclass(frozen=True)
class Amount:
    """How much to remove: a share in (0, 1) of `of`."""

    remove: float
    of: str = "block-params"

    def __post_init__(self) -> None:
        if self.of not in AMOUNTS:
            raise UsageError(f"can not remove a share of {self.of!r}", where="--of", fix=f"one of {', '.join(AMOUNTS)}")
        if not isinstance(self.remove, int | float) or not math.isfinite(self.remove) or not 0 < self.remove < 1:
            raise UsageError(
                f"the share to remove must lie between 0 and 1, and is {self.remove}",
                where="--remove",
                fix="for a fifth: --remove 0.2",
            )


@dataclass
class Budget:
    """Counts what candidate shapes leave, and knows what was asked for.

    protected: layers that stay as they are. experts_used: experts that each token visits, for flops.
    written_as: the model type that uniform sizes and a number of hidden channels would be written as, None where no
    config can say them; by default every shape can be written. vocab, hidden: tokens and hidden channels that stay, where that
    is decided already.
    """

    layout: Layout
    amount: Amount
    axes: tuple[str, ...]
    protected: frozenset[int] = frozenset()
    align: int | None = None
    context: int = 1024
    experts_used: int | None = None
    written_as: Callable[[Sizes, int | None], str | None] | None = None
    vocab: int | None = None
    hidden: int | None = None
    before: Account = field(init=False)
    target: float = field(init=False)
    _blocks: dict[tuple[object, ...], int] = field(default_factory=dict, init=False)
    _outside: dict[int | None, int] = field(default_factory=dict, init=False)
    _kinds: list[int] = field(init=False)
    _names: list[list[str]] = field(init=False)
    _stacked: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.count()
        self.target = self.amount.remove * self.before.amount(self.amount.of)
        stacks = (s for n, s in self.layout.tensors.items() if len(self.layout.shapes[n]) == 3)
        self._stacked = frozenset().union(*(s.axes for s in stacks))
        seen: dict[tuple[object, ...], int] = {}
        tensors = self.layout.tensors
        self._names = [self.layout.block_tensors(i) for i in range(self.layout.num_layers)]
        self._kinds = [
            seen.setdefault(tuple((self.layout.local(n), tensors[n].text) for n in names), i)
            for i, names in enumerate(self._names)
        ]
        if self.amount.of == "kv-cache" and self.before.kv_cache == 0:
            raise UsageError("this model has no key-value cache to shrink", where="--of kv-cache")

    def count(
        self,
        layers: Sequence[tuple[int, Mapping[str, int]]] | None = None,
        hidden: int | None = None,
        vocab: int | None = None,
    ) -> Account:
        used = self.experts_used
        return account(self.layout, layers, hidden=hidden, vocab=vocab, context=self.context, experts_used=used)

    def block_amount(self, layer: int, sizes: Mapping[str, int], hidden: int | None = None) -> int:
        """The amount that one block holds under given sizes (those not named are as they are)."""
        hidden = self.hidden if hidden is None else hidden
        full = {**self.layout.sizes_at(layer), **sizes, **({} if hidden is None else {"hidden": hidden})}
        key = (self._kinds[layer], tuple(sorted(full.items())))
        if key not in self._blocks:
            names = self._names[layer]
            params, flops = block_count(
                self.layout, layer, full, context=self.context, experts_used=self.experts_used, names=names
            )
            self._blocks[key] = {
                "params": params,
                "block-params": params,
                "flops": flops,
                "kv-cache": cache_entries(self.layout, layer, full, names),
            }[self.amount.of]
        return self._blocks[key]

    def saves(self, layer: int, sizes: Mapping[str, int]) -> int:
        """The amount that other sizes of one block save."""
        return self.block_amount(layer, {}) - self.block_amount(layer, sizes)

    def outside_amount(self, hidden: int | None = None) -> int:
        """The amount that lies outside of the blocks, with the tokens that stay."""
        hidden = self.hidden if hidden is None else hidden
        if hidden not in self._outside:
            self._outside[hidden] = self.count([], hidden, self.vocab).amount(self.amount.of)
        return self._outside[hidden]

    @property
    def given(self) -> int:
        """The amount that is removed already when every block is whole: what the vocabulary gives, less what is added."""
        blocks = sum(self.block_amount(i, {}) for i in range(self.layout.num_layers))
        return self.before.amount(self.amount.of) - self.outside_amount() - blocks

    def same_block(self, one: int, other: int) -> bool:
        """Whether two layers count the same under the same sizes."""
        return self._kinds[one] == self._kinds[other] and self.layout.layer_sizes[one] == self.layout.layer_sizes[other]

    def alike(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Layers that count the same under the same sizes: (one of them, how many), those protected apart."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i in layers:
            key = self._kinds[i], tuple(sorted(self.layout.layer_sizes[i].items())), i in self.protected
            groups.setdefault(key, []).append(i)
        return [(members[0], len(members)) for members in groups.values()]

    @property
    def width_axes(self) -> list[str]:
        """Requested axes with many small units: FFN channels of any kind, but for those whose number follows from another's."""
        return [a for a in self.axes if a.endswith("ffn") and a not in self.layout.follows]

    def step(self, axis: str) -> int:
        """The multiple that kept units of an axis are rounded to."""
        n = max(s.get(axis, 1) for s in (self.layout.sizes_at(i) for i in range(self.layout.num_layers)))
        if axis == "vocab":
            return self.align or max(8, min(64, 2 ** int(math.log2(max(1, n // 128)))))
        if not (axis.endswith("ffn") or axis == "hidden"):
            return self.layout.runs.get(axis, 1)
        # Kernels like round numbers, and the budget wants fine steps: a power of two under 1% of the axis.
        fine = min(64, 2 ** int(math.log2(max(1, n // 128))))
        return math.lcm(self.align or fine, self.grain(axis))

    def grain(self, axis: str) -> int:
        """The multiple below which the pruned model would not run: grouped products of experts want rows of 16 bytes,
        and a config without a head size of its own wants a hidden size that its heads divide."""
        if axis == "hidden" and "d" not in self.layout.keys:
            return max(s.get("kv", 1) * s.get("query", 1) for s in self.layout.layer_sizes)
        return 8 if axis in self._stacked and axis not in ("kv", "query") else 1

    def full(self) -> Sizes:
        """Units of every axis in the layers that are not protected; axes that not all of them have are among these."""
        free = [i for i in range(self.layout.num_layers) if i not in self.protected] or [0]
        return {**self.layout.sizes, **{a: n for i in free for a, n in self.layout.layer_sizes[i].items()}}

    def levels(self, axis: str, n: int) -> list[int]:
        """How many of n units of an axis with few may stay, from all of them down."""
        if axis in self.layout.sublayers:
            return list(range(n, -1, -1))
        return list(range(n, max(1, self.layout.least.get(axis, 1)) - 1, -self.layout.runs.get(axis, 1))) or [n]

    def unreachable(self, most: float) -> UsageError:
        """The error for an amount that these axes can not give; most: the largest share that they can."""
        least = max(0.0, self.given / self.before.amount(self.amount.of))
        return UsageError(
            f"removing {self.amount.remove:.1%} of {self.amount.of} is out of reach: "
            f"{', '.join([*(['vocab'] if self.vocab else []), *self.axes])} can give between {f'{least:.1%}' if least else '0%'} and {math.floor(most * 1000) / 1000:.1%}"
            f"{self._experts_stay()}",
            where="--remove",
            fix="ask for less, add structures, or use a smaller --align",
        )

    def _experts_stay(self) -> str:
        if "expert" not in self.axes or "expert" not in self.layout.least:
            return ""
        least, runs = self.layout.least["expert"], self.layout.runs.get("expert", 1)
        groups = f", as many in each of {runs} groups" if runs > 1 else ""
        return f": of {self.full()['expert']} experts {least} have to stay{groups}, for every token visits {self.experts_used}"
