"""Calibration text: reading documents, tokenising and packing them, and sampling text from the model itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pared.errors import MissingError, ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A hub dataset can be larger than any disk: so many times the tokens asked for are read, and the windows drawn from those.
_POOL = 8
_OTHER_SOURCES = "give a .txt or .jsonl file, or 'self' for text sampled from the model itself"


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of the calibration: int64 [b, s] each; no mask where nothing is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None = None


def together(rows: Sequence[Batch], size: int) -> list[Batch]:
    """Single rows in batches of up to `size` rows of equal length, in their order."""
    out: list[Batch] = []
    for row in rows:
        last = out[-1] if out else None
        alike = last is not None and (last.attention_mask is None) == (row.attention_mask is None)
        if last is not None and alike and last.input_ids.shape[1] == row.input_ids.shape[1] and len(last.input_ids) < size:
            masks = [m for m in (last.attention_mask, row.attention_mask) if m is not None]
            out[-1] = Batch(torch.cat([last.input_ids, row.input_ids]), torch.cat(masks) if masks else None)
        else:
            out.append(row)
    return out


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows, int64 [n, s], a mask of the same shape (1 = a token, None where nothing is padded), and their origin."""

    ids: Tensor
    attention_mask: Tensor | None
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return self.ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def batches(self, size: int) -> list[Batch]:
        """The rows in order, `size` at a time; the last batch may be smaller."""
        if size < 1:
            raise UsageError(f"a batch of {size} sequences holds nothing", where="batch", fix="use a batch of 1 or more")
        ids = self.ids.split(size)
        masks = [None] * len(ids) if self.attention_mask is None else self.attention_mask.split(size)
        return [Batch(rows, mask) for rows, mask in zip(ids, masks, strict=True)]

    def digest(self) -> str:
        """sha256 over the shape, the ids (little-endian int64) and, where there is one, the mask."""
        parts = [self.ids] if self.attention_mask is None else [self.ids, self.attention_mask]
        state = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        for part in parts:
            state.update(part.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
        return state.hexdigest()


def read_documents(path: str | Path, *, field: str = "text") -> list[str]:
    """A .txt is one document, a .jsonl one per line (its `field`); either may be compressed as .xz or .gz.

    Documents without a visible character are left out. UsageError names the line that can not be read.
    """
    path = Path(path)
    kind, text = _read(path)
    documents = [text] if kind == ".txt" else [_field(r, field, where) for where, r in _records(text, path)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UsageError("the file holds no text", where=path, fix="give a file with text in it")
    return documents


def records_of(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a source holds as records, each with where it stands: the lines of a .jsonl file, the rows of a hub dataset.

    A .txt file is one record, {"text": ...}. UsageError names what can not be read, MissingError what can not be fetched.
    """
    path = Path(source)
    if not _is_file(path):
        for number, row in enumerate(_dataset_rows(str(source))[1], start=1):
            yield f"{source}, row {number}", row
        return
    kind, text = _read(path)
    if kind == ".txt":
        yield str(path), {"text": text}
    else:
        yield from _records(text, path)


def _read(path: Path) -> tuple[str, str]:
    """The kind of a file, .txt or .jsonl, and its text."""
    compression = path.suffix if path.suffix in (".xz", ".gz") else ""
    kind = Path(path.name.removesuffix(compression)).suffix
    if kind not in (".txt", ".jsonl"):
        raise UsageError(
            "text is read from .txt and .jsonl files only (also .xz, .gz)", where=path, fix="convert or rename the file"
        )
    return kind, _decompressed_text(path, compression)


def _decompressed_text(path: Path, compression: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"can not be read: {error.strerror}"
        raise UsageError(f"text file: {reason}", where=path, fix="check the path") from error
    try:
        if compression:
            raw = lzma.decompress(raw) if compression == ".xz" else gzip.decompress(raw)
    except (lzma.LZMAError, OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"not a whole {compression} file: {error}", where=path, fix="fetch or compress the file again"
        ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError("the file is not UTF-8 text", where=f"{path}, line {line}", fix="convert the file to UTF-8") from error


def _records(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the line is not JSON: {error}", where=where, fix="write one JSON object per line") from error
        yield where, record if isinstance(record, dict) else {}


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(record.get(field), str):
        raise UsageError(
            f"the line has no text in a field {field!r}", where=where, fix=f'write {{"{field}": "..."}} on each line'
        )
    return record[field]


def documents_of(source: str | Path) -> Iterator[str]:
    """The documents of a .txt or .jsonl file, or those of a hub dataset one after the other."""
    yield from read_documents(source) if _is_file(Path(source)) else _dataset_documents(str(source))


def _is_file(path: Path) -> bool:
    return path.is_file() or path.suffix in (".txt", ".jsonl", ".json", ".xz", ".gz")


def tokenize_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each document alone, with the special tokens that the tokenizer itself adds; nothing is truncated."""
    # verbose=False: documents longer than the model's context are cut into windows later, so there is nothing to warn of.
    return [list(tokenizer(document, add_special_tokens=True, verbose=False)["input_ids"]) for document in documents]


def pack(token_lists: Iterable[Sequence[int]], length: int) -> Tensor:
    """Contiguous windows [n, length] over the concatenation; the remainder is dropped."""
    stream = torch.tensor(list(chain.from_iterable(token_lists)), dtype=torch.int64)
    whole = len(stream) // length
    return stream[: whole * length].view(whole, length)


def load_calibration(
    source: str | Path | Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    sampler: Callable[[int, int, int], Tensor] | None = None,
    max_positions: int | None = None,
    least: int | None = None,
) -> Calibration:
    """`samples` windows of `seq_len` tokens, drawn under `seed` without replacement, in the order in which they were drawn.

    least: so many are enough where the text has no more.
    source: a .txt or .jsonl file (also .xz, .gz); 'self', text that `sampler(samples, seq_len, seed)` takes from the model;
    a hub dataset as NAME[:CONFIG[:SPLIT[:FIELD]]]; or token ids [n, s], which are taken as they are, every row of them.
    """
    if isinstance(source, Tensor):
        return Calibration(_checked_ids(source, max_positions), None, "token ids given directly")
    check_size(samples, seq_len, max_positions)
    if source == "self":
        if sampler is None:
            raise UsageError("'self' needs a model to sample from", where="calibration", fix="give a .txt or .jsonl file")
        ids = _checked_ids(sampler(samples, seq_len, seed), max_positions)
        return Calibration(ids, None, f"self: {samples} x {seq_len} tokens sampled from the model, seed {seed}")
    path = Path(source)
    if _is_file(path):
        token_lists = tokenize_documents(read_documents(path), tokenizer)
        name = path.name
    else:
        token_lists = _dataset_tokens(str(source), tokenizer, samples * seq_len * _POOL)
        name = str(source)
    windows = pack(token_lists, seq_len)
    if least is not None:
        samples = max(least, min(samples, len(windows)))
    if len(windows) < samples:
        tokens = sum(map(len, token_lists))
        raise UsageError(
            f"too little calibration text: {tokens} tokens make {len(windows)} windows of {seq_len}, {samples} are asked for",
            where=source,
            fix=f"give more text, or lower samples to {len(windows)}" if len(windows) else "give more text, or lower seq_len",
        )
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    described = f"{name}: {samples} of {len(windows)} windows of {seq_len} tokens, seed {seed}"
    return Calibration(windows[drawn], None, described)


def check_size(samples: int, seq_len: int, max_positions: int | None) -> None:
    """UsageError where so many windows of that length make no sense for a model with so many positions."""
    if samples < 1:
        raise UsageError(f"{samples} calibration samples tell nothing", where="samples", fix="use 1 or more, 128 is usual")
    check_seq_len(seq_len, max_positions)


def check_seq_len(seq_len: int, max_positions: int | None) -> None:
    """UsageError where no token of a window would be predicted, or where the model has no position for some."""
    if seq_len < 2:
        raise UsageError(f"a window of {seq_len} tokens predicts nothing", where="seq_len", fix="use 2 or more")
    if max_positions is not None and seq_len > max_positions:
        what = f"windows of {seq_len} tokens are longer than the model's {max_positions} positions"
        raise UsageError(what, where="seq_len", fix=f"use {max_positions} or fewer")


def _checked_ids(ids: Tensor, max_positions: int | None) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or 0 in ids.shape or bool((ids < 0).any()):
        what = f"calibration ids must be integers >= 0 of shape [n, s], not {ids.dtype} {list(ids.shape)}"
        raise UsageError(what, where="calibration", fix="give tokenised windows of equal length")
    check_seq_len(ids.shape[1], max_positions)
    return ids.detach().to("cpu", torch.int64)


def _dataset_tokens(source: str, tokenizer: PreTrainedTokenizerBase, enough: int) -> list[list[int]]:
    token_lists: list[list[int]] = []
    count = 0
    for document in _dataset_documents(source):
        token_lists += tokenize_documents([document], tokenizer)
        count += len(token_lists[-1])
        if count >= enough:
            break
    return token_lists


def _dataset_documents(source: str) -> Iterator[str]:
    field, rows = _dataset_rows(source)
    for row in rows:
        if not isinstance(row.get(field), str):
            raise UsageError(f"the dataset has no text in a field {field!r}", where=source, fix=f"its fields: {', '.join(row)}")
        if row[field].strip():
            yield row[field]


def _dataset_rows(source: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """The field that NAME:CONFIG:SPLIT:FIELD names ("text" where it names none) and the rows, fetched as they are asked for."""
    parts = source.split(":")
    if len(parts) > 4 or not parts[0]:
        raise UsageError("not a dataset id", where=source, fix="write NAME:CONFIG:SPLIT:FIELD, the last three may be left out")
    name, config, split, field = parts + [""] * (4 - len(parts))
    return field or "text", _fetched(source, name, config or None, split or "train")


def _fetched(source: str, name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        what = "neither a file nor, without the package 'datasets', a dataset"
        raise MissingError(what, where=source, fix=f"pip install datasets, or {_OTHER_SOURCES}") from error
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, RuntimeError) as error:  # no network, no such dataset, a dataset that needs a login
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingError(f"the dataset can not be fetched: {reason}", where=source, fix=_OTHER_SOURCES) from error
    except ValueError as error:  # no such configuration or split; the message lists those that exist
        raise UsageError(" ".join(str(error).split()), where=source, fix="write NAME:CONFIG:SPLIT:FIELD") from error


def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    *,
    temperature: float = 1.0,
    batch: int = 32,
) -> Tensor:
    """Text that the model itself writes, int64 [samples, seq_len] on the CPU: ancestral sampling, nothing cut off.

    Each window opens with BOS (EOS in a model that has none) and after each end of a document the next one is opened in
    the same way, as in packed training text. The result depends on the seed alone, not on `batch` (up to the rounding of
    batched matrix products), and the global random state is neither read nor changed.
    """
    check_size(samples, seq_len, max_positions(model))
    if batch < 1 or not temperature > 0:
        raise UsageError("sampling needs a batch >= 1 and a temperature > 0", where=f"batch {batch}, temperature {temperature}")
    start, ends = _document_marks(model, tokenizer)
    # One number per token, drawn before anything else, makes a window independent of the batch that it falls into.
    uniform = torch.rand(samples, seq_len, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with inference(model):
        return torch.cat([_sample(model, rows, start, ends, temperature) for rows in uniform.split(batch)])


def _sample(model: PreTrainedModel, uniform: Tensor, start: int, ends: Tensor, temperature: float) -> Tensor:
    # float64 does not exist on mps; elsewhere a vocabulary is too large to be copied to the CPU for each token.
    device = torch.device("cpu") if model.device.type == "mps" else model.device
    uniform, ends = uniform.to(device), ends.to(device)
    ids = torch.full(uniform.shape, start, dtype=torch.int64, device=device)
    cache = None
    for position in range(1, ids.shape[1]):
        logits, cache = next_logits(model, ids[:, :position].to(model.device), cache)
        cumulative = torch.softmax(logits.float().to(device).double() / temperature, dim=-1).cumsum(dim=-1)
        if not bool(torch.isfinite(cumulative[:, -1]).all()):
            raise ModelError(
                "the model's logits are not finite",
                where=f"token {position} of a sample",
                fix="run `pared verify` on the model",
            )
        # right=True: the first token whose cumulative probability exceeds the number, never one of probability zero.
        chosen = torch.searchsorted(cumulative, uniform[:, position, None] * cumulative[:, -1:], right=True)[:, 0]
        chosen = chosen.clamp_(max=logits.shape[-1] - 1)
        ids[:, position] = torch.where(torch.isin(ids[:, position - 1], ends), start, chosen)
    return ids.cpu()


def _document_marks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, Tensor]:
    """The token that opens a document, and those that end one (without the former: sampled, it opens the next itself)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list) else {configured}
    ends = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
    start = next((mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id) if mark is not None), None)
    if start is None:
        what = "the tokenizer has neither BOS nor EOS to begin a text with"
        raise UsageError(what, where="calibration 'self'", fix="give a .txt or .jsonl file")
    return int(start), torch.tensor(sorted(ends - {start}), dtype=torch.int64)


def next_logits(model: PreTrainedModel, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [b, vocab] of what follows ids [b, s] and the cache for the next step; None where the model keeps none."""
    # Models without a key-value cache know no argument of that name; they get the whole text again.
    reused = {} if cache is None else {"past_key_values": cache}
    out = model(input_ids=ids if cache is None else ids[:, -1:], use_cache=True, **reused)
    return out.logits[:, -1], getattr(out, "past_key_values", None)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model's configuration allows; None where it names none (ALiBi, for one)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; each module's own mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
