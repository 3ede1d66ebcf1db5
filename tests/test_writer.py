"""Writing a checkpoint: at any moment, whatever happens, there is a whole output or none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from pared.checkpoint import INDEX, SINGLE, Checkpoint
from pared.errors import ModelError, ResourceError, UsageError
from pared.writer import CheckpointWriter
from written import content, run_python, some_tensors, write


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = write(tmp_path / "out", some_tensors())
    before = content(out)
    with pytest.raises(UsageError, match="exists"):
        write(out, some_tensors(1))
    assert content(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_all_of_it_or_nothing(tmp_path: Path) -> None:
    out = write(tmp_path / "out", some_tensors(), max_shard_bytes=256)
    before = content(out)
    with pytest.raises(RuntimeError), CheckpointWriter(out, overwrite=True) as writer:
        writer.add("t", torch.zeros(3))
        raise RuntimeError
    assert content(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]
    write(out, {"t": torch.zeros(3)}, overwrite=True)
    assert sorted(content(out)) == ["config.json", "manifest.json", SINGLE]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    for victim in (home, home / "thesis.tex"):
        with pytest.raises(UsageError, match="not a"):
            CheckpointWriter(victim, overwrite=True)
    partial = tmp_path / "x.partial"
    home.rename(partial)
    with pytest.raises(UsageError, match="not written by pared"):
        CheckpointWriter(tmp_path / "x")
    assert content(tmp_path) == {"x.partial/thesis.tex": b"years"}


@pytest.mark.parametrize("out", ["model", "model/out", ".", "model/../model", "link", "link/out"])
def test_the_source_is_never_written_to(tmp_path: Path, out: str) -> None:
    model = write(tmp_path / "model", some_tensors())
    (tmp_path / "link").symlink_to(model)
    before = content(tmp_path)
    with pytest.raises(UsageError, match="source"):
        CheckpointWriter(tmp_path / out, source=model, overwrite=True)
    assert content(tmp_path) == before


def test_an_error_leaves_nothing_not_even_made_parents(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="twice"), CheckpointWriter(tmp_path / "a" / "b" / "out") as writer:
        writer.add("t", torch.zeros(2))
        writer.add("t", torch.zeros(2))
    with CheckpointWriter(tmp_path / "c" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", "..", "manifest.json", SINGLE, INDEX, ".pared-spool"])
def test_a_file_can_not_land_outside_or_pose_as_weights(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError), CheckpointWriter(tmp_path / "out") as writer:
        writer.add_file(name, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_tensors_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tensors"):
        write(tmp_path / "out", {})
    with pytest.raises(ModelError, match="can not be written"):
        write(tmp_path / "out", {"t": torch.zeros(2, device="meta")})
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_the_same_output(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(2))
        with pytest.raises(UsageError, match="another run"):
            CheckpointWriter(tmp_path / "out")
        writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


WRITE_SLOWLY = """
import json, sys, time, torch
from pared.writer import CheckpointWriter
with CheckpointWriter(sys.argv[1], overwrite=True, max_shard_bytes=40_000) as writer:
    print("started", flush=True)
    for i in range(200):
        writer.add(f"t{i}", torch.full((50, 50), float(i)))
    writer.add_file("config.json", json.dumps({"model_type": "llama"}))
    writer.commit()
"""


def test_a_kill_leaves_no_output_and_a_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    reference = run_python(WRITE_SLOWLY, tmp_path / "reference")
    reference.communicate()
    want = content(tmp_path / "reference")
    assert Checkpoint.open(tmp_path / "reference").num_parameters == 200 * 2500
    out = tmp_path / "new"
    process = run_python(WRITE_SLOWLY, out)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() and (tmp_path / "new.partial").is_dir()
    run_python(WRITE_SLOWLY, out).communicate()
    assert content(out) == want and not (tmp_path / "new.partial").exists()


# Kills itself at the n-th file operation, for every n until a run comes through, and reruns after each.
KILL_EVERYWHERE = """
import os, shutil, signal, sys, torch
from pathlib import Path
from pared.writer import CheckpointWriter

folder, case = Path(sys.argv[1]), sys.argv[2]
out = folder / "out"
torch.set_num_threads(1)

def write(seed):
    with CheckpointWriter(out, overwrite=True, max_shard_bytes=100) as writer:
        for i in range(3):
            writer.add(f"t{i}", torch.full((20,), float(seed + i)))
        writer.add_file("config.json", "{}")
        writer.commit()

def content():
    return {p.name: p.read_bytes() for p in out.iterdir()} if out.exists() else None

def until(n):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(folder) in str(args[0]):
            count += 1
            if count == n or (event == "os.rename" and str(args[0]).endswith(str(n))):
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def killed_at(n):
    child = os.fork()
    if child == 0:
        until(n)
        write(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def fresh():
    shutil.rmtree(folder)
    folder.mkdir()
    if case == "replacing":
        write(0)
    if case.startswith("after"):
        assert killed_at(first) and os.listdir(folder) == ["out.partial"]
    return content()

folder.mkdir()
write(1)
new, n, states = content(), 0, set()
# The file before whose renaming an earlier run was killed, for the cases that start from its remains.
first = sys.argv[3]
while True:
    n += 1
    old = fresh()
    status = killed_at(n)
    found = content()
    states.add("none" if found is None else "old" if found == old else "new" if found == new else f"mixed at {n}")
    write(1)
    states.add("rerun" if content() == new and os.listdir(folder) == ["out"] else f"left {os.listdir(folder)} at {n}")
    if status == 0:
        break
print(n > 20, sorted(states))
"""


CASES = {
    "new": ("", ["new", "none", "rerun"]),
    "replacing": ("", ["new", "none", "old", "rerun"]),
    "after a kill among the shards": (".shard-00001", ["new", "none", "rerun"]),
    "after a kill before the rename": ("out.partial", ["new", "none", "rerun"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_any_file_operation_leaves_a_whole_output_or_none(tmp_path: Path, case: str) -> None:
    first, states = CASES[case]
    out, err = run_python(KILL_EVERYWHERE, tmp_path / "folder", case, first).communicate()
    assert out == f"True {states}\n", out + err


def test_a_kill_between_the_two_renames_gives_the_old_one_back(tmp_path: Path) -> None:
    out = write(tmp_path / "out", some_tensors())
    old = content(out)
    out.rename(tmp_path / "out.pared-old")
    with pytest.raises(UsageError, match="exists"):
        write(out, some_tensors(1))
    assert content(out) == old and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_from_a_bug(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch\nfrom pared.errors import ResourceError\nfrom pared.writer import CheckpointWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with CheckpointWriter(sys.argv[1]) as w:\n"
        "        for i in range(9): w.add(f't{i}', torch.zeros(9000))\n"
        "        w.commit()\n"
        "except ResourceError as error: print(error.exit_code)"
    )
    process = run_python(code, tmp_path / "out")
    out, err = process.communicate()
    assert out == "5\n", err
    assert list(tmp_path.iterdir()) == []
    assert ResourceError.exit_code == 5
