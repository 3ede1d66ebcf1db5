"""Two processes under torchrun: the same scores to rounding, the same plan, one output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from pared.checkpoint import Checkpoint
from pared.journal import EVERY, FAULT, REACHED
from pared.plan import Plan
from written import SRC, content

SCORES = """
import sys, torch
torch.set_num_threads(1)
from pared.distributed import joined, rank
from pared.run import prune
with joined():
    ids = torch.randint(3, 64, (7, 16), generator=torch.Generator().manual_seed(3))
    for criterion in sys.argv[3].split(","):
        name, _, parts = criterion.partition("+")
        whole = {"block_influence": ("layer",), "perplexity": ("layer",), "angular": ("layer",), "rotation": ("hidden",), "reap": ("expert",)}
        structures = ("attention", "mlp") if parts else whole.get(name, ("ffn",))
        found = prune(sys.argv[1], calibration=ids, criterion=name, structures=structures, compensate="none", batch=2,
                      shape="per-layer" if parts else "uniform", remove=0.2, dry_run=True)
        if rank() == 0:
            found.scores.save(f"{sys.argv[2]}-{criterion}")
            found.plan.save(f"{sys.argv[2]}-{criterion}.json")
"""


def torchrun(processes: int, *arguments: object, fails: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", **variables}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert fails or done.returncode == 0, done.stderr[-3000:]
    return done


def with_text(folder: Path) -> tuple[Path, Path]:
    """A tiny model with a tokenizer, and text."""
    model = tiny.save(tiny.model("llama", vocab_size=1024), folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SRC / "pared" / "data" / "storyteller" / name, model / name)
    (folder / "text.txt").write_text("Once upon a time there was a small model. " * 100)
    return model, folder / "text.txt"


@pytest.mark.parametrize(
    ("family", "criteria"),
    [
        ("llama", "taylor,taylor-second,wanda_sp,flap,obs,obs-fisher"),
        ("llama", "perplexity,perplexity+parts,block_influence,block_influence+parts,angular,rotation"),
        ("mixtral", "taylor,reap"),
    ],
)
def test_scores_are_those_of_one_process(tmp_path: Path, family: str, criteria: str) -> None:
    model = tiny.save(tiny.model(family), tmp_path / "model")
    script = tmp_path / "scores.py"
    script.write_text(SCORES)
    for processes in (1, 2):
        torchrun(processes, script, model, tmp_path / f"p{processes}", criteria)
    from pared.scores import Scores

    for criterion in criteria.split(","):
        one, two = (Scores.load(tmp_path / f"p{n}-{criterion}") for n in (1, 2))
        assert one.of.keys() == two.of.keys()
        assert all(tiny.close(two.of[k], one.of[k], 1e-4) for k in one.of), criterion
        plans = [Plan.load(tmp_path / f"p{n}-{criterion}.json") for n in (1, 2)]
        assert plans[0].layers == plans[1].layers, criterion


# It ends without Python's own teardown, in which torch now and then aborts: a thread of gloo's is still there.
RECONSTRUCTED = """
import os, sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from torch import nn
from pared.distributed import joined, own_parts, rank, size, total
from pared.reconstruct import reconstruct
with joined():
    draw = torch.Generator().manual_seed(0)
    rows = [3, 4, 4, 1, 4, 4, 2, 4, 4, 4, 1] if sys.argv[2] == "many" else [1]
    batches = [torch.randn(n, 6, 8, generator=draw) for n in rows]
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    small = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    parts, share = own_parts(rows)
    here = torch.zeros(len(rows), dtype=torch.float64)
    for b, part in share.parts.items():
        here[b] = part
    total(here)
    assert torch.allclose(here, torch.ones_like(here), atol=1e-12), "all of each batch is somewhere"
    mine = [batches[b][rows] for b, rows in parts.items()]
    where = torch.cat(batches)[list(share.rows)]
    assert torch.equal(torch.cat(mine), where)
    with torch.no_grad():
        wanted = [dense(h) for h in mine]
    errors = reconstruct(small, lambda m, h: m(h), mine, wanted, steps=40, seed=0, held_out=4, share=share if size() > 1 else None)
    same = torch.cat([p.detach().flatten() for p in small.parameters()])
    summed = same.clone()
    total(summed)
    assert torch.equal(summed, size() * same), "all processes have the same weights"
    if rank() == 0:
        save_file({"weights": same, "errors": torch.tensor(errors)}, sys.argv[1] + str(size()))
sys.stderr.flush()
os._exit(0)
"""


@pytest.mark.parametrize("rows", ["many", "one"])
def test_gradient_descent_takes_its_steps_on_the_rows_of_all(tmp_path: Path, rows: str) -> None:
    script = tmp_path / "reconstructed.py"
    script.write_text(RECONSTRUCTED)
    for processes in (1, 2):
        torchrun(processes, script, tmp_path / "p", rows)
    one, two = (load_file(tmp_path / f"p{n}") for n in (1, 2))
    assert one["errors"][1] < one["errors"][0]
    assert all(tiny.close(two[k], one[k], 1e-4) for k in one)


@pytest.mark.parametrize("more", [(), ("--reconstruct", 10), ("--reconstruct", 10, "--step-windows", 1)])
def test_a_refit_is_written_once_and_alike(tmp_path: Path, more: tuple[object, ...]) -> None:
    model, calibration = with_text(tmp_path)
    sizes = ("--samples", 8, "--seq-len", 24, "--batch", 2, "--remove", 0.2)
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        torchrun(processes, "-m", "pared", "prune", model, "-o", out, "--calibration", calibration, *sizes, *more)
    one, two = (Checkpoint.open(tmp_path / f"out{n}") for n in (1, 2))
    assert Plan.load(one.path / "plan.json").layers == Plan.load(two.path / "plan.json").layers
    assert one.tensors.keys() == two.tensors.keys()
    assert all(tiny.close(two.read(n).float(), one.read(n).float(), 2e-2) for n in one.tensors)
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())


def test_a_walk_of_several_processes_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model, calibration = with_text(tmp_path)
    sizes = ("--samples", 6, "--seq-len", 12, "--batch", 4, "--remove", 0.3, "--structures", "ffn", "--compensate", "refit")
    flags = (model, "--calibration", calibration, "--criterion", "l2", *sizes)
    every = {EVERY: "1", REACHED: str(tmp_path / "reached")}
    assert torchrun(2, "-m", "pared", "prune", "-o", tmp_path / "whole", *flags, **every).returncode == 0
    steps = (tmp_path / "reached").read_text().splitlines()
    (tmp_path / "reached").unlink()
    killed = torchrun(2, "-m", "pared", "prune", "-o", tmp_path / "out", *flags, fails=True, **every, **{FAULT: "block:2"})
    assert killed.returncode != 0 and not (tmp_path / "out").exists()
    (tmp_path / "reached").unlink()
    torchrun(2, "-m", "pared", "prune", "-o", tmp_path / "out", *flags, **every)
    rest = steps[steps.index("block") + 2 :]
    assert (tmp_path / "reached").read_text().splitlines() == ["claimed", *rest], "two blocks are not done again"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_in_one_process_nothing_is_summed_or_split() -> None:
    from pared import distributed

    value = torch.ones(3)
    distributed.total(value)
    assert torch.equal(value, torch.ones(3)) and distributed.total_of(2.0) == 2.0
    assert distributed.own_rows([1, 2, 3]) == [1, 2, 3] and distributed.once(lambda: 5) == 5
