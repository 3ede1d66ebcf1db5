"""GGUF files: read back they hold the model, in the forms and under the names that llama.cpp reads; what they can not hold is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from command import refused
from pared.errors import MissingError, ModelError, UsageError
from pared.export import export_gguf, graph
from pared.export.architectures import rotary
from pared.export.graph import Sizes
from pared.modeling import load
from tiny import FAMILIES, close, cut, logits, model, save, tokens

# Families whose blocks are llama's, and what is changed so that llama.cpp can hold them.
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3-kv": {},
    "llama-mqa-tied": {},
    "llama-biases": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
}
OWN = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3", {"query_pre_attn_scalar": 8}),
    "olmo2": ("olmo2", {}),
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entries and tensors (dequantised, fp32) of a file."""
    reader = gguf.GGUFReader(path)
    entries = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    return entries, {name: t.view(shapes[name]) for name, t in tensors.items()}


def run(path: Path, like: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a file of the architectures llama and deci, by what is in it alone; the rotary frequencies are the model's."""
    entries, tensors = read(path)
    arch = entries["general.architecture"]

    def sizes(key: str) -> list[int]:
        value = entries[f"{arch}.{key}"]
        return value if isinstance(value, list) else [value] * entries[f"{arch}.block_count"]

    counts = zip(sizes("attention.head_count"), sizes("attention.head_count_kv"), sizes("feed_forward_length"), strict=True)
    eps = entries[f"{arch}.attention.layer_norm_rms_epsilon"]
    head_dim = entries[f"{arch}.attention.key_length"]
    return graph.logits(tensors, [Sizes(*c) for c in counts], head_dim, eps, rotary(like)[0], ids)


@pytest.mark.parametrize("family", LLAMAS)
def test_a_file_computes_what_the_model_does(family: str, tmp_path: Path) -> None:
    built = model(family, **LLAMAS[family])
    done = export_gguf(save(built, tmp_path / "model"))
    assert done.architecture == "llama" and done.quantization == "f32"
    assert done.path == tmp_path / "model-f32.gguf"
    ids = tokens(2, 18)
    with torch.no_grad():
        assert close(run(done.path, built, ids), logits(built, ids))


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_biases_that_the_family_does_not_have_are_in_the_file(allocate: str, tmp_path: Path) -> None:
    source = save(model("mistral", sliding_window=None), tmp_path / "model")
    settings = {"criterion": "wanda_sp", "compensate": "bias", "structures": "ffn", "align": 1}
    cut(source, out=tmp_path / "out", shape="per-layer", allocate=allocate, **settings)
    done = export_gguf(tmp_path / "out")
    assert done.architecture == ("llama" if allocate == "uniform" else "deci")
    built, ids = load(tmp_path / "out"), tokens(2, 18)
    assert read(done.path)[1]["blk.0.attn_output.bias"].shape == (built.config.hidden_size,)
    with torch.no_grad():
        assert close(run(done.path, built, ids), logits(built, ids))


def test_a_family_whose_form_in_llama_cpp_has_no_such_bias_is_refused(tmp_path: Path) -> None:
    source = save(model("qwen3"), tmp_path / "model")
    cut(source, out=tmp_path / "out", shape="per-layer", allocate="uniform", structures="ffn", compensate="bias", align=1)
    with pytest.raises(ModelError, match="no bias in o_proj"):
        export_gguf(tmp_path / "out")


@pytest.mark.parametrize("structures", ["kv,ffn", "query,ffn", "ffn"])
def test_a_per_layer_checkpoint_computes_what_it_does_here(structures: str, tmp_path: Path) -> None:
    cut(
        model("llama"),
        out=tmp_path / "model",
        shape="per-layer",
        structures=tuple(structures.split(",")),
        criterion="l2",
        allocate="global",
        remove=0.3,
        align=1,
    )
    done = export_gguf(tmp_path / "model")
    assert done.architecture == "deci"
    entries, _ = read(done.path)
    built = load(tmp_path / "model")
    assert entries["deci.feed_forward_length"] == [b.mlp.up_proj.out_features for b in built.model.layers]
    ids = tokens(2, 18)
    with torch.no_grad():
        assert close(run(done.path, built, ids), logits(built, ids))


@pytest.mark.parametrize("structures", [("attention",), ("mlp",), ("attention", "mlp")])
def test_blocks_without_a_part_are_told_so_or_get_one_of_zeros(structures: tuple[str, ...], tmp_path: Path) -> None:
    cut(
        model("llama", num_hidden_layers=4),
        out=tmp_path / "model",
        shape="per-layer",
        structures=structures,
        remove=0.3,
        seed=3,
    )
    built = load(tmp_path / "model")
    done = export_gguf(tmp_path / "model")
    entries, _ = read(done.path)
    assert 0 not in [entries["deci.feed_forward_length"]] and entries["deci.attention.head_count"][0] > 0
    ids = tokens(2, 18)
    with torch.no_grad():
        assert close(run(done.path, built, ids), logits(built, ids))


@pytest.mark.parametrize("family", OWN)
def test_families_with_an_architecture_of_their_own_keep_it(family: str, tmp_path: Path) -> None:
    arch, changes = OWN[family]
    built = model(family, **changes)
    entries, tensors = read(export_gguf(save(built, tmp_path / "model")).path)
    assert entries["general.architecture"] == arch
    assert entries[f"{arch}.feed_forward_length"] == built.config.intermediate_size
    assert entries[f"{arch}.attention.head_count_kv"] == built.config.num_key_value_heads
    offset = 1.0 if family.startswith("gemma") else 0.0
    assert torch.equal(tensors["output_norm.weight"], built.model.norm.weight + offset)
    assert torch.equal(tensors["blk.1.attn_q.weight"], built.model.layers[1].self_attn.q_proj.weight)
    assert torch.equal(tensors["blk.2.ffn_down.weight"], built.model.layers[2].mlp.down_proj.weight)
    untied = not built.config.tie_word_embeddings
    assert ("output.weight" in tensors) == (untied or arch == "olmo2")
    if FAMILIES[family][1].get("layer_types"):
        windows = [kind == "sliding_attention" for kind in built.config.layer_types]
        assert entries[f"{arch}.attention.sliding_window_pattern"] == windows


def test_qwen2_whose_heads_do_not_fill_the_hidden_size_is_a_llama_with_biases(tmp_path: Path) -> None:
    built = model("qwen2", num_attention_heads=6, num_key_value_heads=3, head_dim=4)
    done = export_gguf(save(built, tmp_path / "model"))
    assert done.architecture == "llama"
    ids = tokens(2, 18)
    with torch.no_grad():
        assert close(run(done.path, built, ids), logits(built, ids))


def test_query_and_key_rows_are_turned_from_halves_to_pairs(tmp_path: Path) -> None:
    built = model("llama")
    _, tensors = read(export_gguf(save(built, tmp_path / "model")).path)
    attention = built.model.layers[0].self_attn
    head_dim = attention.head_dim
    for name, weight in (("q", attention.q_proj.weight), ("k", attention.k_proj.weight)):
        written = tensors[f"blk.0.attn_{name}.weight"]
        for head in range(len(weight) // head_dim):
            for i in range(head_dim // 2):
                first = head * head_dim
                assert torch.equal(written[first + 2 * i], weight[first + i])
                assert torch.equal(written[first + 2 * i + 1], weight[first + i + head_dim // 2])
    assert torch.equal(tensors["blk.0.attn_v.weight"], attention.v_proj.weight)


def test_scaled_rotary_frequencies_are_written_as_divisors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    scaling["original_max_position_embeddings"] = 32
    built = model("llama", rope_parameters=scaling)
    _, tensors = read(export_gguf(save(built, tmp_path / "model")).path)
    plain = 1e4 ** (-torch.arange(0, 4, 2) / 4)
    assert close(plain / tensors["rope_freqs.weight"], rotary(built)[0])


@pytest.mark.parametrize(("quantization", "bound"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 8e-3), ("q4_0", 0.13)])
def test_a_quantised_matrix_is_near_what_it_was(quantization: str, bound: float, tmp_path: Path) -> None:
    built = model("llama", hidden_size=64, intermediate_size=96)
    done = export_gguf(save(built, tmp_path / "model"), quantize=quantization)
    _, tensors = read(done.path)
    for name, weight in (
        ("blk.1.ffn_up", built.model.layers[1].mlp.up_proj.weight),
        ("blk.1.attn_output", built.model.layers[1].self_attn.o_proj.weight),
        ("token_embd", built.model.embed_tokens.weight),
    ):
        assert (tensors[f"{name}.weight"] - weight).abs().max() <= bound * weight.abs().max()
    assert torch.equal(tensors["output_norm.weight"], built.model.norm.weight)
    assert not done.narrow
    whole = export_gguf(tmp_path / "model", quantize="f32")
    assert done.nbytes < whole.nbytes


def test_a_matrix_with_rows_that_fill_no_block_is_kept_wider_and_named(tmp_path: Path) -> None:
    done = export_gguf(save(model("llama"), tmp_path / "model"), quantize="q8_0")  # 48 channels
    assert done.narrow == [f"blk.{i}.ffn_down.weight" for i in range(3)]
    assert done.types["F16"] == 3


def test_the_tokenizer_goes_along(storyteller: Path, tmp_path: Path) -> None:
    entries, _ = read(export_gguf(storyteller, tmp_path / "model.gguf").path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(storyteller)
    assert (entries["tokenizer.ggml.model"], entries["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert entries["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert entries["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert entries["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert entries["tokenizer.ggml.add_bos_token"] is True and entries["tokenizer.ggml.add_eos_token"] is False
    kinds = entries["tokenizer.ggml.token_type"]
    assert kinds[tokenizer.bos_token_id] == gguf.TokenType.CONTROL and kinds[300] == gguf.TokenType.NORMAL


def test_a_tokenizer_with_scores_goes_along(stories260k: Path, tmp_path: Path) -> None:
    done = export_gguf(stories260k, tmp_path / "model.gguf")
    entries, _ = read(done.path)
    assert entries["tokenizer.ggml.model"] == "llama"
    kinds, pieces = entries["tokenizer.ggml.token_type"], entries["tokenizer.ggml.tokens"]
    assert kinds[pieces.index("<0x0A>")] == gguf.TokenType.BYTE
    spec = json.loads((stories260k / "tokenizer.json").read_text())
    first, last = (p if isinstance(p, str) else " ".join(p) for p in (spec["model"]["merges"][0], spec["model"]["merges"][-1]))
    score = dict(zip(pieces, entries["tokenizer.ggml.scores"], strict=True))
    assert score[first.replace(" ", "")] == 0 > score[last.replace(" ", "")]


def test_the_chat_template_goes_along(storyteller: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in storyteller.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    entries, _ = read(export_gguf(folder, tmp_path / "model.gguf").path)
    assert entries["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"


def test_a_way_to_split_text_that_llama_cpp_lacks_is_refused(storyteller: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in storyteller.iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "tokenizer.json":
            shutil.copy(file, folder)
    spec = json.loads((storyteller / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    refused(tmp_path, 3, "export", folder, "--to", "gguf", words=("splits text", "aeiou", "Qwen 2"))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {}, "sliding window of 6"),
        ("gemma2", {}, "scales and caps attention otherwise"),
        ("glm", {}, "not those of llama.cpp's llama"),
        ("bloom", {}, "has no place"),
        ("mixtral", {}, "experts"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embedding (dynamic)",
        ),
        ("llama", {"hidden_act": "gelu"}, "differ by"),
        ("qwen3", {"hidden_act": "gelu"}, "this model gelu"),
    ],
)
def test_what_llama_cpp_can_not_hold_is_refused(family: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save(model(family, **changes), tmp_path / "model")
    refused(tmp_path, 3, "export", folder, "--to", "gguf", words=(words, "vLLM"))


def test_a_per_layer_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    cut(model("qwen3"), out=tmp_path / "model", shape="per-layer", allocate="global", criterion="l2", remove=0.3, align=1)
    refused(tmp_path, 3, "export", tmp_path / "model", "--to", "gguf", words=("one size for all blocks", "q_norm"))


def test_values_that_fp16_can_not_hold_are_refused(tmp_path: Path) -> None:
    built = model("llama")
    with torch.no_grad():
        built.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    folder = save(built, tmp_path / "model")
    with pytest.raises(ModelError, match="fp16"):
        export_gguf(folder, quantize="f16")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    folder = save(model("llama"), tmp_path / "model")
    (tmp_path / "model-f32.gguf").write_text("mine")
    refused(tmp_path, 2, "export", folder, "--to", "gguf", words=("--overwrite",))
    export_gguf(folder, overwrite=True)
    assert read(tmp_path / "model-f32.gguf")[0]["general.architecture"] == "llama"


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(model("llama"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path, MissingError.exit_code, "export", folder, "--to", "gguf", words=("pared[gguf]",))


def test_k_quants_name_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(model("llama"), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    refused(tmp_path, 4, "export", folder, "--to", "gguf", "--quantize", "q4_k_m", words=("llama-cpp-python", "q8_0"))


def test_an_unknown_quantisation_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q4_k_m"):
        export_gguf(save(model("llama"), tmp_path / "model"), quantize="q3")
