"""A tokenizer in the words of GGUF: tokens, their kinds, merges or scores, the splitting before them, special tokens, chat template.

llama.cpp splits text by rules of its own that have names. Which one a tokenizer.json stands for is told by its regular
expressions; one that no rule has is refused, since the model would be given other tokens than it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pared.errors import ModelError
from pared.tokenizer_files import TOKENIZER, read_json

# Kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CONTRACTED + r"\p{N}{1,3}" + _REST
_QWEN_2 = _CONTRACTED + _DIGIT + _REST
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{0}|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{0}|"
)
_TEKKEN = _CASED.replace("{0}", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_4O = (
    _CASED.replace("{0}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a tokenizer splits by, and whether it takes words that are tokens as they are -> the name of llama.cpp's rule.
RULES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "smaug-bpe",
    ((_QWEN_2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT_4O,), False): "gpt-4o",
}
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "*.tiktoken", "tekken.json")


@dataclass
class Tokens:
    """The entries under `tokenizer.` by their names there, and what is to be known about them."""

    entries: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_tokens(path: Path, config: PreTrainedConfig, rows: int, ends: Iterable[int] = ()) -> Tokens:
    """The tokenizer of a checkpoint. rows: of the embedding; ends: all tokens that end a text, from the generation config.

    A checkpoint without any tokenizer gives a file that takes token ids alone. ModelError where llama.cpp has no such
    tokenizer.
    """
    if not (path / TOKENIZER).is_file():
        if any(any(path.glob(form)) for form in _OTHER_FORMS):
            raise ModelError(
                f"the tokenizer is there in an older form, without {TOKENIZER}",
                where=path,
                fix="write it anew: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        return Tokens({"model": "no_vocab"}, ["there is no tokenizer: the file takes token ids alone"])
    spec = read_json({TOKENIZER: (path / TOKENIZER).read_bytes()}, TOKENIZER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer can not be loaded: {error}", where=path) from error
    out = _pieces(spec, rows, path / TOKENIZER)
    out.entries |= _special(tokenizer, rows, list(ends))
    if template := tokenizer.chat_template:
        out.entries["chat_template"] = (
            template if isinstance(template, str) else template.get("default") or json.dumps(template)
        )
    return out


def _pieces(spec: Mapping[str, Any], rows: int, where: Path) -> Tokens:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"pared writes BPE tokenizers to GGUF, and this is {model.get('type')}",
            where=where,
            fix="convert it with llama.cpp's own script, or export without quantisation for another engine",
        )
    pieces, kinds = ["[PAD%d]" % i for i in range(rows)], [UNUSED] * rows  # noqa: UP031
    for token, i in model["vocab"].items():
        _put(pieces, kinds, i, token, NORMAL, where)
    for added in spec.get("added_tokens") or []:
        _put(pieces, kinds, added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED, where)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    out = Tokens({"tokens": pieces, "token_type": kinds})
    if _is_byte_level(spec):
        out.entries |= {"model": "gpt2", "pre": _rule(spec, where), "merges": [" ".join(m) for m in merges]}
        if spec.get("normalizer") is not None:
            out.notes.append("llama.cpp does not normalise text before it is split (the tokenizer does)")
    elif model.get("byte_fallback"):
        _sentencepiece(spec, merges, out, where)
    else:
        raise ModelError(
            "llama.cpp has no BPE whose tokens are neither bytes nor backed by them",
            where=where,
            fix="none: the tokenizer would have to fall back to bytes",
        )
    return out


def _put(pieces: list[str], kinds: list[int], i: int, token: str, kind: int, where: Path) -> None:
    if i >= len(pieces):
        raise ModelError(
            f"token {i} has no row in an embedding of {len(pieces)} rows", where=where, fix="use the tokenizer of this model"
        )
    pieces[i], kinds[i] = token, kind


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    return any(p.get("type") == "ByteLevel" for p in _parts(spec.get("pre_tokenizer"), "pretokenizers"))


def _parts(part: Any, within: str) -> list[Mapping[str, Any]]:
    if not part:
        return []
    return [q for p in part[within] for q in _parts(p, within)] if part["type"] == "Sequence" else [part]


def _rule(spec: Mapping[str, Any], where: Path) -> str:
    """The name of llama.cpp's rule that splits text as this tokenizer does."""
    patterns: list[str] = []
    for part in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
            patterns.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(_DIGIT)
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            patterns += [_GPT2] if part.get("use_regex", True) else []
        else:
            patterns.append(json.dumps(part))  # a step that no rule has
    whole = bool(spec["model"].get("ignore_merges"))
    name = RULES.get((tuple(patterns), whole))
    if name is None:
        raise ModelError(
            f"llama.cpp has no rule known here that splits text as this tokenizer does: {' then '.join(patterns)[:200]}",
            where=where,
            fix="a tokenizer split like those of GPT-2, Llama 3, Qwen 2, SmolLM, Tekken or GPT-4o can be written",
        )
    return name


def _sentencepiece(spec: Mapping[str, Any], merges: list[tuple[str, ...]], out: Tokens, where: Path) -> None:
    """Byte-backed BPE over text with visible spaces: merged by the scores of tokens rather than by a list of pairs."""
    pieces, kinds = out.entries["tokens"], out.entries["token_type"]
    vocab: Mapping[str, int] = spec["model"]["vocab"]
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    pairs = set(merges)
    for token, own in ranks.items():
        # By score, any two neighbours that make a token are merged, and all pairs that make it come at one rank.
        lacking = [
            k for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab and (token[:k], token[k:]) not in pairs
        ]
        if lacking or own != list(range(own[0], own[0] + len(own))):
            raise ModelError(
                f"the merges that make {token!r} can not be told by a score, and llama.cpp has scores alone here",
                where=where,
                fix="none: this tokenizer is not one that SentencePiece made",
            )
    scores = [-1e6] * len(pieces)
    for token, own in ranks.items():
        scores[vocab[token]] = -float(own[0])
    unknown = spec["model"].get("unk_token")
    for i, piece in enumerate(pieces):
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            kinds[i] = BYTE
        elif piece == unknown:
            kinds[i] = UNKNOWN
    steps = _parts(spec.get("normalizer"), "normalizers")
    spaced = any(p["type"] == "Prepend" for p in steps) or any(
        p["type"] == "Metaspace" and p.get("prepend_scheme", "always") != "never"
        for p in _parts(spec.get("pre_tokenizer"), "pretokenizers")
    )
    if any(p["type"] == "Replace" and "Regex" in p["pattern"] for p in steps):
        out.notes.append("llama.cpp does not trim text or join runs of spaces (the tokenizer does)")
    out.entries |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": spaced}


def _special(tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> dict[str, Any]:
    """Ids of special tokens, and whether the tokenizer puts them around a text by itself."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
    out: dict[str, Any] = {}
    for name, attribute in names.items():
        i = getattr(tokenizer, attribute, None)
        if isinstance(i, int) and 0 <= i < rows:
            out[f"{name}_token_id"] = i
    if others := [i for i in ends if i != out.get("eos_token_id") and i < rows]:
        out.setdefault("eos_token_id", others[0])
        out["eot_token_id"] = others[0]
    around = tokenizer("a")["input_ids"]
    out["add_bos_token"] = bool(around) and around[0] == out.get("bos_token_id")
    out["add_eos_token"] = bool(around) and around[-1] == out.get("eos_token_id")
    return out
