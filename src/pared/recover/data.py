"""Training text as examples: plain documents, instructions and chats, each token marked as learnt from or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pared.calibration import records_of
from pared.errors import UsageError

# Alpaca's prompts (tatsu-lab/stanford_alpaca, train.py), for tokenizers without a chat template.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names
_FORMS = '{"text": ...}, {"instruction": ..., "input": ..., "output": ...} or {"messages": [{"role": ..., "content": ...}]}'
# Tokens of a document that are kept together when some of the data is held out, in rows.
_PIECE = 8


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, whether it is a target: something that the model learns to say."""

    ids: tuple[int, ...]
    target: tuple[bool, ...]

    @property
    def targets(self) -> int:
        """Targets that are predicted: the first token never is."""
        return sum(self.target[1:])


def read_examples(source: str, tokenizer: PreTrainedTokenizerBase, *, answers_only: bool = True) -> list[Example]:
    """Everything that a file or a hub dataset holds.

    A record is text (NAME:CONFIG:SPLIT:FIELD says which field of a dataset), an instruction (alpaca's fields; `response`
    and `answer` are taken for `output`, `question` and `prompt` for `instruction`) or a chat. UsageError for the first
    record that is none of them.
    """
    field = (source.split(":") + [""] * 4)[3] or "text"
    found = [e for where, record in records_of(source) for e in _example(record, field, tokenizer, where, answers_only)]
    if not any(e.targets for e in found):
        raise UsageError("the data holds nothing to learn from", where=source, fix=f"write one of {_FORMS} on each line")
    return found


def _example(
    record: dict[str, Any], field: str, tokenizer: PreTrainedTokenizerBase, where: str, answers_only: bool
) -> Iterator[Example]:
    if isinstance(record.get(field), str):
        if record[field].strip():
            yield text_example(record[field], tokenizer)
        return
    chat = record.get("messages") or record.get("conversations")
    if isinstance(chat, list):
        yield chat_example(_messages(chat, where), tokenizer, where, answers_only)
        return
    instruction, answer = (_first(record, n) for n in (("instruction", "question", "prompt"), ("output", "response", "answer")))
    if instruction is None or answer is None:
        raise UsageError(
            f"neither text nor an instruction nor a chat: {', '.join(record) or 'not an object'}", where=where, fix=_FORMS
        )
    more = record.get("input") or ""
    if getattr(tokenizer, "chat_template", None):
        asked = f"{instruction}\n\n{more}" if more else instruction
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        yield chat_example(turns, tokenizer, where, answers_only)
        return
    prompt = (_WITH_INPUT if more else _WITHOUT_INPUT).format(instruction=instruction, input=more)
    yield prompted_example(prompt, answer, tokenizer, answers_only)


def _first(record: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((record[n] for n in names if isinstance(record.get(n), str)), None)


def _messages(chat: list[Any], where: str) -> list[dict[str, str]]:
    turns = []
    for turn in chat:
        role, content = (
            (turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value"))
            if isinstance(turn, dict)
            else (0, 0)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise UsageError("a turn of the chat has no role or no content", where=where, fix=f"write {_FORMS}")
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return turns


def text_example(text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A document with the special tokens that the tokenizer itself adds; every token is a target."""
    ids = tuple(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    return Example(ids, (True,) * len(ids))


def prompted_example(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, answers_only: bool = True) -> Example:
    """A prompt and its answer, which ends the document (with EOS where there is one).

    Both are tokenised together, as they are when the model is used; a token with a part of the answer in it is the answer's.
    """
    whole = tokenizer(prompt + answer, add_special_tokens=True, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = list(whole["input_ids"])
    if tokenizer.is_fast:
        target = [end > len(prompt) for _, end in whole["offset_mapping"]]
    else:
        before = len(tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"])
        target = [i >= before for i in range(len(ids))]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        target.append(True)
    target[-1] = True  # an EOS that the tokenizer added stands for no characters
    return Example(tuple(ids), tuple(target) if answers_only else (True,) * len(ids))


def chat_example(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str = "data", answers_only: bool = True
) -> Example:
    """A chat through the tokenizer's own template. What the assistant says, and what ends it, are targets.

    The template is applied to the chat up to each answer and up to its end; what the second adds is the answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template", where=where, fix="give instructions or plain text")

    def ids_of(turns: list[dict[str, str]], prompt: bool) -> list[int]:
        out: Any = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=prompt, return_dict=True)
        return list(out["input_ids"])

    whole = ids_of(messages, False)
    target = [not answers_only] * len(whole)
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant" or not answers_only:
            continue
        before, after = ids_of(messages[:i], True), ids_of(messages[: i + 1], False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            what = "the chat template writes earlier turns anew, so that what the answer adds can not be told"
            raise UsageError(what, where=where, fix="--loss-on all, or chats of one question and one answer")
        target[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Example(tuple(whole), tuple(target))


def whole_pieces(examples: Iterable[Example], seq_len: int) -> list[Example]:
    """Long documents cut into pieces of a few rows, so that a part of a single one can be held out too."""
    size = _PIECE * seq_len
    return [
        Example(e.ids[at : at + size], e.target[at : at + size])
        for e in examples
        for at in range(0, len(e.ids), size)
        if len(e.ids) - at > 1
    ]


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those to judge by, drawn under `seed`; the order of each is as it was."""
    count = min(round(len(examples) * share), len(examples) - 1)
    if share and count < 1:
        raise UsageError(
            f"{len(examples)} documents are too few to hold some out", where="--held-out", fix="give more text, or --held-out 0"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = set(order[:count])
    return [e for i, e in enumerate(examples) if i not in aside], [e for i, e in enumerate(examples) if i in aside]
