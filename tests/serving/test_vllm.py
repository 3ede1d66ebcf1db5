"""vLLM gives the tokens that transformers gives, request by request, while requests come, go and share its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import pared
import tiny
from engine import Engine, check_greedy, requests
from pared.per_layer import BIASES, SKIP, split

pytestmark = pytest.mark.vllm

STOCK = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "glm", "olmo2", "mixtral"]
# Families that vLLM has its own code for, and three that it runs as transformers' modules.
PER_LAYER = [*STOCK, "llama-biases", "gemma2", "glm4", "gpt2", "gpt_neox", "bloom"]
# Layers that are not there, from the first to the last.
SKIPS: dict[str, list[list[str]]] = {
    "llama": [["attention"], [], ["attention", "mlp"], [], ["mlp"]],
    "qwen3": [["mlp"], [], [], ["attention"]],
    "gemma2": [["attention", "mlp"], [], [], ["attention"]],
    "phi3": [[], ["mlp"], ["attention"]],
    "mixtral": [["attention"], [], ["mlp"]],
    "gpt2": [["attention"], [], ["mlp"]],
}
WANTED = requests(tiny.VOCAB)


def entries(path: Path) -> dict[int, dict[str, Any]]:
    return split(json.loads((path / "config.json").read_text()))[1]


def serves(vllm: Engine, path: Path, **settings: Any) -> None:
    got = vllm.serve(path, WANTED, **settings)
    assert check_greedy(pared.load(path, dtype=torch.float32).eval(), WANTED, got) > 500


@pytest.mark.parametrize("family", STOCK)
def test_a_uniform_checkpoint_is_served_as_it_is(family: str, vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.uniform(family, tmp_path)
    assert not entries(path)
    serves(vllm, path)


@pytest.mark.parametrize("family", PER_LAYER)
def test_layers_of_different_sizes_are_served(family: str, vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.per_layer(family, tmp_path)
    assert len({json.dumps(e, sort_keys=True, default=str) for e in entries(path).values()}) >= 3
    serves(vllm, path)


@pytest.mark.parametrize(("family", "shape"), [("llama", "uniform"), ("qwen3", "uniform"), ("llama", "per-layer")])
def test_a_narrower_residual_stream_is_served(family: str, shape: str, vllm: Engine, tmp_path: Path) -> None:
    path = tiny.narrow(checkpoints.model(family), tmp_path, shape=shape)
    assert bool(entries(path)) == (shape == "per-layer")
    serves(vllm, path)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "mixtral"])
def test_biases_that_the_family_does_not_have_are_served(family: str, vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.with_biases(family, tmp_path)
    assert all(own[BIASES] for own in entries(path).values())
    serves(vllm, path)


def test_a_uniform_checkpoint_with_biases_of_its_own_is_served_as_it_is(vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.with_biases("llama", tmp_path, shape="uniform")
    assert not entries(path)
    serves(vllm, path)


@pytest.mark.parametrize("family", SKIPS)
def test_layers_without_attention_or_mlp_are_served(family: str, vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.without_parts(family, tmp_path, SKIPS[family])
    assert {i: sorted(e.get(SKIP, ())) for i, e in entries(path).items()} == {
        i: sorted(s) for i, s in enumerate(SKIPS[family]) if s or i in entries(path)
    }
    serves(vllm, path)


def test_what_vllm_compiles_is_compiled_for_each_layer(vllm: Engine, tmp_path: Path) -> None:
    serves(vllm, checkpoints.uniform("llama", tmp_path), enforce_eager=False)
    serves(vllm, checkpoints.without_parts("qwen3", tmp_path, SKIPS["qwen3"]), enforce_eager=False)


def test_half_precision_serves_what_it_says(vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.per_layer("llama", tmp_path)
    got = vllm.serve(path, WANTED, dtype="bfloat16")
    model = pared.load(path, dtype=torch.float32).eval()
    same = total = 0
    for request, tokens in zip(WANTED, got, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*request.prompt, *tokens]]), use_cache=False).logits[0]
        best = logits[len(request.prompt) - 1 : -1].argmax(-1).tolist()
        same, total = same + sum(a == b for a, b in zip(best, tokens, strict=True)), total + len(tokens)
    assert same >= 0.95 * total


def test_what_vllm_can_not_serve_is_refused_in_words(vllm: Engine, tmp_path: Path) -> None:
    path = checkpoints.without_parts("olmo2", tmp_path, [["attention"], [], []])
    with pytest.raises(RuntimeError, match="vLLM has no code of its own for olmo2"):
        vllm.serve(path, WANTED[:1])
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["NoSuchForCausalLM"], "auto_map": {}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="no model class for NoSuchForCausalLM"):
        vllm.serve(path, WANTED[:1])
    none = checkpoints.without_parts("llama", tmp_path, [["attention"], ["attention"]])
    with pytest.raises(RuntimeError, match="no layer of this model has an attention"):
        vllm.serve(none, WANTED[:1])


def test_without_the_plugin_nothing_is_served_wrongly(tmp_path: Path) -> None:
    bare = Engine(tmp_path / "log.txt", VLLM_PLUGINS="none")
    try:
        for family in ("llama", "olmo2"):
            with pytest.raises(RuntimeError, match="per-layer attribute"):
                bare.serve(checkpoints.per_layer(family, tmp_path), WANTED[:1])
        serves(bare, checkpoints.uniform("llama", tmp_path))
        # vLLM takes the head size to be hidden size / heads: the card says that it can not do without pared.
        qwen = checkpoints.uniform("qwen2", tmp_path)
        assert "fail while it loads the weights" in " ".join((qwen / "README.md").read_text().split())
        with pytest.raises(RuntimeError):
            bare.serve(qwen, WANTED[:1])
    finally:
        bare.close()
