"""llama.cpp itself runs what was exported: the logits and the greedy tokens of transformers, uniform and per-layer, and quantised.

Stated rounding, fp32 weights and cache: 1e-5 of the largest logit; 1e-3 for Gemma, whose GELU llama.cpp takes from an fp16 table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import pared
from pared.accounting import account
from pared.export import export_gguf
from pared.export.llamacpp import Engine
from pared.modeling import load
from pared.plan import LayerPlan, Plan
from pared.proof import proved_layout
from pared.run import apply_plan
from tiny import close, cut, logits, model, narrow, save, tokens

pytestmark = pytest.mark.llamacpp
pytest.importorskip("llama_cpp")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {},
    "llama-mqa-tied": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
}
SAMPLES = (
    "Once upon a time, there was a little dog named Tim.",
    "It's 12345 o'clock; we'll see (or not) -- at  least\n\nTHREE things: naïve, 東京, emoji 🙂!",
    " leading space, trailing space ",
)


def greedy(built: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The most likely continuation, whatever ends a text."""
    row = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            row = torch.cat([row, built(input_ids=row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return row[0, len(ids) :].tolist()


def agree(path: Path, built: PreTrainedModel, ids: Tensor, tolerance: float = 1e-5) -> None:
    """The same logits to within the tolerance, and the same 24 greedy tokens with a cache as without one."""
    with Engine(path, context=96) as engine:
        assert close(engine.logits(ids), logits(built, ids), tolerance)
        prompt = ids[0, :8].tolist()
        assert engine.greedy(prompt, 24) == greedy(built, prompt, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    built = model(family, **FAMILIES[family])
    agree(export_gguf(save(built, tmp_path / "model")).path, built, tokens(2, 18), 1e-3 if family.startswith("gemma") else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_uniform_checkpoint_does(family: str, tmp_path: Path) -> None:
    # OLMo 2 of llama.cpp wants heads that fill the hidden size: channels alone can go.
    structures = ("ffn",) if family in ("olmo2", "llama-mqa-tied") else ("kv", "ffn")
    cut(model(family, **FAMILIES[family]), out=tmp_path / "model", structures=structures, align=1)
    built = load(tmp_path / "model")
    agree(export_gguf(tmp_path / "model").path, built, tokens(2, 18), 1e-3 if family.startswith("gemma") else 1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("structures", ["kv,ffn", "query,ffn", "attention", "mlp", "attention,mlp"])
def test_a_per_layer_checkpoint_does(family: str, structures: str, tmp_path: Path) -> None:
    settings = {"structures": tuple(structures.split(",")), "shape": "per-layer", "remove": 0.3, "align": 1, "seed": 3}
    cut(model(family, num_hidden_layers=4, **FAMILIES[family]), out=tmp_path / "model", allocate="global", **settings)
    done = export_gguf(tmp_path / "model")
    assert done.architecture == "deci"
    agree(done.path, load(tmp_path / "model"), tokens(2, 18))


@pytest.mark.parametrize(("family", "shape"), [("llama", "uniform"), ("qwen3", "uniform"), ("llama", "per-layer")])
def test_a_narrower_residual_stream_does(family: str, shape: str, tmp_path: Path) -> None:
    path = narrow(model(family), tmp_path, shape=shape)
    done = export_gguf(path)
    assert (done.architecture == "deci") == (shape == "per-layer")
    agree(done.path, load(path), tokens(2, 18))


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_biases_that_the_family_does_not_have_are_read(allocate: str, tmp_path: Path) -> None:
    settings = {"compensate": "bias", "criterion": "wanda_sp", "structures": "ffn", "shape": "per-layer", "align": 1}
    cut(model("mistral", **FAMILIES["mistral"]), out=tmp_path / "model", allocate=allocate, **settings)
    done = export_gguf(tmp_path / "model")
    assert done.architecture == ("llama" if allocate == "uniform" else "deci")
    agree(done.path, load(tmp_path / "model"), tokens(2, 18))


@pytest.mark.parametrize("gone", [(0,), (3,), (0, 3), (1, 2)])
@pytest.mark.parametrize("skip", [("attention",), ("mlp",), ("attention", "mlp")])
def test_parts_of_any_block_can_be_gone_the_first_and_the_last_too(
    gone: tuple[int, ...], skip: tuple[Any, ...], tmp_path: Path
) -> None:
    built = model("llama", num_hidden_layers=4)
    layout = proved_layout(built.config)
    layers = [LayerPlan(source=i, skip=list(skip) if i in gone else []) for i in range(4)]
    after = account(layout, [(i, dict.fromkeys(layer.skip, 0)) for i, layer in enumerate(layers)])
    plan = Plan(model_type="llama", shape="per-layer", before=account(layout), after=after, layers=layers)
    apply_plan(save(built, tmp_path / "dense"), plan, tmp_path / "model")
    done = export_gguf(tmp_path / "model")
    assert done.architecture == "deci"
    agree(done.path, load(tmp_path / "model"), tokens(2, 18))


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_quantised_file_loads_and_is_near(quantization: str, shape: str, storyteller: Path, tmp_path: Path) -> None:
    allocate = "global" if shape == "per-layer" else "uniform"
    settings = {"criterion": "l2", "compensate": "none", "calibration": tokens(4, 64)}
    pared.prune(storyteller, out=tmp_path / "model", remove=0.2, shape=shape, allocate=allocate, **settings)
    whole = export_gguf(tmp_path / "model", quantize="f32")
    done = export_gguf(tmp_path / "model", quantize=quantization)
    assert done.nbytes < whole.nbytes
    ids = torch.randint(3, 1024, (1, 64), generator=torch.Generator().manual_seed(0))
    with Engine(whole.path, context=128) as exact, Engine(done.path, context=128) as engine:
        p, q = exact.logits(ids).log_softmax(-1), engine.logits(ids).log_softmax(-1)
        assert len(engine.greedy(ids[0, :8].tolist(), 16)) == 16
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < {"f16": 1e-4, "bf16": 1e-2, "q8_0": 1e-2}.get(quantization, 0.5)


def test_text_is_split_as_the_tokenizer_does(storyteller: Path, stories260k: Path, tmp_path: Path) -> None:
    for source, samples in ((storyteller, SAMPLES), (stories260k, SAMPLES[:1])):
        tokenizer = AutoTokenizer.from_pretrained(source)
        with Engine(export_gguf(source, tmp_path / f"{source.name}.gguf").path) as engine:
            for text in samples:
                assert engine.tokenize(text) == tokenizer(text)["input_ids"]


def test_a_trained_model_tells_the_same_story(stories260k: Path, tmp_path: Path) -> None:
    built = load(stories260k, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(stories260k)("Once upon a time")["input_ids"]
    with Engine(export_gguf(stories260k, tmp_path / "model.gguf").path) as engine:
        assert engine.greedy(prompt, 120) == greedy(built, prompt, 120)


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_sequences_run_together_get_what_each_gets_alone(shape: str, tmp_path: Path) -> None:
    cut(model("llama"), out=tmp_path / "model", structures=("kv", "ffn"), shape=shape, align=1)
    file = export_gguf(tmp_path / "model").path
    ids = tokens(5, 12)
    with Engine(file, context=16) as one, Engine(file, context=16, sequences=5) as many:
        alone = one.logits(ids)
        assert close(many.feed_together(ids[:, :8].tolist(), 0), alone[:, 7], 1e-5)
        for i in range(8, 12):
            assert close(many.feed_together(ids[:, i : i + 1].tolist(), i), alone[:, i], 1e-5)
