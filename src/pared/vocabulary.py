"""Which tokens of a vocabulary stay: those that a text needs, and those that a working tokenizer can not be without.

A tokenizer is taken as its tokenizer.json (the format of the `tokenizers` library), parsed. Removing tokens must leave
how a text made of kept tokens is split as it was, and must leave a way to spell every other text:

    BPE        a token needs the tokens on its merge path. What spells the rest: the 256 bytes (of byte-level BPE or of
               byte fallback), else every single character.
    Unigram    the best split stays the best where only pieces outside of it go, as long as the penalty for unknown
               characters, which hangs on the lowest score, stays the same. What spells the rest: bytes, or characters.
    WordPiece  the longest match stays the longest. What spells the rest: characters, at the start of a word and inside.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pared.errors import ModelError, UsageError

Spec = Mapping[str, Any]
KINDS = ("BPE", "Unigram", "WordPiece")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Keys of config.json and generation_config.json that hold ids of tokens with a meaning of their own.
_NAMED = re.compile(r"(^|_)(token_id|token_ids|token_index)$")
# Keys that hold lists of tokens to be avoided or preferred; a token that is gone needs neither.
_LISTED = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias", "forced_decoder_ids")


def kind_of(spec: Spec) -> str:
    """The model of a tokenizer. ModelError where it is none that can lose tokens."""
    model = spec.get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    if kind is None and isinstance(model, Mapping) and "merges" in model:
        kind = "BPE"  # files of early releases leave the type out
    if kind not in KINDS:
        what = "has no model" if kind is None else f"is a {kind} model"
        raise ModelError(
            f"the tokenizer {what}: there is no way to spell a word that it has lost",
            where="tokenizer.json",
            fix=f"vocabularies of {', '.join(KINDS)} tokenizers can be pruned",
        )
    return kind


def pieces(spec: Spec) -> dict[str, int]:
    """Token -> id of the tokenizer's model; tokens added beside it are in `added`."""
    vocab = spec["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, Mapping) else {piece: i for i, (piece, _) in enumerate(vocab)}


def added(spec: Spec) -> dict[str, int]:
    """Token -> id of the special and other tokens that were added to the model's own."""
    return {t["content"]: t["id"] for t in spec.get("added_tokens") or []}


def named_ids(data: Mapping[str, Any]) -> set[int]:
    """The token ids that a config names: begin and end of text, padding, and the like."""
    found: set[int] = set()
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= named_ids(value)
        elif _NAMED.search(str(key)):
            found |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int and v >= 0}
    return found


class Numbering:
    """Old token ids to new ones: kept rows in their old order, from 0 on. Ids beyond the rows keep their place after them."""

    def __init__(self, kept: Sequence[int], rows: int) -> None:
        self.kept, self.rows = kept, rows
        self._new = {old: i for i, old in enumerate(kept)}

    def get(self, old: int) -> int | None:
        """The new id, None for a token that is gone; numbers that stand for no token (-1) are as they were."""
        return old if old < 0 else self._new.get(old) if old < self.rows else len(self.kept) + old - self.rows

    def all(self, ids: Iterable[int]) -> list[int] | None:
        """The new ids, None where one of the tokens is gone."""
        found = [self.get(i) for i in ids]
        return None if None in found else [i for i in found if i is not None]


def remap_ids(data: Mapping[str, Any], new: Numbering, where: str) -> dict[str, Any]:
    """A config with every token id in it replaced. UsageError where it names a token that is gone."""

    def one(key: str, value: Any) -> Any:
        if type(value) is not int:
            return value
        if (found := new.get(value)) is None:
            raise UsageError(f"token {value} is not kept, and {key} names it", where=where, fix="keep that token")
        return found

    out: dict[str, Any] = {}
    for key, value in data.items():
        if key == "sequence_bias" and isinstance(value, Mapping):
            out[key] = {tuple(ids): bias for k, bias in value.items() if (ids := new.all(k)) is not None}
        elif isinstance(value, Mapping):
            out[key] = remap_ids(value, new, where)
        elif _NAMED.search(str(key)):
            out[key] = [one(key, v) for v in value] if isinstance(value, list) else one(key, value)
        elif key in _LISTED and isinstance(value, list):
            out[key] = [i for v in value if (i := new.get(v)) is not None]
        elif key in _SEQUENCES and isinstance(value, list):
            out[key] = [s for s in (_sequence(key, v, new) for v in value) if s is not None]
        else:
            out[key] = value
    return out


def _sequence(key: str, value: Any, new: Numbering) -> Any:
    """One entry of a list of token sequences; None where a token of it is gone."""
    if key == "forced_decoder_ids":  # [position, token]
        return None if (token := new.get(value[1])) is None else [value[0], token]
    if key == "sequence_bias":  # [tokens, bias]
        return None if (ids := new.all(value[0])) is None else [ids, value[1]]
    if value and isinstance(value[0], list):  # force_words_ids may offer alternatives
        return [ids for s in value if (ids := new.all(s)) is not None] or None
    return new.all(value)


# ---------------------------------------------------------------------------------------------------------------------
# What a tokenizer can not be without


def base_tokens(spec: Spec) -> set[int]:
    """Ids that stay whatever the text: added tokens, unknown, bytes, and what spells a text that was never seen."""
    kind, ids, model = kind_of(spec), pieces(spec), spec["model"]
    out = {i for i in added(spec).values()} | set(_post_processor_ids(spec.get("post_processor")))
    out |= {i for token, i in ids.items() if BYTE.fullmatch(token)} if model.get("byte_fallback") else set()
    unknown = model.get("unk_token")
    out |= {ids[unknown]} if unknown in ids else set()
    if kind == "Unigram":
        if model.get("unk_id") is not None:
            out.add(model["unk_id"])
        scores = [score for _, score in model["vocab"]]
        out.add(scores.index(min(scores)))
    # Where 256 bytes spell everything, only characters that stand for something else (a space, mostly) are needed.
    bytes_suffice = model.get("byte_fallback") and sum(1 for t in ids if BYTE.fullmatch(t)) == 256
    signs = set(_strings(spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder"))) if bytes_suffice else None
    letters = {token for token in ids if len(_bare(spec, token)) == 1}
    out |= {ids[t] for t in letters if signs is None or _bare(spec, t) in signs}
    if not bytes_suffice and kind != "BPE":
        out |= {i for token, i in ids.items() if not all(s in ids for s in symbols(spec, token))}
    return out


def _bare(spec: Spec, token: str) -> str:
    """A token without the marks that say where in a word it stands."""
    model = spec["model"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    token = token[len(prefix) :] if prefix and token.startswith(prefix) and token != prefix else token
    return token[: -len(suffix)] if suffix and token.endswith(suffix) and token != suffix else token


def symbols(spec: Spec, token: str) -> list[str]:
    """The single-character tokens that spell a token."""
    model = spec["model"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    ends = bool(suffix) and token.endswith(suffix) and token != suffix
    out = list(_bare(spec, token))
    out = [c if i == 0 and not inside else prefix + c for i, c in enumerate(out)]
    if ends:
        out[-1] += suffix
    return out


def _strings(value: Any) -> Iterator[str]:
    """Every character that the settings of a tokenizer's other parts name."""
    if isinstance(value, str):
        yield from value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner) if key != "type" else ()
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _strings(inner)


def _post_processor_ids(part: Any) -> Iterator[int]:
    if not isinstance(part, Mapping):
        return
    for inner in part.get("processors") or []:
        yield from _post_processor_ids(inner)
    for mark in ("sep", "cls"):
        if mark in part:
            yield part[mark][1]
    for token in (part.get("special_tokens") or {}).values():
        yield from token["ids"]


# ---------------------------------------------------------------------------------------------------------------------
# Closure


class Closure:
    """What a token needs beside itself. Of BPE: the tokens on the path by which it is merged from its symbols."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._ids = spec, pieces(spec)
        self._token = {i: t for t, i in self._ids.items()}
        self._rank = {pair: r for r, pair in enumerate(merges(spec))} if kind_of(spec) == "BPE" else {}
        self._known: dict[int, frozenset[int]] = {}

    def of(self, token: int) -> frozenset[int]:
        """A token and everything that it needs."""
        if token not in self._known:
            self._known[token] = frozenset([token, *self._path(token)])
        return self._known[token]

    def over(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and everything that they need."""
        return set().union(*(self.of(t) for t in tokens))

    def missing(self, kept: set[int]) -> dict[int, set[int]]:
        """Kept token -> tokens that it needs and that are not kept."""
        return {t: lacks for t in sorted(kept) if (lacks := set(self.of(t) - kept))}

    def _path(self, token: int) -> list[int]:
        """Ids met on the way to a token, as BPE merges its symbols: the pair of lowest rank first, from the left.

        Inside a longer word the same merges make it (nothing was merged across its ends), so they are all it needs. A
        token that they do not lead to is only ever taken as a whole, and needs none of them.
        """
        text = self._token.get(token)
        if not self._rank or text is None:
            return []
        now, met = symbols(self._spec, text), []
        met += now
        while len(now) > 1:
            ranks = [self._rank.get(pair, len(self._rank)) for pair in itertools.pairwise(now)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == len(self._rank):
                return []
            now[best : best + 2] = [join(self._spec, now[best], now[best + 1])]
            met.append(now[best])
        # Symbols without a token are spelt in bytes, which stay anyhow.
        return [self._ids[t] for t in met if t in self._ids] if now == [text] else []


def merges(spec: Spec) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer in their order; files hold them as "a b" or as [a, b]."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"].get("merges") or [])
    return [(a, b) for a, b in pairs]


def join(spec: Spec, left: str, right: str) -> str:
    """The token that a merge makes."""
    prefix = spec["model"].get("continuing_subword_prefix") or ""
    return left + (right[len(prefix) :] if prefix and right.startswith(prefix) else right)


def tried(spec: Spec, words: Iterable[str]) -> set[int]:
    """Ids that WordPiece matches in words before it gives up on them; none of words that it comes through.

    They are needed too: without them it would match shorter ones and might come through where it did not.
    """
    ids, model = pieces(spec), spec["model"]
    prefix, longest = model.get("continuing_subword_prefix") or "", model.get("max_input_chars_per_word", 100)
    found: set[int] = set()
    for word in words:
        matched: list[int] = []
        at = 0 if len(word) <= longest else len(word)  # too long a word is not tried at all
        while at < len(word):
            ends = (end for end in range(len(word), at, -1) if (prefix if at else "") + word[at:end] in ids)
            if (end := next(ends, None)) is None:
                found.update(matched)
                break
            matched.append(ids[(prefix if at else "") + word[at:end]])
            at = end
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def choose(
    needed: set[int],
    rows: int,
    tokens: set[int],
    counts: Mapping[int, int],
    closure: Callable[[int], Iterable[int]],
    total: int,
) -> list[int]:
    """Exactly `total` rows to keep, ascending: the needed ones, and the most frequent others with what they need.

    needed: closed under `closure`, at most `total`. rows: of the embedding. tokens: ids that the tokenizer knows;
    rows without a token are the last to be kept. counts: how often a text has each token; among equals the lower id stays.
    """
    kept = {i for i in needed if i < rows}
    rest = sorted((i for i in range(rows) if i not in kept), key=lambda i: (i not in tokens, -counts.get(i, 0), i))
    progress = True
    while len(kept) < total and progress:
        progress = False
        for i in rest:
            more = {i, *closure(i)} - kept
            if more and len(kept) + len(more) <= total:
                kept |= more
                progress = True
    return sorted(kept)
