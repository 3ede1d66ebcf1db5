"""Models that pared builds are ordinary transformers models, uniform or not: they load, generate, save, copy and train."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
import tiny
from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.modeling import blocks, expected_tensors, make_config, skeleton
from pared.per_layer import PER_LAYER

STOCK = ["llama", "llama-mqa-tied", "llama-biases", "qwen2", "gemma2", "gpt2", "gpt_neox", "bloom", "phi3", "mixtral"]
UNLIKE = ["llama", "llama-mqa-tied", "gemma2", "phi3", "olmo2", "gpt2", "mixtral"]


def unlike(family: str) -> PreTrainedModel:
    """A model whose layers have sizes of their own."""
    heads = {"structures": ("kv", "query", "ffn")} if family == "mixtral" else {}  # channels alone come out alike
    result = tiny.cut(tiny.model(family), shape="per-layer", remove=0.2, **heads).model
    assert result is not None
    sizes = {tuple(p.shape for p in block.parameters()) for block in blocks(result)[1]}
    assert len(sizes) > 1
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", STOCK)
def test_loading_is_what_transformers_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny.save(tiny.model(family).to(dtype), tmp_path / "model")
    got, want = pared.load(path), AutoModelForCausalLM.from_pretrained(path)
    assert type(got) is type(want) and got.dtype == want.dtype == dtype and not got.training
    assert tiny.equal_states(got, want) and torch.equal(tiny.logits(got), tiny.logits(want))
    assert [n for n, _ in got.named_parameters()] == [n for n, _ in want.named_parameters()]
    assert all(p.requires_grad and not p.is_meta for p in got.parameters()) and not any(b.is_meta for b in got.buffers())
    assert got.generation_config.to_dict() == want.generation_config.to_dict()
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(got.generate(tiny.tokens(1, 5), **greedy), want.generate(tiny.tokens(1, 5), **greedy))


def test_a_trained_model_is_loaded_as_transformers_loads_it(stories260k: Path) -> None:
    got, want = pared.load(stories260k), AutoModelForCausalLM.from_pretrained(stories260k)
    assert tiny.equal_states(got, want)
    assert torch.equal(tiny.logits(got), tiny.logits(want))


def test_another_dtype_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    path = tiny.save(tiny.model("llama"), tmp_path / "model")
    want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    got = pared.load(path, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and tiny.equal_states(got, want)


@pytest.mark.parametrize("family", UNLIKE)
def test_unlike_layers_generate_the_same_with_and_without_a_cache(family: str) -> None:
    model = unlike(family)
    ids = tiny.tokens(2, 5)
    greedy: dict[str, Any] = {"max_new_tokens": 3 * tiny.WINDOW, "min_new_tokens": 3 * tiny.WINDOW, "do_sample": False}
    cached, plain = model.generate(ids, use_cache=True, **greedy), model.generate(ids, use_cache=False, **greedy)
    assert cached.shape == (2, 5 + 3 * tiny.WINDOW) and torch.equal(cached, plain)


@pytest.mark.parametrize("family", UNLIKE)
def test_unlike_layers_are_saved_by_transformers_and_loaded_again(family: str, tmp_path: Path) -> None:
    model = unlike(family)
    again = pared.load(tiny.save(model, tmp_path / "one"))
    assert tiny.equal_states(again, model) and torch.equal(tiny.logits(again), tiny.logits(model))
    twice = pared.load(tiny.save(again, tmp_path / "two"))
    assert tiny.equal_states(twice, model)
    assert json.loads((tmp_path / "one" / "config.json").read_text())[PER_LAYER]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(Exception):  # noqa: B017  (stock transformers must not build it as if layers were alike)
        AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_unlike_layers_can_be_copied() -> None:
    model = unlike("llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert not torch.equal(tiny.logits(twin), tiny.logits(model))
    assert twin.config.to_dict() == model.config.to_dict()


def test_pruning_shares_no_weights_with_the_model_it_was_given() -> None:
    model = tiny.model("llama-mqa-tied")
    want = tiny.logits(model)
    result = tiny.cut(model, structures=("ffn",), remove=0.1).model
    assert result is not None
    with torch.no_grad():
        for p in result.parameters():
            p.zero_()
    assert torch.equal(tiny.logits(model), want)
    assert result.get_output_embeddings().weight is result.get_input_embeddings().weight


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_pruned_model_learns(shape: str) -> None:
    model = tiny.cut(tiny.model("llama"), shape=shape, remove=0.5).model
    assert model is not None
    ids = tiny.tokens(4, 12)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_lora_wraps_trains_and_merges(shape: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.cut(tiny.model("llama"), shape=shape, remove=0.5).model
    assert model is not None
    ids, dense = tiny.tokens(4, 12), tiny.logits(model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
    wrapped = peft.get_peft_model(model, settings)
    assert torch.equal(tiny.logits(wrapped), dense)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    before = wrapped(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    assert float(wrapped(input_ids=ids, labels=ids).loss.detach()) < float(before.detach())
    wrapped.save_pretrained(tmp_path / "adapter")
    want = tiny.logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert tiny.close(tiny.logits(merged), want)
    assert tiny.close(tiny.logits(pared.load(tiny.save(merged, tmp_path / "merged"))), want)


@pytest.mark.parametrize("family", STOCK)
def test_the_tensors_that_a_config_asks_for_are_those_on_disk(family: str, tmp_path: Path) -> None:
    path = tiny.save(tiny.model(family), tmp_path / "model")
    checkpoint = Checkpoint.open(path)
    assert expected_tensors(checkpoint.config) == {n: tuple(t.shape) for n, t in checkpoint.tensors.items()}


def test_a_config_that_transformers_rejects_is_refused() -> None:
    data = tiny.config("llama").to_dict()
    for change in ({"model_type": "no-such-model"}, {"num_attention_heads": 7}, {"hidden_size": "wide"}):
        with pytest.raises(ModelError) as error:
            skeleton(*make_config({**data, **change}))
        assert error.value.exit_code == 3
