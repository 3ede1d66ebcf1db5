"""The command line: what each command gives on stdout, which setting wins, and how the program ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from command import pared, tree
from pared.cli import report
from pared.commands import demo
from pared.commands.options import base_settings
from pared.criteria import all_criteria
from pared.errors import GateError, MissingError, ParedError, ResourceError
from pared.plan import Plan
from pared.recipe import Recipe, shipped_recipes
from pared.tensorfile import sha256

PLAIN = ("--criterion", "l1", "--compensate", "none")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of a tiny llama, without a tokenizer."""
    return tiny.save(tiny.model("llama"), tmp_path / "model")


def result(*arguments: object) -> dict[str, Any]:
    """What a command prints under --format json."""
    done = pared(*arguments, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert isinstance(found, dict)
    return found


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_command_line_is_there_before_torch_is() -> None:
    code = "import sys, pared.cli as c; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


def test_threads_that_wait_leave_the_cores_to_others(storyteller: Path) -> None:
    """As OpenMP itself says when torch loads it."""

    def spins(**own: str) -> str:
        env = {k: v for k, v in ENVIRONMENT.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        command = [sys.executable, "-m", "pared", "inspect", storyteller]
        told = subprocess.run(command, capture_output=True, text=True, env={**env, "OMP_DISPLAY_ENV": "VERBOSE", **own}).stderr
        found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", told)
        return found[1] if found else pytest.skip("this torch has another OpenMP than libgomp")

    assert spins() == "10000"
    assert spins(GOMP_SPINCOUNT="77") == "77" and int(spins(OMP_WAIT_POLICY="active")) > 1e6, "what the user says stands"


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_every_setting_of_a_recipe_is_a_flag(command: str) -> None:
    shown = pared(command, "--help").out
    for name in Recipe.model_fields:
        assert f"--{name.replace('_', '-')} " in shown


def test_a_flag_goes_over_set_and_set_over_the_recipe_and_that_over_the_default(tmp_path: Path, model: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("remove: 0.11\nseed: 1\nbatch: 3\nstructures: [ffn]\n")
    flags = ("--recipe", recipe, "--set", "seed=2", "--set", "remove=0.12", "--set", "keep-last=0", "--remove", "0.13")
    used = result("prune", model, "--dry-run", *flags, *PLAIN)["recipe"]
    assert (used["remove"], used["seed"], used["batch"], used["structures"]) == (0.13, 2, 3, ["ffn"])
    assert used["samples"] == Recipe().samples


def test_set_reads_values_as_yaml_does() -> None:
    assert base_settings(None, ["structures=[kv, ffn]", "seed=3", "align=null", "calibration=a=b.txt"]) == {
        "structures": ["kv", "ffn"],
        "seed": 3,
        "align": None,
        "calibration": "a=b.txt",
    }


def test_structures_are_the_same_list_from_a_flag_and_from_a_file(tmp_path: Path, model: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("structures: [kv, ffn]\n")
    how = ("prune", model, "--dry-run", *PLAIN)
    assert result(*how, "--structures", "kv, ffn")["after"] == result(*how, "--recipe", recipe)["after"]


# ---- prune, plan, apply ---------------------------------------------------------------------------------------------


def test_stdout_is_the_path_of_the_result_and_nothing_else(tmp_path: Path, model: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    done = pared("prune", model, "-o", out, *PLAIN)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert "removed" in done.err and "parameters" in done.err
    assert pared("plan", model, "-o", plan, *PLAIN).out == f"{plan}\n"
    assert pared("apply", model, plan, "-o", tmp_path / "applied").out == f"{tmp_path / 'applied'}\n"


def test_a_dry_run_writes_nothing_and_counts_what_the_run_would(tmp_path: Path, model: Path) -> None:
    before = tree(tmp_path)
    done = pared("prune", model, "--dry-run", "-o", tmp_path / "out", *PLAIN)
    assert (done.code, done.out) == (0, "")
    dry = result("prune", model, "--dry-run", *PLAIN)
    assert tree(tmp_path) == before
    wet = result("prune", model, "-o", tmp_path / "out", *PLAIN)
    assert dry["after"] == wet["after"] and dry["removed"] == wet["removed"]


def test_plan_and_apply_are_the_two_halves_of_prune(tmp_path: Path, model: Path) -> None:
    out, plan, applied = tmp_path / "out", tmp_path / "plan.json", tmp_path / "applied"
    whole = result("prune", model, "-o", out, "--remove", "0.3", *PLAIN)
    half = result("plan", model, "-o", plan, "--remove", "0.3", *PLAIN)
    other = result("apply", model, plan, "-o", applied)
    assert whole["after"] == half["after"] == other["after"]
    assert Plan.load(plan).layers == Plan.load(out / "plan.json").layers
    assert sha256(out / "model.safetensors") == sha256(applied / "model.safetensors")


def test_it_is_said_when_another_model_type_was_written(tmp_path: Path) -> None:
    # 3 of 4 KV groups of 2 heads do not divide 32 channels, which LlamaConfig insists on.
    model = tiny.save(tiny.model("llama"), tmp_path / "model")
    how = ("--structures", "kv", "--of", "kv-cache", "--remove", "0.25", *PLAIN)
    found = result("prune", model, "-o", tmp_path / "out", *how)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert (found["model_type"], written, found["written_as"]) == ("llama", "mistral", "mistral")


# ---- eval, verify, ls -----------------------------------------------------------------------------------------------


def test_eval_prints_the_keys_that_programs_rely_on(tmp_path: Path, storyteller: Path) -> None:
    found = result("eval", storyteller, "--against", storyteller, "--max-windows", "2", "--seq-len", "16")
    wanted = "perplexity tokens seq_len kl params block_params bytes top1_agreement macs_per_token protocol"
    wanted += " prefill_tokens_per_s decode_tokens_per_s peak_memory_bytes"
    assert set(wanted.split()) <= found.keys() and all(found[k] is not None for k in wanted.split())
    assert {"perplexity", "params", "bytes"} <= found["against"].keys()
    text = pared("eval", storyteller, "--max-windows", "2", "--seq-len", "16", "--no-speed")
    assert text.code == 0 and "perplexity" in text.out


def test_verify_passes_what_was_written_and_names_what_was_changed_since(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    assert pared("prune", model, "-o", out, *PLAIN).code == 0
    assert (pared("verify", out).code, result("verify", out)["problems"]) == (0, [])
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN at the end
    (out / "model.safetensors").write_bytes(bytes(data))
    done = pared("verify", out)
    assert done.code == 3 and done.out == ""
    assert all(line.startswith("model.safetensors: ") for line in done.err.splitlines())
    assert "sha256" in done.err and "NaN" in done.err
    found = pared("verify", out, "--format", "json")
    assert found.code == 3 and len(json.loads(found.out)["problems"]) == 2


def test_ls_shows_every_criterion_with_its_paper_and_every_recipe() -> None:
    shown = pared("ls", "criteria").out
    for name, criterion in all_criteria().items():
        assert name in shown
        assert all(part in shown for part in criterion.paper.split())
    assert {c["name"]: c["needs"] for c in result("ls", "criteria")["criteria"]} == {
        name: criterion.needs for name, criterion in all_criteria().items()
    }
    assert [r["name"] for r in result("ls", "recipes")["recipes"]] == list(shipped_recipes())
    assert "llama" in pared("ls", "families").out


def test_version_and_help() -> None:
    assert pared("--version").out.startswith("pared ")
    assert (pared("--help").code, pared().code) == (0, 2)
    assert pared().out == pared("--help").out


# ---- demo -----------------------------------------------------------------------------------------------------------


def test_the_demo_prunes_the_shipped_model_and_can_be_run_again(
    tmp_path: Path, storyteller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"SAMPLES": 16, "WINDOWS": 4, "SEQ_LEN": 48}.items():
        monkeypatch.setattr(demo, name, value)
    done = pared("demo")
    assert (done.code, done.out) == (0, "demo-output\n"), done.err
    assert "perplexity" in done.err and "KL" in done.err
    found = result("demo", "-o", tmp_path / "demo-output")
    removed = 1 - found["block_params"] / found["against"]["block_params"]
    assert 0.25 <= removed < 0.27
    assert found["kl"] > 0 and found["bytes"] < found["against"]["bytes"]
    assert pared("verify", "demo-output").code == 0


# ---- how it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ParedError("a"), 1),
        (MissingError("a", where="b", fix="c"), 4),
        (ResourceError("a"), 5),
        (GateError("a"), 6),
        (MemoryError(), 5),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.\nSecond line"), 5),
        (PermissionError(13, "Permission denied", "/there"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_end_with_their_code_in_at_most_three_lines(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == code
    said = capsys.readouterr().err
    assert 1 <= len(said.splitlines()) <= 3 and "Traceback" not in said


def test_a_bug_ends_with_1_and_shows_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        [][1]
    except IndexError as error:
        assert report(error) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "IndexError" in said.splitlines()[-1] and Path(__file__).name in said


def test_python_m_pared_is_the_same_program() -> None:
    for arguments in (["--version"], ["prune", "--remov", "1"]):
        ours = subprocess.run([sys.executable, "-m", "pared", *arguments], capture_output=True, text=True, env=ENVIRONMENT)
        here = pared(*arguments)
        assert (ours.returncode, ours.stdout, ours.stderr) == (here.code, here.out, here.err)


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "pared", "--version"], stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


def slow_run(out: Path, storyteller: Path, **streams: Any) -> subprocess.Popen[bytes]:
    """A run that takes minutes if nothing ends it."""
    how = ["--criterion", "taylor-mixed", "--samples", "512", "--seq-len", "512", "--batch", "1"]
    # A background job of a shell that is not interactive ignores SIGINT, and its children do too unless told otherwise.
    return subprocess.Popen(
        [sys.executable, "-m", "pared", "prune", str(storyteller), "-o", str(out), *how],
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        **streams,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_long_step_at_once(tmp_path: Path, storyteller: Path, number: signal.Signals, code: int) -> None:
    running = slow_run(tmp_path / "out", storyteller, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (tmp_path / "out.partial").exists() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert (tmp_path / "out.partial").exists()
    running.send_signal(number)
    assert running.stderr is not None and b"finishing the step" in running.stderr.readline()
    running.send_signal(number)
    said = running.communicate(timeout=60)[1].decode()
    # Python itself prints one where the signal comes while it deletes an object.
    assert running.returncode == code and "Traceback" not in said.partition("Exception ignored")[0]
    assert "go on with: pared prune" in said and not (tmp_path / "out").exists()


def test_a_terminal_sees_progress_and_a_pipe_beside_it_only_the_path(tmp_path: Path, model: Path) -> None:
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "pared", "prune", str(model), "-o", str(tmp_path / "out"), *PLAIN]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**ENVIRONMENT, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert running.communicate()[0].decode() == f"{tmp_path / 'out'}\n"
    assert running.returncode == 0
    assert b"\x1b[" in shown and b"scores" in shown and b"parameters" in shown
