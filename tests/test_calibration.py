"""Laws of calibration text: what is read is what is packed, draws are reproducible, sampled text is the model's own."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pared.calibration import (
    Calibration,
    inference,
    load_calibration,
    max_positions,
    pack,
    read_documents,
    sample_from_model,
    tokenize_documents,
)
from pared.errors import MissingError, ModelError, UsageError

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
BOS, EOS = 0, 1
WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijklm"]


def word_tokenizer(*, bos: str | None = "<s>", eos: str | None = "</s>", opens: bool = True) -> PreTrainedTokenizerFast:
    """One token per letter of a small alphabet; opens each text with BOS."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if opens:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>")


def tiny_model(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, object] = dict(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5)
    return LlamaForCausalLM(LlamaConfig(**(sizes | dict(bos_token_id=BOS, eos_token_id=EOS) | changes))).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def stories():
    if not STORIES.is_dir():
        pytest.skip("the model stories260K is not here")
    return AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12), st.integers(1, 10))
def test_packed_windows_are_the_concatenation_without_a_remainder_shorter_than_a_window(token_lists, length):
    stream = list(itertools.chain.from_iterable(token_lists))
    packed = pack(token_lists, length)
    assert packed.dtype == torch.int64 and packed.shape[1] == length
    assert packed.flatten().tolist() == stream[: packed.numel()]
    assert 0 <= len(stream) - packed.numel() < length


def test_every_document_opens_as_the_tokenizer_opens_it_and_is_whole(tokenizer):
    assert tokenize_documents(["ab", "c", "a" * 500], tokenizer) == [[0, 3, 4], [0, 5], [0] + [3] * 500]
    assert tokenize_documents(["ab"], word_tokenizer(opens=False)) == [[3, 4]]


@pytest.mark.filterwarnings("error")
def test_a_document_longer_than_the_context_is_neither_cut_nor_warned_of(stories, caplog):
    model, tokenizer = stories
    [ids] = tokenize_documents(["once upon a time " * 400], tokenizer)
    assert len(ids) > max_positions(model) and ids[0] == tokenizer.bos_token_id
    assert not caplog.records


@pytest.mark.parametrize("suffix, pressed", [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_txt_is_one_document_and_a_jsonl_one_per_line_compressed_or_not(tmp_path, suffix, pressed):
    text = "one\n\ntwo\u2028three é"
    (tmp_path / f"a.txt{suffix}").write_bytes(pressed(text.encode()))
    assert read_documents(tmp_path / f"a.txt{suffix}") == [text]
    lines = [json.dumps({"text": t, "body": t * 2}, ensure_ascii=False) for t in (text, "x", " ", "y")]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pressed("\n".join([*lines, ""]).encode()))
    assert read_documents(tmp_path / f"a.jsonl{suffix}") == [text, "x", "y"]
    assert read_documents(tmp_path / f"a.jsonl{suffix}", field="body")[1] == "xx"


BAD_FILES = {
    "empty.txt": (b" \n ", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
    "latin.txt": (b"fine\ncaf\xe9", "line 2"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": ', "line 3"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}', "line 2"),
    "number.jsonl": (b'{"text": 3}', "line 1"),
    "list.jsonl": (b"[1]", "line 1"),
    "cut.txt.xz": (lzma.compress(b"text" * 100)[:-20], "not a whole .xz"),
    "cut.txt.gz": (gzip.compress(b"text" * 100)[:-20], "not a whole .gz"),
    "not.jsonl.gz": (b"{}", "not a whole .gz"),
    "table.csv": (b"a,b", ".txt and .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_text_is_refused_by_name_and_line(tmp_path, name):
    content, told = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=told) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value) and caught.value.fix


def test_a_path_that_is_missing_or_a_directory_is_refused(tmp_path, tokenizer):
    (tmp_path / "folder.txt").mkdir()
    for path, told in (("folder.txt", "can not be read"), ("none.txt", "no such file")):
        with pytest.raises(UsageError, match=told):
            read_documents(tmp_path / path)
    with pytest.raises(UsageError, match="no such file"):
        load_calibration(tmp_path / "none.jsonl", tokenizer, samples=1, seq_len=2, seed=0)


@pytest.fixture
def letters(tmp_path) -> Path:
    documents = ["abcdefghijklm"[i % 7 :] for i in range(200)]
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return path


def test_windows_are_drawn_without_replacement_and_the_seed_alone_decides_which(letters, tokenizer):
    everything = pack(tokenize_documents(read_documents(letters), tokenizer), 16)
    # What makes windows distinguishable here is their content: a draw of all of them must be a permutation.
    full = load_calibration(letters, tokenizer, samples=len(everything), seq_len=16, seed=3)
    assert sorted(full.ids.tolist()) == sorted(everything.tolist()) and full.ids.tolist() != everything.tolist()
    once = load_calibration(letters, tokenizer, samples=20, seq_len=16, seed=3)
    torch.manual_seed(99)
    again = load_calibration(letters, tokenizer, samples=20, seq_len=16, seed=3)
    other = load_calibration(letters, tokenizer, samples=20, seq_len=16, seed=4)
    assert once.ids.equal(again.ids) and once.digest() == again.digest()
    assert once.digest() != other.digest()
    assert once.ids.equal(full.ids[:20])  # asking for fewer keeps the first of the draw
    assert once.source == f"letters.jsonl: 20 of {len(everything)} windows of 16 tokens, seed 3"
    assert once.attention_mask is None and once.tokens == 320


def test_loading_leaves_the_global_random_state_alone(letters, tokenizer):
    before = torch.get_rng_state()
    load_calibration(letters, tokenizer, samples=5, seq_len=16, seed=0)
    assert torch.get_rng_state().equal(before)


def test_too_little_text_says_what_was_there(letters, tokenizer):
    tokens = sum(map(len, tokenize_documents(read_documents(letters), tokenizer)))
    with pytest.raises(UsageError, match=f"{tokens} tokens make {tokens // 32} windows of 32") as caught:
        load_calibration(letters, tokenizer, samples=10**6, seq_len=32, seed=0)
    assert str(tokens // 32) in caught.value.fix
    with pytest.raises(UsageError, match="make 0 windows") as caught:
        load_calibration(letters, tokenizer, samples=1, seq_len=10**6, seed=0)
    assert "lower seq_len" in caught.value.fix


def test_fewer_windows_are_enough_where_no_number_was_asked_for(letters, tokenizer):
    every = pack(tokenize_documents(read_documents(letters), tokenizer), 32)
    drawn = load_calibration(letters, tokenizer, samples=10**6, seq_len=32, seed=0, least=4)
    assert len(drawn.ids) == len(every) and f"{len(every)} of {len(every)} windows" in drawn.source
    assert len(load_calibration(letters, tokenizer, samples=6, seq_len=32, seed=0, least=4).ids) == 6
    with pytest.raises(UsageError, match=f"{len(every) + 1} are asked for"):
        load_calibration(letters, tokenizer, samples=10**6, seq_len=32, seed=0, least=len(every) + 1)


@pytest.mark.parametrize("samples, seq_len", [(0, 16), (-1, 16), (4, 1), (4, 0), (4, 65)])
def test_sizes_that_make_no_sense_are_refused_for_every_source(letters, tokenizer, samples, seq_len):
    for source in (letters, "self"):
        with pytest.raises(UsageError) as caught:
            load_calibration(source, tokenizer, samples=samples, seq_len=seq_len, seed=0, max_positions=64)
        assert caught.value.where in ("samples", "seq_len") and caught.value.fix
    with pytest.raises(UsageError):
        sample_from_model(tiny_model(), tokenizer, samples, seq_len, 0)


def test_ids_given_directly_are_taken_as_they_are(tokenizer):
    ids = torch.arange(12).view(3, 4)
    given_ids = load_calibration(ids, tokenizer, samples=128, seq_len=256, seed=0)
    assert given_ids.ids.equal(ids) and given_ids.tokens == 12
    wrong = [ids.float(), ids[0], ids[:0], ids - 1, ids[:, :1]]
    for bad in wrong:
        with pytest.raises(UsageError):
            load_calibration(bad, tokenizer, samples=1, seq_len=4, seed=0)
    with pytest.raises(UsageError, match="longer than the model's 3"):
        load_calibration(ids, tokenizer, samples=1, seq_len=4, seed=0, max_positions=3)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_are_the_rows_in_order_with_their_masks(size):
    ids = torch.arange(28).view(7, 4)
    mask = (torch.arange(28).view(7, 4) % 3 > 0).long()
    batches = Calibration(ids, mask, "here").batches(size)
    assert torch.cat([batch.input_ids for batch in batches]).equal(ids)
    assert torch.cat([batch.attention_mask for batch in batches]).equal(mask)
    assert all(len(batch.input_ids) == size for batch in batches[:-1])
    assert Calibration(ids, mask, "here").tokens == int(mask.sum())
    assert all(batch.attention_mask is None for batch in Calibration(ids, None, "here").batches(size))
    with pytest.raises(UsageError):
        Calibration(ids, None, "here").batches(0)


def test_the_digest_tells_apart_ids_shapes_and_masks():
    ids = torch.arange(12).view(3, 4)
    mask = torch.ones_like(ids)
    kinds = [(ids, None), (ids.view(4, 3), None), (ids + 1, None), (ids, mask), (ids, mask.tril())]
    assert len({Calibration(i, m, "a").digest() for i, m in kinds}) == len(kinds)
    assert Calibration(ids, None, "a").digest() == Calibration(ids.t().contiguous().t(), None, "b").digest()


def test_a_dataset_needs_the_package_and_says_so(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what python does for a package that can not be imported
    with pytest.raises(MissingError, match="without the package 'datasets'") as caught:
        load_calibration("somebody/something", tokenizer, samples=1, seq_len=4, seed=0)
    assert "pip install datasets" in caught.value.fix
    with pytest.raises(UsageError, match="not a dataset id"):
        load_calibration("a:b:c:d:e", tokenizer, samples=1, seq_len=4, seed=0)


def test_a_dataset_gives_the_same_windows_as_its_file(letters, tokenizer):
    pytest.importorskip("datasets")
    (letters.parent / "data").mkdir()
    os.rename(letters, letters.parent / "data" / "train.jsonl")
    named = f"{letters.parent / 'data'}::train:text"
    # Few enough samples that reading stops before the end of the data, many enough that all of it is read.
    tokens = load_calibration(letters.parent / "data" / "train.jsonl", tokenizer, samples=100, seq_len=16, seed=0)
    assert load_calibration(named, tokenizer, samples=100, seq_len=16, seed=0).ids.equal(tokens.ids)
    assert load_calibration(named, tokenizer, samples=2, seq_len=16, seed=0).source.split(": ")[1].startswith("2 of 16 ")
    for wrong, told in ((f"{letters.parent / 'data'}::test", "split"), (f"{letters.parent / 'data'}::train:body", "'body'")):
        with pytest.raises(UsageError, match=told):
            load_calibration(wrong, tokenizer, samples=2, seq_len=16, seed=0)


def test_sampling_depends_on_the_seed_alone_and_leaves_the_global_state_and_the_modes_alone(stories):
    model, tokenizer = stories
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    once = sample_from_model(model, tokenizer, 5, 40, 7)
    assert torch.get_rng_state().equal(before)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    torch.manual_seed(1)
    assert sample_from_model(model, tokenizer, 5, 40, 7, batch=2).equal(once)
    assert sample_from_model(model, tokenizer, 3, 40, 7).shape == (3, 40)
    assert not sample_from_model(model, tokenizer, 5, 40, 8).equal(once)
    assert once.dtype == torch.int64 and bool((once[:, 0] == tokenizer.bos_token_id).all())


def test_sampled_text_has_the_models_own_entropy(stories):
    """Over its own samples a model's mean loss equals the mean entropy of its predictions: nothing was cut off."""
    model, tokenizer = stories
    ids = sample_from_model(model, tokenizer, 48, 128, 0)
    with inference(model):
        log_p = torch.log_softmax(model(ids).logits[:, :-1].double(), -1)
    loss = -log_p.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    error = (loss - entropy).std() / loss.numel() ** 0.5
    assert abs(float((loss - entropy).mean())) < 4 * float(error)


def test_tokens_are_drawn_with_the_models_probabilities():
    model, tokenizer = tiny_model(), word_tokenizer()
    second = sample_from_model(model, tokenizer, 4000, 2, 0, batch=1000)[:, 1]
    with inference(model):
        p = model(torch.tensor([[BOS]])).logits[0, -1].double().softmax(-1)
        cold = (model(torch.tensor([[BOS]])).logits[0, -1].double() / 0.25).softmax(-1)
    counts = torch.bincount(second, minlength=16)
    assert bool(((counts / 4000 - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt() + 1e-4).all())
    colder = sample_from_model(model, tokenizer, 4000, 2, 0, batch=1000, temperature=0.25)[:, 1]
    assert bool(((torch.bincount(colder, minlength=16) / 4000 - cold).abs() < 4.5 * (cold / 4000).sqrt() + 1e-4).all())


def test_after_the_end_of_a_document_the_next_is_opened():
    model, tokenizer = tiny_model(initializer_range=0.1), word_tokenizer()  # nearly uniform: every 16th token is an EOS
    ids = sample_from_model(model, tokenizer, 20, 64, 0)
    ended = (ids[:, :-1] == EOS).nonzero()
    assert len(ended) > 20
    assert bool((ids[ended[:, 0], ended[:, 1] + 1] == BOS).all())
    model.generation_config.eos_token_id = [EOS, 5]
    ids = sample_from_model(model, tokenizer, 20, 64, 0)
    assert bool((ids[:, 1:][torch.isin(ids[:, :-1], torch.tensor([EOS, 5]))] == BOS).all())


def test_a_model_without_bos_opens_with_eos_and_one_without_either_is_refused():
    model = tiny_model(bos_token_id=None)
    ids = sample_from_model(model, word_tokenizer(bos=None, opens=False), 4, 8, 0)
    assert bool((ids[:, 0] == EOS).all())
    with pytest.raises(UsageError, match="neither BOS nor EOS"):
        sample_from_model(model, word_tokenizer(bos=None, eos=None, opens=False), 4, 8, 0)


def test_sampling_with_the_cache_equals_sampling_without(tokenizer, monkeypatch):
    model = tiny_model()
    cached = sample_from_model(model, tokenizer, 6, 32, 0)
    forward = model.forward

    def forgetful(**arguments):
        out = forward(**arguments)
        return type(out)(logits=out.logits)

    monkeypatch.setattr(model, "forward", forgetful)
    assert sample_from_model(model, tokenizer, 6, 32, 0).equal(cached)


def test_a_broken_model_is_named_instead_of_sampled(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        sample_from_model(model, tokenizer, 2, 8, 0)
    for wrong in ({"temperature": 0.0}, {"temperature": float("nan")}, {"batch": 0}):
        with pytest.raises(UsageError):
            sample_from_model(tiny_model(), tokenizer, 2, 8, 0, **wrong)


def test_self_calibration_is_what_the_sampler_gives(tokenizer):
    model = tiny_model()

    def sampler(samples: int, seq_len: int, seed: int) -> torch.Tensor:
        return sample_from_model(model, tokenizer, samples, seq_len, seed)

    own = load_calibration("self", tokenizer, samples=6, seq_len=32, seed=5, sampler=sampler, max_positions=64)
    assert own.ids.equal(sample_from_model(model, tokenizer, 6, 32, 5)) and own.source.startswith("self: 6 x 32")
    with pytest.raises(UsageError, match="needs a model"):
        load_calibration("self", tokenizer, samples=6, seq_len=32, seed=5)
