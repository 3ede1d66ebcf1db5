"""One block of the walk that refits: choose what stays of each consumer, refit it, and move the pruned stream on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn import functional as F

from pared import process
from pared.blockparts import bias_of, oriented, owner
from pared.cutblock import CutBlock
from pared.distributed import once
from pared.elimination import HELD_OUT, Elimination, Sums, add_sequence, choose_units, halves_for
from pared.errors import UsageError
from pared.expertfit import refit_experts, stacks_of
from pared.gaps import Kept, goes
from pared.leastsquares import DAMPING, best_bias, refit_guarded, transfer
from pared.plan import kept_sizes
from pared.reconstruct import SEQUENCES, reconstruct
from pared.spill import States
from pared.stages import Dense, Stages, consumer_at, reads, run_from, stages_of
from pared.stream import PROBE, Stream

# Added to the mean square of hidden states before it is divided by, as norms do.
EPSILON = 1e-6


@dataclass(frozen=True)
class Method:
    """How what stays is refitted.

    mode: none, bias, refit or sequential. alpha: how much of the drift a consumer is to make up for. inputs: refit what runs
    before the consumers as well. reselect: axes, each of one consumer, whose units are chosen in the walk; the plan then
    says how many. fisher: (layer, consumer's local name) -> E[g g^T] of its output's gradient, or its diagonal, which weighs
    the output's error where units are chosen; the diagonal does in reconstruction as well. steps: of block reconstruction,
    after the refit, each of a batch: step_of sequences of all processes. fit: how many of the batches, from the first on,
    are fitted to; None: all. guarded: held-out sequences choose the damping and can veto a refit.
    """

    mode: str = "sequential"
    alpha: float = 0.75
    inputs: bool = True
    reselect: frozenset[str] = frozenset()
    fisher: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    steps: int = 0
    step_of: int = SEQUENCES
    seed: int = 0
    fit: int | None = None
    guarded: bool = True


class Walk(CutBlock):
    """One block's walk: the dense stream stage by stage, choose and refit, and the pruned one after it. keep None: it goes.

    beyond: the dense stream past what goes right behind the last consumer that stays; None where nothing does.
    """

    def __init__(
        self, stream: Stream, i: int, block: nn.Module, keep: Kept | None, method: Method, beyond: States | None = None
    ) -> None:
        super().__init__(stream, i, block, keep or {})
        self.method, self.beyond, self.gone = method, beyond, keep is None
        self.damping: dict[str, float | None] = {}

    def through(self, x: States, pruned: States | None, *, last: bool = False) -> tuple[States, States | None]:
        """Both streams through the block, which are given up on the way. pruned None: it is the dense one still.

        last: nothing follows, so what leaves the block of the pruned stream is not computed.
        """
        if (self.keep or self.beyond is not None) and self.method.mode != "none":
            dense = Dense(self.stream, self.block, self.i, self.stages(x), x)
            pruned = self.follow(dense, pruned, last=last)
            return dense.at, pruned
        before = x[:] if pruned is None else pruned
        after = self.stream.through(self.block, self.i, x)
        if self.gone:
            return after, before  # the pruned stream passes it by
        if self.keep:
            return after, self._finish(before, after, None, last=last)
        return after, None if pruned is None else self.stream.through(self.block, self.i, pruned)

    def stages(self, x: States) -> Stages:
        """The block taken apart."""
        mode = self.method.mode
        producers = self._producers() if mode == "sequential" and self.method.inputs else []
        # Of experts more tokens see more.
        tokens = x[0][:1] if "expert" in self.sizes else x[0][:1, :PROBE]
        made = stages_of(self.stream, self.block, self.i, tokens, self._consumers(), producers)
        apart, adds, rest = once(lambda: (made.apart, made.adds, made.rest))
        return replace(made, apart=apart, adds=adds, rest=rest)

    def follow(self, dense: Dense, pruned: States | None, *, last: bool = False) -> States | None:
        """Choose, refit, and what leaves the block of the pruned stream; None where that is the dense one again."""
        stages, order = dense.stages, dense.stages.order
        single = self.method.mode == "refit"
        skips = [goes(self.layout, self.i, name, self.skipped) for name in order]
        # The last consumer that stays bridges the gap behind it.
        final = max((k for k, s in enumerate(skips) if not s), default=-1)
        bridge = final if self.beyond is not None and stages.adds else -1
        shrinking = [bool(self._axes(n) & self.keep.keys()) or skips[k] or k == bridge for k, n in enumerate(order)]
        batches = len(dense.at)
        few = batches if self.method.fit is None else self.method.fit
        same = pruned is None or single
        again = not stages.apart or bool(self.method.steps) or (pruned is None and not any(shrinking))
        entered: States | None = None
        if (again or few < batches) and not single:  # something will be run from the block's start once more
            entered = dense.entering(0) if pruned is None else pruned[:]
        stacks = stacks_of(self.layout, self.i, self.keep) if self.method.mode != "bias" else {}
        routed = (dense.entering(0) if same else pruned) if stacks else None
        routed = None if routed is None else routed[:]
        now = pruned
        for stage in range(len(order)):
            if same:
                now = dense.entering(stage) if stages.apart else dense.entering(0)
            assert now is not None
            if not same and self.method.mode == "sequential" and not skips[stage]:
                for group in stages.producers(stage):
                    self._refit_inputs(stage, group, dense, now, few)
            fits = not skips[stage] and (shrinking[stage] or (not same and self.method.mode == "sequential"))
            moves = stages.apart and not single and (fits or not same) and (stage < len(order) - 1 or stages.rest)
            moves = moves and not skips[stage]
            self._stage(stage, dense, now, few, same=same, fits=fits, moves=moves, bridge=stage == bridge)
            same = single or (same and not shrinking[stage] and not fits)
        dense.finish()
        for name, axis in stacks.items():
            assert routed is not None
            module = self._experts_whole(set(stacks.values()))
            given = self.weights[name]
            choose = axis in self.method.reselect
            done = refit_experts(self.stream, module, self.i, name, axis, routed, given, self.keep, choose=choose)
            self.changed[name], self.keep[axis] = done
        if single or (last and not self.method.steps):
            return None
        if entered is not None and again:
            return self._finish(entered, dense.at, self._power(stages), last=last)
        assert now is not None
        module, stage = self._module(self.keep), len(order) if stages.rest else len(order) - 1
        store = self.stream.pool.store
        after = store(run_from(self.stream, module, self.i, stages, stage, now[b]) for b in range(few))
        return after if entered is None else after + self.stream.through(module, self.i, entered[few:])

    def _power(self, stages: Stages) -> Tensor | None:
        """The mean square of the loss's gradient at what leaves the block, [hidden], where it was measured: what the last
        consumer adds to."""
        power = self.method.fisher.get((self.i, stages.order[-1])) if stages.adds and stages.order else None
        return power[: self.hidden] if power is not None and power.ndim == 1 else None

    def _finish(self, entered: States, after: States, power: Tensor | None, *, last: bool) -> States | None:
        """The pruned stream from the block's start, its weights reconstructed before if that is wanted."""
        module = self._module(self.keep)
        if self.method.steps:
            module = copy.deepcopy(module)  # tensors that nothing cut are still the dense block's own
            self.whole, self.changed = {}, {}  # no other copies beside those of the descent
            reconstruct(
                module,
                lambda m, h: self.stream.run(m, self.i, h),
                entered,
                after if self.hidden is None else self.stream.pool.store(self._those(h) for h in after),
                steps=self.method.steps,
                sequences=self.method.step_of,
                seed=self.method.seed + self.i,
                power=power,
                share=self.stream.share,
            )
            self.changed = {n: p.detach() for n, p in module.named_parameters()}
        return None if last else self.stream.through(module, self.i, entered)

    def _row(self, k: int) -> int:
        """The number of the k-th sequence here among those of all processes."""
        return k if self.stream.share is None else self.stream.share.rows[k]

    # ---- the refits ------------------------------------------------------------------------------------------------

    def _refit_inputs(self, stage: int, group: list[str], dense: Dense, now: States, few: int) -> None:
        """Matrices that read the same input, so that on x' they give what they gave on x."""
        module = self._module(self._done(dense.stages.order[:stage]))
        width = self._weight(group[0]).shape[1]
        here = self.hidden or width
        fit, held = halves_for(here, width, _tokens(now, few) // 2, self._device)
        row = 0
        for b, shape in enumerate(now[:few].like()):
            used = [k for k in range(shape.shape[0]) if self._row(row + k) // HELD_OUT % 2 == 0]
            if used:  # half of them: these are few numbers, and close to what they were
                h = reads(self.stream, self.block, self.i, dense.stages, stage, group[0], dense.at[b])
                a = reads(self.stream, module, self.i, dense.stages, stage, group[0], now[b])
                for k in used:
                    add_sequence(fit, held, a[k], h[k], self._row(row + k))
                del h, a
            row += shape.shape[0]
        del module
        fit.total()
        held.total()
        held = held if held.count else fit
        for centred in (False, True):
            names = [n for n in group if (self._bias(n) is not None) == centred]
            if not names:
                continue
            change, shift, damping = transfer(fit, held, [self._weight(n) for n in names], centred=centred)
            for name in names:
                w, bias = self._weight(name), self._bias(name)
                self.damping[name] = damping
                moved = w[:, :here] if change is None else change.onto(w).add_(w[:, :here])
                self.whole[name] = self._stored(name, moved if here == width else F.pad(moved, (0, width - here)))
                if bias is not None:
                    self.whole[bias_of(name)] = (bias.double() + w.double() @ shift).to(bias)
        del fit, held, change

    def _stage(
        self, stage: int, dense: Dense, now: States, few: int, *, same: bool, fits: bool, moves: bool, bridge: bool = False
    ) -> None:
        """Everything through one consumer: the dense stream, what is fitted to, and the pruned stream where it moves on."""
        process.return_freed_memory()
        stages, name = dense.stages, dense.stages.order[stage]
        module = self.block if same else self._module(self._done(stages.order[:stage]))
        w = self._weight(name)
        sums = halves_for(w.shape[1], w.shape[0], _tokens(now, few), self._device) if fits else []
        waiting = self.stream.pool.store()
        row = 0
        for b in range(few):
            a, target, weight = self._fitted_to(stage, dense, now, b, module, same=same, needed=fits or moves, bridge=bridge)
            if fits:
                for k in range(len(a)):
                    of_row = None if weight is None else weight[k]
                    add_sequence(sums[0], sums[1], a[k], target[k], self._row(row + k), of_row)
            if moves:
                waiting.append(a)
            row += len(a)
            del a, target, weight  # while the next batch runs, and the solves, they would be the largest of all
        del module
        if few == len(dense.at) and stages.apart:
            self._let_go(stages, stage)
        if fits:
            for part in sums:
                part.total()
            process.return_freed_memory()  # of what ran through the block, before the solves take theirs
            self._refit(name, sums, whole=bridge)
        for b, a in enumerate(waiting.drain()):
            now[b] = now[b] + self._gives(name, a)

    def _let_go(self, stages: Stages, stage: int) -> None:
        """Of what was refitted in a stage that the dense stream is past, the dense weights; a live model keeps its own."""
        for name in (n for group in stages.producers(stage) for n in group if n in self.whole):
            self.weights[name] = self.whole[name]
            if self.stream.weights is not None:
                owner(self.block, name)._parameters[name.rpartition(".")[2]] = nn.Parameter(self.whole[name], False)

    def _fitted_to(
        self, stage: int, dense: Dense, now: States, b: int, module: nn.Module, *, same: bool, needed: bool, bridge: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """For one batch a consumer's input on the pruned stream [b, s, n], what it should give there [b, s, out], and what
        each token counts for [b, s]: errors are relative to the dense stream that they are added to. None: all count alike."""
        there = dense.consumer(stage, b)
        if not needed:
            return there.residual, there.residual, None
        here = there
        if not same or there.a is None:
            there = replace(there, a=None, after=None)
            here = consumer_at(self.stream, module, self.i, dense.stages, stage, now[b])
        assert here.a is not None and there.y is not None
        if not dense.stages.adds:
            return here.a, self._those(there.y), None
        after = self.beyond[b] if bridge and self.beyond is not None else there.residual + there.y
        size = after.float().square().mean(-1)
        return here.a, self._those(after) - here.residual, None if self.method.mode == "bias" else 1 / (size + EPSILON)

    def _gives(self, name: str, a: Tensor) -> Tensor:
        """What a consumer, cut and refitted, adds to the stream; a: its input, all channels."""
        w = self.changed.get(name)
        w = self._cut(name, self.weights[name]) if w is None else w
        bias = self.changed.get(bias_of(name), self._bias(name))
        return F.linear(a[..., self._kept_columns(name)], oriented(self.layout, self.i, name, w), bias)

    def _refit(self, name: str, sums: list[Sums], *, whole: bool = False) -> None:
        w, bias = self._weight(name), self._bias(name)
        (fit, held), sums[:] = sums, []  # let go as soon as the kept channels are taken from them
        alpha = self.method.alpha if self.method.mode == "sequential" else float(whole)
        fit = fit.mixed(w, bias, alpha)
        held = held.mixed(w, bias, alpha) if held.count else fit
        centred, guarded = bias is not None, self.method.guarded
        if not guarded:
            fit = fit.plus(held)  # type: ignore[arg-type]
        scale = fit.scale(centred=centred)
        self._choose(name, fit, w, scale)
        kept = self._kept_columns(name)
        process.return_freed_memory()
        if self.method.mode == "bias":
            if bias is None:
                raise UsageError(
                    f"{name} has no bias to put the correction in",
                    where="--compensate bias",
                    fix="--compensate refit or sequential",
                )
            every = fit.plus(held).at(kept).problem(centred=True)  # type: ignore[arg-type]
            self.changed[bias_of(name)] = best_bias(every, w[:, kept]).to(bias)
            return
        if guarded:
            alone = held is fit
            fit = fit.at(kept)  # one after the other: never both as they were and as they will be
            held = fit if alone else held.at(kept)
            new, shift, self.damping[name] = refit_guarded(fit, held, w[:, kept], centred=centred, scale=scale)
        else:
            every = fit.at(kept).problem(centred=centred, scale=scale)
            new, self.damping[name] = every.solved(w[:, kept], DAMPING), DAMPING
            shift = best_bias(every, new)
        self.changed[name] = self._stored(name, new)
        if bias is not None:
            self.changed[bias_of(name)] = shift.to(bias)
        process.return_freed_memory()

    def _choose(self, name: str, sums: Sums, w: Tensor, scale: float) -> None:
        """Choose anew which units of this consumer stay, as many as before."""
        axes = self._axes(name) & self.keep.keys() & self.method.reselect
        if not axes:
            return
        state = Elimination.from_sums(sums, w, centred=self._bias(name) is not None, scale=scale)
        fisher = self.method.fisher.get((self.i, name))
        if fisher is not None:
            state.weigh(fisher[: self.hidden] if fisher.ndim == 1 else fisher[: self.hidden, : self.hidden])
        process.return_freed_memory()  # what H and V were made with: they are the most that is held at once
        full = self._full(name)
        node = self.layout.tensors[full].dims[self.layout.consumers[full]]
        wanted = {a: n for a, n in kept_sizes(self.keep).items() if a in axes}
        self.keep.update(once(lambda: choose_units(state, node, self.sizes, self.layout.parents, wanted)))


def _tokens(states: States, few: int) -> int:
    """In the first few batches."""
    return sum(h.shape[0] * h.shape[1] for h in states[:few].like())
