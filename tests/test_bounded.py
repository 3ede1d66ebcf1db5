"""The bound on memory is kept, and said to be too small before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from command import pared
from pared.checkpoint import Checkpoint
from pared.errors import ResourceError, UsageError
from pared.footprint import parse_size
from pared.journal import EVERY
from pared.means import Means, backing_off
from pared.process import resident_bytes
from pared.resources import Limits, Resources
from pared.run import prune
from written import SRC

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from shapes import write_checkpoint

LIMIT = 800_000_000
# The limit holds for all that the process allocates, whatever for: what importing the libraries takes is within it.
# (What is mapped from files, code that is, does not count; it is shared, and can be dropped at any time.)
UNDER_A_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
from pared.cli import main
main(sys.argv[2:])
"""


def limited(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(limit), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["taylor", "wanda_sp"])
def test_a_model_of_one_and_a_half_gigabytes_in_eight_tenths(tmp_path: Path, criterion: str) -> None:
    shape = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    shape |= {"num_key_value_heads": 8, "num_hidden_layers": 57, "max_position_embeddings": 512}
    model = tmp_path / "model"
    assert write_checkpoint(model, shape) > 1_500_000_000
    (tmp_path / "text.txt").write_text("Once upon a time there was a large model. " * 100)
    flags = ("--calibration", tmp_path / "text.txt", "--samples", 4, "--seq-len", 32, "--criterion", criterion)
    flags += ("--compensate", "none", "--structures", "ffn", "--max-memory", "0.8GB", "--format", "json")
    done = limited(LIMIT, "prune", model, "-o", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads(done.stdout)["resources"]
    assert used["peak"] < LIMIT and used["peak"] < used["predicted_peak"] <= LIMIT
    assert Checkpoint.open(tmp_path / "out").num_parameters < Checkpoint.open(model).num_parameters


def model_and_text(folder: Path) -> tuple[Path, list[object]]:
    model = tiny.save(tiny.model("llama", vocab_size=1024), folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SRC / "pared" / "data" / "storyteller" / name, model / name)
    (folder / "text.txt").write_text("Once upon a time there was a small model. " * 200)
    return model, ["--calibration", folder / "text.txt", "--samples", 32, "--seq-len", 32]


def test_a_bound_changes_no_bit_of_the_result(tmp_path: Path) -> None:
    model, flags = model_and_text(tmp_path)
    results = {}
    for name, more in {"free": [], "bound": ["--max-memory", "1GiB", "--spill", tmp_path / "spill"]}.items():
        # A process of its own: this one may have held more before.
        command = [sys.executable, "-m", "pared", "prune", model, "-o", tmp_path / name, *flags, *more, "--format", "json"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads(done.stdout)["resources"]
    for path in (tmp_path / "free").iterdir():
        assert path.read_bytes() == (tmp_path / "bound" / path.name).read_bytes(), path.name
    assert results["bound"]["peak"] <= 2**30


def test_what_does_not_fit_is_said_with_the_least_that_would(tmp_path: Path) -> None:
    model, flags = model_and_text(tmp_path)
    done = pared("prune", model, "-o", tmp_path / "out", *flags, "--max-memory", "100MiB")
    assert done.code == 5 and "needs at least" in done.err and "--max-memory 100 MiB" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


def test_a_bound_makes_the_batch_smaller_and_hidden_states_spill(tmp_path: Path) -> None:
    model = tiny.model("llama", hidden_size=32, intermediate_size=2048, vocab_size=64)
    ids = tiny.tokens(64, 60)
    settings = {"calibration": ids, "criterion": "wanda_sp", "structures": ("ffn",), "compensate": "none", "batch": 64}
    before = resident_bytes()
    free = prune(model, dry_run=True, **settings)
    # What this process holds of itself by now is no part of what the run needs.
    needed = free.report["resources"]["predicted_peak"] + resident_bytes() - before
    bound = prune(model, dry_run=True, max_memory=needed - (12 << 20), spill=tmp_path, **settings)
    assert bound.report["resources"]["batch"] < free.report["resources"]["batch"]
    assert bound.plan.layers == free.plan.layers


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_size("4GiB") == 4 << 30 and parse_size("800MB") == 800_000_000 and parse_size("1.5g") == 3 << 29
    for wrong in ("", "much", "-1GiB", "4 apples", "0"):
        with pytest.raises(UsageError):
            parse_size(wrong)
    with pytest.raises(UsageError, match="nothing spills"):
        Limits.parse(spill="somewhere")
    with pytest.raises(UsageError) as caught:
        Limits.parse(max_memory="lots")
    assert caught.value.where == "--max-memory"


def test_a_device_that_runs_out_of_memory_gets_smaller_batches_up_to_three_times() -> None:
    seen: list[int] = []
    means = Means(Resources(64))

    def work(fits: int) -> int:
        seen.append(means.resources.batch)
        if means.resources.batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return means.resources.batch

    assert backing_off(means, lambda: work(16)) == 16 and seen == [64, 32, 16]
    means.resources = Resources(64)
    with pytest.raises(ResourceError, match="CUDA out of memory") as caught:
        backing_off(means, lambda: work(4))
    assert caught.value.fix == "--batch 4"
    assert seen[3:] == [64, 32, 16, 8]


@pytest.mark.parametrize("source", ["checkpoint", "live"])
def test_what_was_half_done_with_a_larger_batch_is_done_again(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EVERY, "1")
    model = tiny.model("llama")
    where = tiny.save(model, tmp_path / "model") if source == "checkpoint" else model
    settings = {"calibration": tiny.tokens(12, 16), "shape": "per-layer", "allocate": "global", "remove": 0.25, "align": 1}
    raised: list[str] = []

    def full(stage: str, done: int, total: int) -> None:
        """A device that is full in the middle of scoring, and once more in the middle of the refit."""
        if done == 2 and stage in ("second moments", "refit") and stage not in raised:
            raised.append(stage)
            raise torch.OutOfMemoryError("CUDA out of memory")

    got = prune(where, out=tmp_path / "out", batch=8, progress=full, **settings)
    assert raised == ["second moments", "refit"] and got.report["resources"]["batch"] == 2
    want = prune(where, out=tmp_path / "want", batch=2, **settings)
    assert got.plan.layers == want.plan.layers
    one, other = (Checkpoint.open(tmp_path / out) for out in ("out", "want"))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(tiny.close(one.read(n), other.read(n), 1e-3) for n in one.tensors)


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    from pared.resources import check_disk

    with pytest.raises(ResourceError, match="are free"):
        check_disk(tmp_path, 1 << 60, "hidden states", "free some")
    check_disk(tmp_path / "not" / "there", 1, "hidden states", "free some")
