"""What vLLM loads of pared, and what of pared loads vLLM: the first by its name, the second nothing but vLLM's own call."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_entry_point_names_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["pared"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_the_plugin_loads_nothing_before_it_is_called() -> None:
    code = "import sys, pared.serving.vllm_plugin; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.stdout.strip() == "[]", done.stderr


def test_requirements_are_those_of_the_metadata_but_for_the_ones_left_out() -> None:
    def listed(*arguments: str) -> list[str]:
        command = [sys.executable, str(ROOT / "tools" / "requirements_of.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")

    assert any(line.startswith("torch") for line in listed("pared"))
    assert not any(line.startswith("torch") for line in listed("pared", "torch"))
    assert any(line.startswith("typer") for line in listed("pared", "torch"))
    assert not any(line.startswith("pytest") for line in listed("pared"))  # an extra
