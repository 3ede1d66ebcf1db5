"""On a CUDA device: what a CPU gives, within the bounds that were asked for. Skipped where no device is.

PARED_TEST_DEVICE=cpu runs what of this a CPU can do.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import made
import tiny
from pared import modeling
from pared.checkpoint import Checkpoint
from pared.evaluate.perplexity import Windows, logits_of, measure
from pared.journal import EVERY, FAULT
from pared.plan import Plan
from pared.run import Pruned, prune
from pared.scores import Scores
from test_distributed import SCORES, torchrun
from written import SRC

pytestmark = pytest.mark.gpu

# Products are summed in another order on a device: fp32 rounding, which solves enlarge.
SCORED, SOLVED = 1e-4, 1e-2


@pytest.fixture(scope="module")
def device() -> str:
    if forced := os.environ.get("PARED_TEST_DEVICE"):
        return forced
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return "cuda"


@pytest.fixture
def cuda(device: str) -> Iterator[str]:
    """A device whose memory can be bounded and counted, nothing of earlier tests on it."""
    if not device.startswith("cuda"):
        pytest.skip("memory is counted on a CUDA device alone")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0)


def same_scores(one: Scores | None, other: Scores | None) -> bool:
    assert one is not None and other is not None
    return one.of.keys() == other.of.keys() and all(tiny.close(one.of[k], other.of[k], SCORED) for k in one.of)


def same_weights(one: Path, other: Path, tolerance: float) -> bool:
    a, b = Checkpoint.open(one), Checkpoint.open(other)
    return a.tensors.keys() == b.tensors.keys() and all(
        tiny.close(a.read(n).float(), b.read(n).float(), tolerance) for n in a.tensors
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"shape": "per-layer", "search_steps": 2}),
        ("llama", {"criterion": "taylor-second", "compensate": "none"}),
        ("llama", {"criterion": "rotation", "structures": ("hidden",)}),
        ("llama", {"structures": ("attention", "mlp"), "shape": "per-layer"}),
        ("llama", {"reconstruct": 10}),
        ("gpt2", {"criterion": "wanda_sp", "compensate": "refit", "shape": "per-layer"}),
        ("mixtral", {}),
        ("mixtral", {"criterion": "reap", "structures": ("expert",), "remove": 0.2}),
    ],
)
def test_scores_plan_and_checkpoint_are_those_of_a_cpu(
    family: str, settings: dict[str, Any], device: str, tmp_path: Path
) -> None:
    model = tiny.save(tiny.model(family), tmp_path / "model")

    def on(where: str, out: str) -> Pruned:
        ids = tiny.tokens(24, 16)
        given = {"calibration": ids, "remove": 0.25, "batch": 4, "align": 1, "dtype": "float32", **settings}
        return prune(model, out=tmp_path / out, device=where, **given)

    there, here = on(device, "there"), on("cpu", "here")
    assert same_scores(there.scores, here.scores)
    assert there.plan.layers == here.plan.layers and there.plan.hidden == here.plan.hidden
    if here.plan.rotated:  # directions of equal energy may turn, and any may change its sign: the model is what counts
        ids = tiny.tokens(2, 16, seed=8)
        one, other = (tiny.logits(modeling.load(tmp_path / out), ids) for out in ("there", "here"))
        assert tiny.close(one, other, SOLVED)
    else:
        assert same_weights(tmp_path / "there", tmp_path / "here", SOLVED)


def test_a_live_model_on_the_device_is_pruned_where_it_is(device: str) -> None:
    model = tiny.model("llama")
    settings: dict[str, Any] = {"calibration": tiny.tokens(8, 16), "remove": 0.25, "align": 1}
    want = prune(model, **settings)
    there = model.to(torch.device(device))
    got = prune(there, device=device, **settings)
    assert got.model is not None and want.model is not None
    assert {p.device.type for p in got.model.parameters()} == {torch.device(device).type}
    assert tiny.close(tiny.logits(got.model.to(torch.device("cpu"))), tiny.logits(want.model), SOLVED)


def test_half_precision_is_what_the_checkpoint_has(device: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama").to(torch.bfloat16), tmp_path / "model")
    made_of = prune(model, out=tmp_path / "out", calibration=tiny.tokens(8, 16), remove=0.25, align=1, device=device)
    assert 0.25 <= made_of.plan.removed < 0.5
    written = Checkpoint.open(tmp_path / "out")
    assert {t.dtype for t in written.tensors.values()} == {"BF16"} and not list(written.non_finite())


# Wide blocks on few layers: what runs through them is most of the memory.
WIDE = {"hidden_size": 128, "intermediate_size": 8192, "num_hidden_layers": 2}
WIDE_RUN: dict[str, Any] = {
    "calibration": tiny.tokens(64, 60),
    "criterion": "wanda_sp",
    "structures": ("ffn",),
    "compensate": "none",
    "dtype": "float32",
    "remove": 0.2,
    "dry_run": True,
}


def test_the_bound_on_the_device_is_kept(cuda: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama", **WIDE), tmp_path / "model")
    free = prune(model, device=cuda, batch=64, **WIDE_RUN)
    taken = torch.cuda.max_memory_allocated()
    assert free.report["resources"]["batch"] == 64 and free.report["resources"]["device_peak"] == taken
    limit = free.report["resources"]["predicted_peak"] * 2 // 3
    assert taken > limit / 2, "the bound should be one that matters"
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    bound = prune(model, device=cuda, batch=64, max_gpu_memory=limit, spill=tmp_path, **WIDE_RUN)
    assert torch.cuda.max_memory_allocated() <= limit
    assert bound.report["resources"]["batch"] < 64
    assert same_scores(bound.scores, free.scores) and bound.plan.layers == free.plan.layers


def test_hidden_states_leave_the_device_and_come_back(cuda: str, tmp_path: Path) -> None:
    from pared.spill import Pool

    tensors = [torch.randn(3, 50, generator=torch.Generator().manual_seed(k)) for k in range(12)]
    size = tensors[0].numel() * 4
    pool = Pool(room=4 * 1024, folder=tmp_path, device_room=3 * size)  # page-locked memory comes in powers of two
    states = pool.store(t.to(cuda) for t in tensors)
    assert (pool.device_held, pool.held, pool.spilled) == (3 * size, 4 * 1024, 5 * size)
    for _ in range(3):  # places are used again while copies of what was in them may be under way
        states = pool.store(t * 1 for t in states.drain())
    assert all(torch.equal(got.cpu(), want) for got, want in zip(states, tensors, strict=True))


def test_a_device_that_runs_out_of_memory_gets_smaller_batches(cuda: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama", **WIDE), tmp_path / "model")
    want = prune(model, batch=8, **WIDE_RUN)
    prune(model, device=cuda, batch=4, **WIDE_RUN)  # what libraries take for themselves is taken by now
    gc.collect()
    torch.cuda.empty_cache()
    each = 60 * 8192 * 4  # one sequence's FFN channels; three of the kind are alive at once
    room = torch.cuda.memory_reserved() + 3 * 32 * each
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    got = prune(model, device=cuda, batch=64, **WIDE_RUN)
    assert got.report["resources"]["batch"] in (8, 16, 32)
    assert same_scores(got.scores, want.scores) and got.plan.layers == want.plan.layers


def test_as_many_processes_as_devices_give_the_scores_of_one(device: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    script = tmp_path / "scores.py"
    script.write_text(
        SCORES.replace("joined()", f"joined({device!r})").replace("dry_run=True", f"dry_run=True, device={device!r}")
    )
    criteria = "taylor,wanda_sp,flap,obs,obs-fisher,perplexity"
    torchrun(torch.cuda.device_count() or 1, script, model, tmp_path / "there", criteria)
    script.write_text(SCORES)
    torchrun(1, script, model, tmp_path / "here", criteria)
    for criterion in criteria.split(","):
        there, here = (Scores.load(tmp_path / f"{where}-{criterion}") for where in ("there", "here"))
        assert same_scores(there, here), criterion
        plans = [Plan.load(tmp_path / f"{where}-{criterion}.json") for where in ("there", "here")]
        assert plans[0].layers == plans[1].layers, criterion


@pytest.mark.parametrize("step", ["inputs of a block:2", "scores of a block:1", "block:2"])
def test_a_run_that_is_killed_on_the_device_goes_on_there(step: str, device: str, tmp_path: Path) -> None:
    model = made.checkpoint(tmp_path / "model")
    made.text(tmp_path / "text.jsonl")
    flags = ["--calibration", tmp_path / "text.jsonl", "--samples", 8, "--seq-len", 16, "--batch", 4, "--remove", 0.25]
    flags += ["--align", 1, "--shape", "per-layer", "--allocate", "global", "--device", device, "--dtype", "float32"]
    env = {**os.environ, "PYTHONPATH": str(SRC), EVERY: "1"}

    def run(out: str, **more: str) -> int:
        command = [sys.executable, "-m", "pared", "prune", model, "-o", tmp_path / out, *flags]
        return subprocess.run(list(map(str, command)), env={**env, **more}, capture_output=True).returncode

    assert run("killed", **{FAULT: step}) == -9 and not (tmp_path / "killed").exists()
    assert run("killed") == 0 and run("whole") == 0
    assert Plan.load(tmp_path / "killed/plan.json").layers == Plan.load(tmp_path / "whole/plan.json").layers
    assert same_weights(tmp_path / "killed", tmp_path / "whole", SCORED)


def test_perplexity_on_the_device_is_that_of_a_cpu(device: str) -> None:
    windows = Windows(tiny.tokens(6, 24), torch.ones(6, dtype=torch.int64), None, 6, 144)
    model, dense = tiny.model("llama", seed=1), tiny.model("llama")
    want = measure(logits_of(model), windows, against=logits_of(dense), batch=4)
    model.to(torch.device(device)), dense.to(torch.device(device))
    got = measure(logits_of(model), windows, against=logits_of(dense), batch=4, device=device)
    assert got.perplexity == pytest.approx(want.perplexity, rel=SCORED)
    assert got.kl == pytest.approx(want.kl, rel=SCORED)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recovery_on_the_device_comes_nearer_to_the_teacher(method: str, device: str, tmp_path: Path) -> None:
    from pared.recover import recover

    dense = made.checkpoint(tmp_path / "dense")
    small = made.pruned(dense, tmp_path / "small")
    data = made.text(tmp_path / "text.jsonl")
    where = "cpu" if device == "cpu" else "auto"
    settings: dict[str, Any] = {"seq_len": 32, "batch": 4, "evaluations": 2, "learning_rate": 3e-3, "held_out": 0.1}
    settings |= {"merge": True} if method == "lora" else {}
    done = recover(
        small, out=tmp_path / "out", teacher=dense, data=str(data), tokens=4000, device=where, method=method, **settings
    )
    assert done.report["held_out"]["best"] < 0.95 * done.report["held_out"]["start"]
    assert not list(Checkpoint.open(tmp_path / "out").non_finite())
