"""Training on two processes, with DDP, FSDP2 and DeepSpeed over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import made
import tiny
from pared.recover import recover
from pared.verify import verify

SETTINGS = {"tokens": 2400, "seq_len": 32, "evaluations": 2, "learning_rate": 3e-3, "held_out": 0.1, "device": "cpu"}
# What `accelerate launch --use_fsdp --fsdp_version 2 ...` puts into the environment.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# DeepSpeed compiles its kernels for gloo with a C++ compiler when it first runs.
ZERO = {
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed"])
def test_two_processes_give_what_one_gives(tmp_path: Path, kind: str, method: str) -> None:
    """The rows of each step are shared out, and its loss is that of all of them."""
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    made.checkpoint(tmp_path / "dense")
    made.pruned(tmp_path / "dense", tmp_path / "pruned")
    text = made.text(tmp_path / "text.jsonl")
    merge = method == "lora"
    alone = {**SETTINGS, "method": method, "merge": merge, "batch": 4}
    one = recover(tmp_path / "pruned", out=tmp_path / "one", teacher=tmp_path / "dense", data=str(text), **alone)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in {**SETTINGS, "method": method, "batch": 2}.items()]
    flags += ["--merge"] * merge
    if kind == "deepspeed":
        (tmp_path / "zero.json").write_text(json.dumps(ZERO))
        flags += [f"--deepspeed={tmp_path / 'zero.json'}"]
    command = [*launch, "-m", "pared", "recover", tmp_path / "pruned", "-o", tmp_path / "two", "--teacher", tmp_path / "dense"]
    done = subprocess.run(
        [*map(str, command), "--data", str(text), *flags],
        env={**made.environment(), "DS_ACCELERATOR": "cpu", **(FSDP2 if kind == "fsdp2" else {})},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two/recovery.json").read_text())
    assert (two["steps"], two["tokens"]) == (one.report["steps"], one.report["tokens"])
    assert two["held_out"]["best"] == pytest.approx(one.report["held_out"]["best"], rel=1e-2)
    start, a, b = (tiny.logits(made.loaded(tmp_path / n)) for n in ("pruned", "one", "two"))
    assert (a - b).abs().mean() < 0.05 * (a - start).abs().mean()
    assert verify(tmp_path / "two") == [] and not (tmp_path / "two.training").exists()
