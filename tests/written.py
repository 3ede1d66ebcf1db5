"""Small checkpoints written for tests, and what lies in a directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from pared.writer import CheckpointWriter

SRC = Path(__file__).parents[1] / "src"
CONFIG = {"model_type": "llama"}


def write(out: Path, tensors: dict[str, Tensor], **options: object) -> Path:
    with CheckpointWriter(out, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.add_file("config.json", json.dumps(CONFIG))
        return writer.commit()


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(16, 8, generator=g).to(torch.bfloat16) for i in range(6)}


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
