"""How far scoring has come, in a run's journal: blocks that are scored, and what the passes over the blocks go on from."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pared.gradients import Backward
from pared.journal import Journal
from pared.scores import Scores, is_power, key_of, name_of, named_power, power_of
from pared.spill import States
from pared.stream import Stream

STAGE = "scores"
# Beside the scores, which have the names of axes.
_HIDDEN, _GRADIENTS = "states.hidden", "states.gradients"


class ScoringSteps:
    """Blocks that have been scored, in a journal where there is one, from which `scores` is filled.

    finished: nothing is left to score. first, start: of a pass that scores on the way forward, the block to begin with and
    what enters it. back: of one that scores on the way back, how far it had come; a new one where it had not begun.
    """

    def __init__(self, journal: Journal | None, scores: Scores, stream: Stream) -> None:
        self._journal, self._scores, self._stream = journal, scores, stream
        self.first, self.finished = 0, False
        self.start: tuple[int, States] | None = None
        # Not a method of this: what is held in a circle is not let go at once.
        self.back = Backward(stream.num_layers, functools.partial(_inputs, journal, stream))
        found = journal.last(STAGE, stream.pool, stream.device) if journal is not None else None
        if found is not None:
            self.first, record, tensors = found
            hidden, gradients = tensors.pop(_HIDDEN, None), tensors.pop(_GRADIENTS, None)
            noted = {name: tensors.pop(name) for name in [n for n in tensors if is_power(n)]}
            scores.visits = {int(i): torch.tensor(counts) for i, counts in record["visits"].items()}
            scores.of = {key_of(name): values[0].cpu() for name, values in tensors.items()}
            self.start = None if hidden is None else (self.first, hidden)
            self.finished = record["finished"]
            scores.power = {key: value.cpu() for key, value in power_of(noted).items()}
            if "back" in record:
                self.back.restore(record["back"], gradients)

    def done(self, i: int, hidden: States | None) -> None:
        """Block i is scored on the way forward, and this is what leaves it."""
        if i + 1 < self._stream.num_layers:
            self._note(i + 1, {} if hidden is None else {_HIDDEN: hidden})

    def went(self, back: Backward, step: str) -> None:
        """A pass forth and back has come so far. step: its name among those of the journal."""
        layers = self._stream.num_layers
        at = back.forward if back.gradients is None else 2 * layers - back.left
        tensors = {} if back.gradients is None else {_GRADIENTS: back.gradients}
        parts = {f"inputs-{i}": back.inputs.get(i) for i in back.waiting()}
        self._note(at, tensors, step, {"back": back.record()}, parts)

    def finish(self) -> None:
        self._note(2 * self._stream.num_layers, {}, "scored", finished=True)

    def _note(
        self,
        at: int,
        states: dict[str, States],
        step: str = "scores of a block",
        more: dict[str, object] | None = None,
        parts: dict[str, States | None] | None = None,
        *,
        finished: bool = False,
    ) -> None:
        if self._journal is None:
            return
        tensors: dict[str, Sequence[Tensor]] = {name_of(key): [value] for key, value in self._scores.of.items()}
        tensors |= states | named_power(self._scores.power)
        visits = {str(k): counts.tolist() for k, counts in self._scores.visits.items()}
        record = {"visits": visits, "finished": finished, **(more or {})}
        self._journal.checkpoint(STAGE, step, at, record, tensors, parts=parts, last=finished)


def _inputs(journal: Journal | None, stream: Stream, i: int) -> States:
    assert journal is not None
    return journal.part(STAGE, f"inputs-{i}", stream.pool, stream.device)
