"""Killed at every durable step: no output or a whole one, the source untouched, and the same command goes on to the same bits."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from command import pared
from pared.journal import EVERY, FAULT, STEPS
from written import SRC, content

# Criteria that score on the way forward, on the way back, in steps and not at all; sizes searched; blocks refitted and merely cut.
RUNS = {
    "walk": ["--structures", "ffn", "--remove", "0.3"],
    "forward": ["--structures", "ffn", "--remove", "0.3", "--criterion", "wanda_sp", "--compensate", "refit"],
    "weights": ["--structures", "ffn", "--remove", "0.3", "--criterion", "l2", "--compensate", "none"],
    "removals": ["--structures", "attention,mlp", "--shape", "per-layer", "--remove", "0.5", "--criterion", "perplexity"],
    "rotation": ["--structures", "hidden", "--criterion", "rotation", "--remove", "0.3"],
    "search": ["--structures", "ffn", "--remove", "0.3", "--shape", "per-layer", "--search-steps", "2"],
    "back": [
        "--structures",
        "ffn",
        "--shape",
        "per-layer",
        "--allocate",
        "global",
        "--remove",
        "0.3",
        "--criterion",
        "obs-fisher",
    ],
    "steps": ["--structures", "hidden", "--remove", "0.3", "--criterion", "l2", "--iterative-steps", "2"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes, and text."""
    path = tiny.save(tiny.model("llama", vocab_size=1024), tmp_path_factory.mktemp("kill") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SRC / "pared" / "data" / "storyteller" / name, path / name)
    (path.parent / "text.txt").write_text("Once upon a time there was a small model. " * 60)
    return path


def command(model: Path, out: Path, flags: list[str]) -> list[str]:
    text = str(model.parent / "text.txt")
    sizes = ["--samples", "4", "--seq-len", "12", "--batch", "2"]
    return ["prune", str(model), "-o", str(out), "--calibration", text, *sizes, *flags]


# A run in a forked child, killed at the n-th step, for every n until one comes through; then the same call again.
KILL_AT_EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
os.environ["PARED_EVERY_STEP"] = "1"
import torch
torch.set_num_threads(1)
from pared import journal
from pared.cli import main

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
out = folder / "out"

def content(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}

def child(step, count):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        journal._counts.clear()
        if step:
            os.environ["PARED_FAULT"] = f"{step}:{count}"
        try:
            main(arguments)
        except SystemExit as ended:
            os._exit(ended.code)
    return os.waitpid(pid, 0)[1]

os.environ["PARED_STEPS_REACHED"] = str(folder / "reached")
try:  # here, not in a child: they all find what it imported and proved
    main(arguments)
except SystemExit as ended:
    assert ended.code == 0
want = content(out)
steps = (folder / "reached").read_text().splitlines()
for number, step in enumerate(steps):
    shutil.rmtree(out)
    (folder / "reached").unlink(missing_ok=True)
    status = child(step, steps[: number + 1].count(step))
    assert os.WIFSIGNALED(status), (step, status)
    found = {k: v for k, v in content(out).items() if not k.startswith(".pared")} if out.exists() else None
    assert found is None or found == want, step
    assert (found is not None) == (step == "renamed"), step
    if step == "renamed":
        assert child("", 0) >> 8 == 2 and content(out) == want
        continue
    assert child("", 0) == 0, step
    again = (folder / "reached").read_text().splitlines()[number + 1 :]
    assert content(out) == want, [k for k in want if content(out).get(k) != want[k]]
    # What is small is done again, whatever was reached of it.
    rest = steps[min(number + 1, steps.index("files")) :]
    assert again == ["claimed", *[s for s in rest if s != "claimed"]], (step, again)
    assert sorted(os.listdir(folder)) == ["out", "reached"]
print(" ".join(s.replace(" ", "_") for s in steps))
"""

_reached: set[str] = set()


@pytest.mark.parametrize("name", RUNS)
def test_a_kill_at_any_step_leaves_nothing_or_all_and_the_same_command_goes_on(name: str, model: Path, tmp_path: Path) -> None:
    before = content(model)
    arguments = command(model, tmp_path / "out", RUNS[name])
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path), *arguments],
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _reached.update(s.replace("_", " ") for s in done.stdout.splitlines()[-1].split())
    assert content(model) == before


def test_every_durable_step_was_killed_at() -> None:
    assert _reached == set(STEPS)


SLOWLY = """
import sys, time
from pared.scoring_steps import ScoringSteps
before = ScoringSteps.done
def slow(self, i, hidden):
    before(self, i, hidden)
    print("block", i, flush=True)
    time.sleep(0.5)
ScoringSteps.done = slow
from pared.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_says_how_to_go_on(number: int, model: Path, tmp_path: Path) -> None:
    arguments = command(model, tmp_path / "out", RUNS["weights"])
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "block 0\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert f"pared {shlex.join(arguments)}" in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    done = pared(*arguments)
    assert done.code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert pared(*command(model, tmp_path / "whole", RUNS["weights"])).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def stopped(model: Path, out: Path, flags: list[str]) -> None:
    """A run that is killed once its plan is there."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", FAULT: "planned"}
    done = subprocess.run([sys.executable, "-m", "pared", *command(model, out, flags)], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL


def test_another_recipe_source_or_text_does_not_go_on_with_a_stopped_run(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "model"
    shutil.copytree(model.parent, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    stopped(mine, out, RUNS["weights"])
    before = content(tmp_path)
    done = pared(*command(mine, out, [*RUNS["weights"], "--seed", "5"]))
    assert done.code == 2 and "recipe.seed was 0, is 5" in done.err and "--restart" in done.err
    shard = mine / "model.safetensors"
    os.utime(shard, ns=(1, 1))
    done = pared(*command(mine, out, RUNS["weights"]))
    assert done.code == 2 and "source.model.safetensors was" in done.err
    assert content(tmp_path) == before
    assert pared(*command(mine, out, [*RUNS["weights"], "--restart"])).code == 0
    assert out.is_dir() and not (tmp_path / "out.partial").exists()


def test_the_second_of_two_runs_on_one_output_is_refused(model: Path, tmp_path: Path) -> None:
    arguments = command(model, tmp_path / "out", RUNS["weights"])
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], env=env, text=True, stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == "block 0\n"
    done = pared(*arguments)
    assert done.code == 2 and "another run" in done.err
    first.communicate()
    assert first.returncode == 0 and (tmp_path / "out" / "manifest.json").exists()


def test_a_disk_that_fills_up_midway_is_said_and_the_run_goes_on_when_there_is_room(model: Path, tmp_path: Path) -> None:
    arguments = command(model, tmp_path / "out", RUNS["walk"])
    limited = (
        "import resource, sys\nfrom pared.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\nmain(sys.argv[1:])"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", EVERY: "1"}
    done = subprocess.run([sys.executable, "-c", limited, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    assert pared(*arguments).code == 0
    assert pared(*command(model, tmp_path / "whole", RUNS["walk"])).code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
