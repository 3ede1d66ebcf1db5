"""The files of a tokenizer rewritten for the tokens that stay: new ids everywhere, merges kept closed, nothing else changed."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from typing import Any

from pared.errors import ModelError
from pared.vocabulary import Closure, Numbering, Spec, base_tokens, join, kind_of, merges, remap_ids

TOKENIZER = "tokenizer.json"
# Other forms of the same vocabulary: tokenizer.json says all that they say, and they would say the old ids.
_OTHER_FORMS = (
    *("vocab.*", "vocab-*", "merges.txt", "bpe.codes", "tekken.json", "*.model", "*.tiktoken", "*.spm", "sentencepiece*"),
    "tokenizer.*.json",
)


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A file as an object. ModelError where it is none."""
    try:
        data = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not valid JSON: {error}", where=name, fix="fetch the file again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{name} must hold an object", where=name, fix="fetch the file again")
    return data


def rewrite(files: Mapping[str, bytes], new: Numbering) -> dict[str, bytes | None]:
    """What becomes of the files that hold token ids: name -> content, None where the file is left out.

    files: a checkpoint's files beside the weights, tokenizer.json among them. Files that are not named stay as they are.
    """
    out: dict[str, bytes | None] = {
        name: None for name in files if any(fnmatch.fnmatchcase(name, form) for form in _OTHER_FORMS)
    }
    out[TOKENIZER] = _dump(pruned_spec(read_json(files, TOKENIZER), new))
    if "tokenizer_config.json" in files:
        config = remap_ids(read_json(files, "tokenizer_config.json"), new, "tokenizer_config.json")
        config.pop("fast_tokenizer_files", None)
        if isinstance(decoder := config.get("added_tokens_decoder"), Mapping):
            found = {new.get(int(i)): token for i, token in decoder.items()}
            config["added_tokens_decoder"] = {str(i): token for i, token in found.items() if i is not None}
        out["tokenizer_config.json"] = _dump(config)
    if "added_tokens.json" in files:
        ids = read_json(files, "added_tokens.json")
        out["added_tokens.json"] = _dump({t: i for t, old in ids.items() if (i := new.get(old)) is not None})
    if "generation_config.json" in files:
        out["generation_config.json"] = _dump(
            remap_ids(read_json(files, "generation_config.json"), new, "generation_config.json")
        )
    return out


def check_closed(spec: Spec, kept: set[int], rows: int) -> None:
    """ModelError where a tokenizer can not work with these tokens alone."""
    if gone := sorted(i for i in base_tokens(spec) - kept if i < rows):
        raise ModelError(f"the tokenizer needs token {gone[0]}, which would be gone", where=TOKENIZER, fix="keep that token")
    for token, lacks in Closure(spec).missing({i for i in kept if i < rows}).items():
        raise ModelError(
            f"the tokenizer's merges need token {min(lacks)} to make token {token}, and it would be gone",
            where=TOKENIZER,
            fix="keep both, or neither",
        )


def pruned_spec(spec: Spec, new: Numbering) -> dict[str, Any]:
    """A tokenizer.json without the tokens that are gone. Merges stay where all three of their tokens do."""
    kind_of(spec)
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        kept = {token: i for token, old in vocab.items() if (i := new.get(old)) is not None}
        model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    else:
        model["vocab"] = [entry for old, entry in enumerate(vocab) if new.get(old) is not None]
    if model.get("unk_id") is not None:
        model["unk_id"] = new.get(model["unk_id"])
    if "merges" in model:
        stays = model["vocab"].keys()
        model["merges"] = [
            entry
            for entry, (a, b) in zip(model["merges"], merges(spec), strict=True)
            if a in stays and b in stays and join(spec, a, b) in stays
        ]
    out = {**spec, "model": model, "added_tokens": [{**t, "id": new.get(t["id"])} for t in spec.get("added_tokens") or []]}
    out["post_processor"] = _post_processor(spec.get("post_processor"), new)
    if isinstance(padding := spec.get("padding"), Mapping):
        out["padding"] = {**padding, "pad_id": new.get(padding["pad_id"])}
    return out


def _post_processor(part: Any, new: Numbering) -> Any:
    if not isinstance(part, Mapping):
        return part
    out = dict(part)
    if "processors" in out:
        out["processors"] = [_post_processor(p, new) for p in out["processors"]]
    for mark in ("sep", "cls"):
        if mark in out:
            out[mark] = [out[mark][0], new.get(out[mark][1])]
    if isinstance(special := out.get("special_tokens"), Mapping):
        out["special_tokens"] = {name: {**t, "ids": new.all(t["ids"])} for name, t in special.items()}
    return out


def _dump(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
