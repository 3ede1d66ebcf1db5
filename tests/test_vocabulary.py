"""Which tokens stay: closed under merges, enough to spell anything, and the same splits of what was kept."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import vocabs
from pared.errors import ModelError, UsageError
from pared.tokenizer_files import check_closed, pruned_spec
from pared.vocabulary import Closure, Numbering, base_tokens, choose, named_ids, pieces, remap_ids, tried

KINDS = st.sampled_from(vocabs.KINDS)


@lru_cache
def closure(kind: str) -> Closure:
    return Closure(vocabs.spec(kind))


@lru_cache
def base(kind: str) -> frozenset[int]:
    return frozenset(closure(kind).over(base_tokens(vocabs.spec(kind))))


@lru_cache
def backend(kind: str) -> Tokenizer:
    return Tokenizer.from_str(vocabs.backend(kind))


def count(kind: str) -> int:
    return len(pieces(vocabs.spec(kind)))


def load(spec: dict[str, Any]) -> Tokenizer:
    import json

    return Tokenizer.from_str(json.dumps(spec))


def cut(kind: str, kept: set[int]) -> Tokenizer:
    return load(pruned_spec(vocabs.spec(kind), Numbering(sorted(kept), count(kind))))


def some(kind: str, shares: list[float]) -> set[int]:
    """A closed set: what every tokenizer needs, and tokens at the given places of the vocabulary."""
    return set(base(kind)) | closure(kind).over(int(x * (count(kind) - 1)) for x in shares)


SHARES = st.lists(st.floats(0, 1), max_size=12)


@given(KINDS, SHARES)
def test_closure_is_closed_and_grows_with_what_is_kept(kind: str, shares: list[float]) -> None:
    kept = some(kind, shares)
    assert closure(kind).missing(kept) == {} and closure(kind).over(kept) == kept
    check_closed(vocabs.spec(kind), kept, count(kind))
    assert closure(kind).over(list(kept)[::2]) <= kept


@settings(max_examples=25, deadline=None)
@given(KINDS, SHARES, st.lists(st.sampled_from(vocabs.KEPT + vocabs.UNSEEN), min_size=1, max_size=2))
def test_text_of_kept_tokens_is_split_as_before(kind: str, shares: list[float], texts: list[str]) -> None:
    before = [backend(kind).encode(t).ids for t in texts]
    kept = some(kind, shares) | closure(kind).over({i for ids in before for i in ids})
    after = cut(kind, kept)
    order = sorted(kept)
    assert [[order[i] for i in after.encode(t).ids] for t in texts] == before


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(vocabs.SPELL_ALL), st.text(max_size=12))
def test_any_text_comes_back_as_it_did(kind: str, text: str) -> None:
    old, new = backend(kind), smallest(kind)
    assert new.decode(new.encode(text).ids) == old.decode(old.encode(text).ids)
    unknown = new.token_to_id("<unk>")
    assert unknown not in new.encode(text).ids or "<unk>" in text


@lru_cache
def smallest(kind: str) -> Tokenizer:
    return cut(kind, set(base(kind)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["suffixed", "unigram", "wordpiece"]), st.text(alphabet="thecatsdogñé日本語 .,!", max_size=12))
def test_text_that_could_be_spelt_still_can(kind: str, text: str) -> None:
    old, new = backend(kind), smallest(kind)
    before = old.decode(old.encode(text).ids)
    if old.token_to_id("<unk>") not in old.encode(text).ids:
        assert new.decode(new.encode(text).ids) == before


@given(KINDS, SHARES, SHARES)
@settings(max_examples=40, deadline=None)
def test_pruning_twice_is_pruning_once_to_what_both_keep(kind: str, one: list[float], other: list[float]) -> None:
    first, second = some(kind, one), some(kind, other)
    spec, numbers = vocabs.spec(kind), Numbering(sorted(first), count(kind))
    middle = pruned_spec(spec, numbers)
    both = [i for i in (numbers.get(t) for t in sorted(first & second)) if i is not None]
    assert pruned_spec(middle, Numbering(both, len(first))) == pruned_spec(spec, Numbering(sorted(first & second), count(kind)))


@pytest.mark.parametrize("kind", vocabs.KINDS)
def test_keeping_all_changes_nothing_and_keeping_little_keeps_the_meaning(kind: str) -> None:
    spec, n = vocabs.spec(kind), count(kind)
    assert pruned_spec(spec, Numbering(range(n), n)) == spec
    new = smallest(kind)
    assert new.get_vocab_size() == len(base(kind)) < n
    assert sorted(new.get_vocab().values()) == list(range(len(base(kind))))
    for i, token in enumerate(vocabs.SPECIAL):
        assert new.token_to_id(token) == i == backend(kind).token_to_id(token)
    assert new.encode("").ids == [new.token_to_id("<s>")]


@pytest.mark.parametrize("kind", vocabs.BPE)
def test_a_set_that_merges_can_not_make_is_refused(kind: str) -> None:
    whole = set(range(count(kind)))
    halves = {i for t in whole - base(kind) for i in closure(kind).of(t) - {t} - base(kind)}
    gone = max(halves)
    with pytest.raises(ModelError, match=f"need token {gone}"):
        check_closed(vocabs.spec(kind), whole - {gone}, len(whole))
    with pytest.raises(ModelError, match="tokenizer needs token 1,"):
        check_closed(vocabs.spec(kind), whole - {1}, len(whole))


@given(KINDS, SHARES, st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_number_asked_for_is_met_by_the_most_frequent(kind: str, shares: list[float], more: int, padding: int) -> None:
    needed, n = some(kind, shares), count(kind)
    total = min(n + padding, len(needed) + more)
    counts = {i: n - i for i in range(0, n, 7)}
    kept = choose(needed, n + padding, set(range(n)), counts, closure(kind).of, total)
    assert len(kept) == total and needed <= set(kept) and kept == sorted(kept)
    assert closure(kind).missing({i for i in kept if i < n}) == {}
    if total <= n:
        assert max(kept) < n  # rows without a token are the first to go
    gone = [i for i in counts if i not in kept]
    if kind in ("unigram", "wordpiece") and gone:  # nothing is needed by anything else: frequency alone decides
        extra = [i for i in kept if i not in needed]
        assert all(i in counts and counts[i] >= counts[min(gone)] for i in extra)


def test_the_piece_that_sets_the_penalty_for_unknown_characters_stays() -> None:
    scores = {"<unk>": 0.0, "a": -14.0, "b": -14.0, "c": -14.0, "za": -14.0, "bc": -13.0, "abc": -1.0, "cc": -30.0}
    spec = {**vocabs.spec("unigram"), "normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    spec["model"] = {**spec["model"], "vocab": [[t, s] for t, s in scores.items()], "unk_id": 0, "byte_fallback": False}
    # z has no piece of its own: calling it unknown and going on with "abc" must stay dearer than "za", "bc".
    assert load(spec).encode("zabc").tokens == ["za", "bc"]
    kept = sorted(base_tokens(spec) | {scores_at for scores_at, t in enumerate(scores) if t in ("za", "bc", "abc")})
    assert load(pruned_spec(spec, Numbering(kept, len(scores)))).encode("zabc").tokens == ["za", "bc"]
    without = [i for i in kept if i != list(scores).index("cc")]
    assert load(pruned_spec(spec, Numbering(without, len(scores)))).encode("zabc").tokens != ["za", "bc"]


def test_a_word_that_was_given_up_stays_given_up() -> None:
    spec = {**vocabs.spec("wordpiece"), "post_processor": None, "added_tokens": []}
    vocab = {t: i for i, t in enumerate(["<unk>", "a", "##b", "##x", "abx", "##c", "ab", "##xc"])}
    spec["model"] = {**spec["model"], "vocab": vocab}
    assert load(spec).encode("abxd").tokens == ["<unk>"] and load(spec).encode("abxc").tokens == ["abx", "##c"]
    assert tried(spec, ["abxd"]) == {vocab["abx"]} and tried(spec, ["abxc"]) == set()
    del spec["model"]["vocab"]["##c"]
    assert load(spec).encode("abxc").tokens == ["<unk>"]
    assert load({**spec, "model": {**spec["model"], "vocab": {t: i for t, i in vocab.items() if t != "abx"}}}).encode(
        "abxc"
    ).tokens == ["ab", "##xc"]
    assert tried(spec, ["abxc", "a" * 101]) == {vocab["abx"]}


def test_bytes_spell_what_single_characters_did() -> None:
    tokens = {t for t, i in pieces(vocabs.spec("byte-fallback")).items() if i in base("byte-fallback")}
    assert set(vocabs.BYTES) <= tokens and "▁" in tokens and "日" not in tokens and "日" in pieces(vocabs.spec("byte-fallback"))


def test_a_tokenizer_that_can_not_spell_is_refused() -> None:
    for model in ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, None, {}):
        with pytest.raises(ModelError, match="no way to spell"):
            base_tokens({"model": model})


# ---------------------------------------------------------------------------------------------------------------------
# Ids in configs

NEW = Numbering([0, 1, 5, 7], 10)


def test_ids_in_configs_follow_their_tokens() -> None:
    data = {
        "bos_token_id": 1,
        "eos_token_id": [5, 7],
        "pad_token_id": None,
        "decoder_start_token_id": -1,
        "sep_token_id": 11,  # beyond the rows: keeps its place after them
        "suppress_tokens": [1, 2, 7],
        "begin_suppress_tokens": [3],
        "bad_words_ids": [[5, 7], [5, 2]],
        "force_words_ids": [[[1], [2]], [[3]]],
        "sequence_bias": [[[7, 1], -1.5], [[2], 1.0]],
        "forced_decoder_ids": [[1, 5], [2, 6]],
        "text_config": {"bos_token_id": 1, "image_token_index": 7},
        "id2label": {0: "a"},
        "vocab_size": 10,
        "max_new_tokens": 7,
        "use_cache": True,
    }
    assert remap_ids(data, NEW, "x") == {
        **data,
        "eos_token_id": [2, 3],
        "sep_token_id": 5,
        "suppress_tokens": [1, 3],
        "begin_suppress_tokens": [],
        "bad_words_ids": [[2, 3]],
        "force_words_ids": [[[1]]],
        "sequence_bias": [[[3, 1], -1.5]],
        "forced_decoder_ids": [[1, 2]],
        "text_config": {"bos_token_id": 1, "image_token_index": 3},
    }
    assert remap_ids({"sequence_bias": {(7, 1): 2.0, (2,): 1.0}}, NEW, "x") == {"sequence_bias": {(3, 1): 2.0}}
    assert named_ids(data) == {1, 5, 7, 11}


@pytest.mark.parametrize("data", [{"eos_token_id": 2}, {"eos_token_id": [1, 3]}, {"text_config": {"pad_token_id": 9}}])
def test_a_config_that_names_a_lost_token_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is not kept"):
        remap_ids(data, NEW, "config.json")
