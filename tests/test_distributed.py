"""Two processes under torchrun: the same scores to rounding, the same plan, one output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from pared.checkpoint import Checkpoint
from pared.plan import Plan
from written import SRC

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


def torchrun(processes: int, *arguments: object) -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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


def test_the_default_method_writes_once_and_alike(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama", vocab_size=1024), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SRC / "pared" / "data" / "storyteller" / name, model / name)
    (tmp_path / "text.txt").write_text("Once upon a time there was a small model. " * 100)
    sizes = ("--samples", 8, "--seq-len", 24, "--batch", 2, "--remove", 0.2)
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        torchrun(processes, "-m", "pared", "prune", model, "-o", out, "--calibration", tmp_path / "text.txt", *sizes)
    one, two = (Checkpoint.open(tmp_path / f"out{n}") for n in (1, 2))
    assert Plan.load(one.path / "plan.json").layers == Plan.load(two.path / "plan.json").layers
    assert one.tensors.keys() == two.tensors.keys()
    assert all(tiny.close(two.read(n).float(), one.read(n).float(), 2e-2) for n in one.tensors)
    assert sorted(p.name for p in one.path.iterdir()) == sorted(p.name for p in two.path.iterdir())


def test_in_one_process_nothing_is_summed_or_split() -> None:
    from pared import distributed

    value = torch.ones(3)
    distributed.total(value)
    assert torch.equal(value, torch.ones(3)) and distributed.total_of(2.0) == 2.0
    assert distributed.own_rows([1, 2, 3]) == [1, 2, 3] and distributed.once(lambda: 5) == 5
