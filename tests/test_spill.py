"""Where hidden states wait, and whether the next block is read ahead, changes no bit of what comes out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.compensate import compensate
from pared.criteria import get_criterion
from pared.errors import ResourceError
from pared.estimate import estimate
from pared.proof import proved_layout
from pared.spill import Pool
from pared.stream import Stream
from pared.walk import Method

BATCHES = [Batch(tiny.tokens(3, 14)), Batch(tiny.tokens(2, 9, seed=4)), Batch(tiny.tokens(1, 14, seed=5))]


def tensor(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    room=st.integers(0, 400),
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "set", "free", "cut"]), st.integers(1, 40), st.integers(0, 9)), max_size=25
    ),
)
def test_a_sequence_in_a_pool_is_a_list(
    tmp_path_factory: pytest.TempPathFactory, room: int, steps: list[tuple[str, int, int]]
) -> None:
    pool = Pool(room, tmp_path_factory.mktemp("spill"))
    states, plain = pool.store(), []
    for k, (what, n, at) in enumerate(steps):
        if what == "add":
            states.append(tensor(n, k))
            plain.append(tensor(n, k))
        elif plain and what == "set":
            states[at % len(plain)] = tensor(n, k)
            plain[at % len(plain)] = tensor(n, k)
        elif plain and what == "free":
            del states[at % len(plain)], plain[at % len(plain)]
        elif what == "cut":
            states, plain = states[at:] + states[:at], plain[at:] + plain[:at]
        assert len(states) == len(plain) and all(torch.equal(a, b) for a, b in zip(states, plain, strict=True))
        assert pool.held <= room and pool.held + pool.spilled == sum(4 * t.numel() for t in plain)
    del states
    assert (pool.held, pool.spilled) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_every_dtype_and_stride_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.arange(24).reshape(2, 3, 4) / 7).to(dtype).transpose(0, 1)
    got = Pool(0, tmp_path).store([value])[0]
    assert got.dtype == dtype and torch.equal(got, value)


def test_nothing_is_left_on_disk_and_places_are_used_again(tmp_path: Path) -> None:
    pool = Pool(0, tmp_path)
    for k in range(50):
        kept = pool.store(tensor(100, k + j) for j in range(3))
        assert list(tmp_path.iterdir()) == []
    assert pool.most_spilled == 2 * 1200 or pool.most_spilled == 1200
    assert pool.written == 50 * 1200 and os.fstat(pool._file).st_size <= 2 * 1200
    assert len(kept) == 3


def test_a_drained_place_can_not_be_read(tmp_path: Path) -> None:
    states = Pool().store([tensor(3, 0), tensor(3, 1)])
    assert len(list(states.drain())) == 2
    with pytest.raises(LookupError):
        states[0]


def test_a_bound_without_a_place_to_spill_and_a_full_disk_are_said(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="--spill"):
        Pool(0).store([tensor(3, 0)])
    pool = Pool(0, tmp_path)
    pool.store([tensor(3, 0)])
    os.close(pool._file)
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    pool._file = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(ResourceError, match=os.strerror(errno.ENOSPC)):
        pool.store([tensor(3, 0)])


def results(path: Path, criterion: str, pool: Pool | None, ahead: bool) -> dict[Any, Tensor]:
    """Scores by a criterion, and every tensor that the refit after them gives."""
    checkpoint = Checkpoint.open(path)
    layout = proved_layout(tiny.config(path.name))
    stream = Stream(checkpoint, layout, pool=pool, ahead=ahead)
    scores = estimate(stream, get_criterion(criterion), ("ffn",), BATCHES)
    out: dict[Any, Tensor] = dict(scores.of)
    plan = tiny.cut(tiny.model(path.name), structures=("ffn",), dry_run=True).plan
    for done in compensate(stream, plan, BATCHES, Method(reselect=frozenset({"ffn"}) if path.name == "llama" else frozenset())):
        out |= {(done.layer.source, n): t for n, t in done.tensors.items()}
    return out


@pytest.mark.parametrize("criterion", ["taylor", "taylor-second", "wanda_sp"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_spilling_and_reading_ahead_change_no_bit(tmp_path: Path, family: str, criterion: str) -> None:
    path = tiny.save(tiny.model(family), tmp_path / family)
    want = results(path, criterion, None, False)
    pool = Pool(3000, tmp_path / "spill")
    for got in (results(path, criterion, pool, False), results(path, criterion, None, True)):
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert pool.written > 0 and pool.spilled == 0 and list((tmp_path / "spill").iterdir()) == []


def test_weights_are_read_once_whichever_way_the_blocks_are_walked(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.save(tiny.model("llama"), tmp_path / "llama"))
    stream = Stream(checkpoint, proved_layout(tiny.config("llama")), ahead=True)
    blocks = sum(checkpoint.tensors[n].nbytes for i in range(3) for n in stream.layout.block_tensors(i))
    for i in (0, 1, 2):
        with stream.block(i):
            pass
    assert checkpoint.bytes_read == blocks
    for i in (2, 1, 0):
        with stream.block(i):
            pass
    assert checkpoint.bytes_read == 2 * blocks
