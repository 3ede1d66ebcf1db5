"""How far scoring has come, in a run's journal: blocks that are scored, and what the pass over the blocks goes on from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pared.journal import Journal
from pared.scores import Scores, is_power, key_of, name_of, named_power, power_of
from pared.spill import States
from pared.stream import Stream


class ScoringSteps:
    """Blocks that have been scored, and the hidden states after them, in a journal where there is one."""

    def __init__(self, journal: Journal | None, scores: Scores, stream: Stream) -> None:
        self._journal, self._scores, self._layers = journal, scores, stream.num_layers
        self.first = 0
        self.start: tuple[int, States] | None = None
        found = journal.last("scores", stream.pool) if journal is not None else None
        if found is not None:
            self.first, record, tensors = found
            hidden = tensors.pop("hidden", None)
            noted = {name: tensors.pop(name) for name in [n for n in tensors if is_power(n)]}
            scores.visits = {int(i): torch.tensor(counts) for i, counts in record.items()}
            scores.of = {key_of(name): values[0] for name, values in tensors.items()}
            self.start = None if hidden is None else (self.first, hidden)
            scores.power = power_of(noted)

    def done(self, i: int, hidden: States | None) -> None:
        if i + 1 < self._layers:
            self._note(i + 1, hidden)

    def finish(self) -> None:
        self._note(self._layers, None)

    def _note(self, at: int, hidden: States | None) -> None:
        if self._journal is None:
            return
        tensors: dict[str, Sequence[Tensor]] = {name_of(key): [value] for key, value in self._scores.of.items()}
        if hidden is not None:
            tensors["hidden"] = hidden
        tensors |= named_power(self._scores.power)
        visits = {str(k): counts.tolist() for k, counts in self._scores.visits.items()}
        whole = at == self._layers
        self._journal.checkpoint("scores", "scored" if whole else "scores of a block", at, visits, tensors, last=whole)
