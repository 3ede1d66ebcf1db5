"""The journal of a run: what is written once, what is let go, and scores that go on from wherever a pass was last noted."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.criteria import get_criterion
from pared.estimate import estimate
from pared.journal import EVERY, Journal
from pared.proof import proved_layout
from pared.scores import Scores
from pared.spill import Pool
from pared.stream import Stream

BATCHES = [Batch(tiny.tokens(3, 14)), Batch(tiny.tokens(2, 9, seed=4))]


class Stopped(Exception):
    pass


class Sparse(Journal):
    """Notes only some of the checkpoints that it is offered, and ends the run at the last of them."""

    def __init__(self, folder: Path, noted: Collection[int] = ()) -> None:
        super().__init__(folder, {"run": "this"})
        self.noted, self.offered = noted, 0

    def _worth(self, size: int) -> bool:
        return self.offered in self.noted

    def checkpoint(self, *arguments: Any, **more: Any) -> bool:
        self.offered += 1
        done = super().checkpoint(*arguments, **more)
        if self.noted and self.offered == max(self.noted):
            raise Stopped
        return done


def files(folder: Path) -> set[str]:
    return {p.name for p in (folder / ".pared-run").iterdir()} - {"key.json"}


def scored(path: Path, criterion: str, axes: tuple[str, ...], journal: Journal | None, pool: Pool | None) -> Scores:
    stream = Stream(Checkpoint.open(path), proved_layout(tiny.config(path.name)), pool=pool)
    return estimate(stream, get_criterion(criterion), axes, BATCHES, journal=journal)


@pytest.mark.parametrize(
    ("family", "criterion", "axes"),
    [("llama", "taylor-second", ("ffn", "layer")), ("mixtral", "taylor", ("expert",)), ("llama", "obs-fisher", ("ffn", "kv"))],
)
def test_scores_from_gradients_go_on_from_any_block_that_was_noted(
    family: str, criterion: str, axes: tuple[str, ...], tmp_path: Path
) -> None:
    path = tiny.save(tiny.model(family), tmp_path / family)
    offered = Sparse(tmp_path)
    want = scored(path, criterion, axes, offered, None)
    layers = proved_layout(tiny.config(family)).num_layers
    assert offered.offered == 2 * layers and files(tmp_path) == {"scores.json", f"scores-{2 * layers}.tensors"}
    # Stopped on the way forth, at the loss and on the way back; some noted with nothing noted before, some after others.
    for noted in ((1,), (2,), (layers,), (layers + 1,), (1, layers + 1), (layers, 2 * layers - 1)):
        folder = tmp_path / str(noted)
        folder.mkdir()
        pool = Pool(2000, tmp_path / "spill")
        with pytest.raises(Stopped):
            scored(path, criterion, axes, Sparse(folder, noted), pool)
        at = max(noted)
        known = at + 1 if at < layers else 2 * layers - at
        kept = {f"scores-inputs-{i}.tensors" for i in range(known)}
        assert files(folder) == {"scores.json", f"scores-{at}.tensors", *kept}
        again = Sparse(folder)
        got = scored(path, criterion, axes, again, pool)
        assert again.offered == 2 * layers - at, "what was noted is not done again"
        for mine, its in ((got.of, want.of), (got.power, want.power), (got.visits, want.visits)):
            assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in its)
        assert pool.written > 0


def test_parts_are_written_once_and_let_go_when_they_are_not_named_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EVERY, "1")
    journal = Journal(tmp_path, {})
    one, two = [torch.arange(3.0)], [torch.arange(4.0), torch.arange(2.0)]
    journal.checkpoint("stage", "block", 1, "first", {}, parts={"a": one})
    written = (tmp_path / ".pared-run" / "stage-a.tensors").stat().st_mtime_ns
    journal.checkpoint("stage", "block", 2, "second", {"now": one}, parts={"a": None, "b": two})
    assert (tmp_path / ".pared-run" / "stage-a.tensors").stat().st_mtime_ns == written
    assert files(tmp_path) == {"stage.json", "stage-2.tensors", "stage-a.tensors", "stage-b.tensors"}
    at, record, tensors = journal.last("stage") or (0, None, {})
    assert (at, record) == (2, "second") and torch.equal(tensors["now"][0], one[0])
    assert [torch.equal(x, y) for x, y in zip(journal.part("stage", "b"), two, strict=True)] == [True, True]
    journal.checkpoint("stage", "block", 3, "third", {}, parts={"b": None})
    assert files(tmp_path) == {"stage.json", "stage-3.tensors", "stage-b.tensors"}
    with pytest.raises(ValueError, match="does not hold a"):
        journal.checkpoint("stage", "block", 4, "fourth", {}, parts={"a": None})


def test_a_part_of_a_run_has_names_of_its_own_and_is_forgotten_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVERY, "1")
    journal = Journal(tmp_path, {})
    for part, number in (("step 1", 1), ("step 10", 10)):
        journal.within(part).checkpoint("scores", "scored", number, None, {"x": [torch.ones(number)]})
    journal.write("plan", "kept")
    assert journal.read("scores") is None and journal.within("step 10").last("scores") is not None
    journal.within("step 1").forget()
    assert files(tmp_path) == {"plan.json", "step 10.scores.json", "step 10.scores-10.tensors"}
    assert Journal(tmp_path, {}).read("plan") == "kept"
