"""Vocabulary pruning as one step of a run: text in; the rows that stay and a tokenizer to match out, proved on that text."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pared.budget import Budget
from pared.budget.rows import rows_to_keep
from pared.budget.select import recount
from pared.calibration import documents_of
from pared.checkpoint import Checkpoint, place_of
from pared.errors import MissingError, ModelError, UsageError
from pared.plan import LayerPlan, Plan, from_ranges, to_ranges
from pared.recipe import Recipe
from pared.tokenizer_files import TOKENIZER, check_closed, read_json, rewrite
from pared.vocabulary import Closure, Numbering, Spec, added, base_tokens, choose, kind_of, named_ids, pieces, tried

Progress = Callable[[str, int, int], None]  # stage, done, total
# A hub data set is read up to so many tokens, and the proof splits documents of so many characters: minutes at most.
MOST_TOKENS, MOST_PROVED = 2**26, 2**22
_TURNS = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "U")]


@dataclass(frozen=True)
class Words:
    """A model's tokenizer, and the files that it came in. configs: where ids of tokens are named."""

    tokenizer: PreTrainedTokenizerBase
    files: dict[str, bytes]
    spec: Spec
    config: PreTrainedConfig
    configs: tuple[Mapping[str, Any], ...]
    carried: bool  # whether the files lie beside the weights, so that those that do not change are carried over anyhow

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def tokens(self) -> set[int]:
        return set(pieces(self.spec).values()) | set(added(self.spec).values())

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint | None,
        tokenizer: PreTrainedTokenizerBase | None,
        config: PreTrainedConfig,
        generation: Mapping[str, Any] | None = None,
    ) -> Words:
        """The tokenizer beside a checkpoint's weights, or a live one. ModelError where there is none that can be rewritten."""
        files: dict[str, bytes] = {}
        if checkpoint is not None:
            files = {place_of(p): p.read_bytes() for p in checkpoint.side_files()}
        given = tokenizer is not None
        if tokenizer is None:
            if checkpoint is None:
                raise UsageError("pruning the vocabulary needs the tokenizer", where="structures", fix="pass tokenizer=")
            tokenizer = load_tokenizer(checkpoint.path, config)
        carried = TOKENIZER in files and not given
        if not carried:
            # Another form of the same vocabulary, or no file of this tokenizer: transformers writes tokenizer.json from it.
            files |= _saved(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or TOKENIZER not in files:
            raise ModelError(
                f"a {type(tokenizer).__name__} has no tokenizer.json that could be rewritten",
                where=checkpoint.path if checkpoint else "tokenizer",
                fix="save the tokenizer with transformers' fast class beside the model first",
            )
        kind_of(read_json(files, TOKENIZER))
        spec = json.loads(backend.to_str())
        said = [config.to_dict(), dict(generation or {})]
        if "generation_config.json" in files:
            said.append(read_json(files, "generation_config.json"))
        return cls(tokenizer, files, spec, config, tuple(said), carried)


@dataclass(frozen=True)
class Retokenized:
    """What vocabulary pruning gives: rows that stay, ascending; files of the result; the tokenizer that they make.

    files: name -> content; None: a file of the source that is left out. facts: for the report.
    """

    kept: list[int]
    files: dict[str, bytes | None]
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ranges(self) -> str:
        """The rows that stay, as in a plan."""
        return to_ranges(self.kept)


def check_vocabulary(recipe: Recipe) -> None:
    """UsageError where the vocabulary and the text that decides about it do not come together."""
    named = "vocab" in (recipe.structures or ())
    if named and recipe.keep_tokens_from is None:
        what = "pruning the vocabulary needs a text that says which tokens are used"
        raise UsageError(what, where="--structures vocab", fix="--keep-tokens-from FILE")
    if recipe.keep_tokens_from is not None and not named:
        what = "the vocabulary is not among what may be removed"
        raise UsageError(what, where="--keep-tokens-from", fix="--structures vocab, or with others: vocab,kv,query,ffn")
    if recipe.remove is None and recipe.structures != ("vocab",):
        raise UsageError("nothing says how much to remove", where="--remove", fix="for a fifth: --remove 0.2")
    if named and recipe.iterative_steps > 1:
        what = "the vocabulary goes in one step"
        raise UsageError(what, where="--iterative-steps", fix="prune the vocabulary in a run of its own")


def keep_tokens(
    words: Words, recipe: Recipe, budget: Budget, *, alone: bool, progress: Progress = lambda stage, done, total: None
) -> Retokenized:
    """The tokens that stay as a recipe says. alone: whether nothing else is removed that could make up the amount.

    UsageError where the amount is out of reach, or where nothing can go.
    """
    asked = alone and recipe.remove is not None
    made = retokenize_for_text(
        words,
        recipe.keep_tokens_from or "",
        lambda needed: rows_to_keep(budget, needed, asked=asked),
        min_count=recipe.min_count,
        progress=progress,
    )
    if alone and len(made.kept) == words.rows:
        what = f"{made.facts['needed']:,} of {words.rows:,} tokens are needed, and no row is left to remove"
        raise UsageError(what, where="--keep-tokens-from", fix="give a text with fewer kinds of tokens, or a --min-count")
    return made


def vocabulary_alone(budget: Budget, made: Retokenized, recipe: Recipe, provenance: Mapping[str, Any]) -> Plan:
    """The plan that removes tokens and nothing else."""
    layers = [LayerPlan(source=i) for i in range(budget.layout.num_layers)]
    plan = Plan(
        model_type=budget.layout.model_type,
        shape=recipe.shape,
        requested=recipe.remove,
        of=recipe.of,
        before=budget.before,
        after=budget.before,
        layers=layers,
        provenance=dict(provenance),
    )
    return with_vocabulary(plan, made, budget)


def with_vocabulary(plan: Plan, made: Retokenized | None, budget: Budget) -> Plan:
    """A plan that removes tokens too, and its account; as it is where there is no vocabulary to prune."""
    if made is None:
        return plan
    provenance = {**plan.provenance, "vocabulary": made.facts}
    return recount(plan.model_copy(update={"vocab": made.ranges, "provenance": provenance}), budget)


def retokenize_as_planned(words: Words, plan: Plan) -> Retokenized:
    """The tokenizer for a plan that was made before, proved on what its tokens stand for."""
    made = renumber(words, from_ranges(plan.vocab or "").tolist())
    prove(words, made, spelt(words.tokenizer, made.kept), exact=False)
    return made


def retokenize_for_text(
    words: Words,
    text: str,
    rows_to_keep: Callable[[int], int],
    *,
    min_count: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Retokenized:
    """Keep what a text needs, and as many of the most frequent others as `rows_to_keep(needed)` asks for.

    text: a file or a hub data set, as for calibration. min_count: tokens seen less often are not needed.
    Raises ModelError where the new tokenizer does not split the text as the old one does.
    """
    documents, counts = _read(words, text, progress)
    closure = Closure(words.spec)
    always = base_tokens(words.spec) | set(words.tokenizer.all_special_ids)
    always |= set().union(*(named_ids(c) for c in words.configs))
    always |= set().union(*(_ids(words.tokenizer, t, special=False) for t in conversations(words.tokenizer)))
    always = {i for i in always if i < words.rows}
    always |= _given_up(words, documents, counts)
    seen = {i for i, n in counts.items() if n >= min_count}
    needed = closure.over(always | seen)
    total = rows_to_keep(len(needed))
    kept = choose(needed, words.rows, words.tokens, counts, closure.of, total)
    result = renumber(words, kept)
    proved = prove(words, result, documents, exact=min_count == 1, progress=progress)
    facts = {
        "text": Path(text).name if Path(text).is_file() else text,
        "documents": len(documents),
        "tokens": sum(counts.values()),
        "different": len(counts),
        "min_count": min_count,
        "needed": len(needed),
        "before": words.rows,
        "after": len(kept),
        **proved,
    }
    return Retokenized(result.kept, result.files, result.tokenizer, facts)


def renumber(words: Words, kept: Sequence[int]) -> Retokenized:
    """The tokenizer with these rows alone. ModelError where it can not work without the others."""
    new = Numbering(kept, words.rows)
    check_closed(words.spec, set(kept), words.rows)
    files = rewrite(words.files, new)
    if not words.carried:
        files = {**words.files, **files}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**words.files, **files}.items():
            if content is not None:
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(content)
        tokenizer = load_tokenizer(Path(folder), words.config)
        tokenizer.name_or_path = words.tokenizer.name_or_path
    return Retokenized(list(kept), files, tokenizer)


def prove(
    words: Words,
    result: Retokenized,
    documents: Sequence[str],
    *,
    exact: bool,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Check that the new tokenizer does what the old one does. ModelError where it does not.

    Every kept token and every special token is the same under its new id. Documents, evenly spread, come back as
    they did; those made of kept tokens (exact: all of them) are split in the same places.
    """
    old, new, numbers = words.tokenizer, result.tokenizer, Numbering(result.kept, words.rows)
    tokens = words.tokens
    known = [i for i in result.kept if i in tokens]
    ids = [i for old_id in known if (i := numbers.get(old_id)) is not None]
    if (was := old.convert_ids_to_tokens(known)) != (now := new.convert_ids_to_tokens(ids)):
        at = next(k for k, pair in enumerate(zip(was, now, strict=True)) if pair[0] != pair[1])
        raise _different(f"token {known[at]} was {was[at]!r} and became {now[at]!r}")
    if old.special_tokens_map != new.special_tokens_map or numbers.all(old.all_special_ids) != new.all_special_ids:
        raise _different("its special tokens are not the old ones")
    step, checked, same, characters = max(1, len(documents) * _mean(documents) // MOST_PROVED), 0, 0, 0
    for n in range(0, len(documents), step):
        before, after = _ids(old, documents[n]), _ids(new, documents[n])
        wanted = numbers.all(before)
        if (wanted is None and exact) or (wanted is not None and wanted != after):
            raise _different(f"document {n + 1} is split in another way")
        if old.decode(before) != new.decode(after):
            raise _different(f"document {n + 1} does not come back as it did")
        checked, same, characters = checked + 1, same + (wanted is not None), characters + len(documents[n])
        progress("proving the tokenizer", n + 1, len(documents))
    return {"documents_proved": checked, "documents_split_alike": same, "characters_proved": characters}


def conversations(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a chat template writes around a conversation's turns, its roles included; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    for first in (0, 1):  # some templates refuse a system message
        turns = [{"role": role, "content": content} for role, content in _TURNS[first:]]
        # A template is a program of the model's authors, and says no in any way it likes.
        with contextlib.suppress(Exception):
            # The longer of the two: with what opens an answer.
            return [str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))]
    return []


def spelt(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> list[str]:
    """Texts to try a tokenizer on where there is no other: what its tokens stand for."""
    return [text for i in kept if (text := str(tokenizer.decode([i])))]


def load_tokenizer(path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory. ModelError where there is none, MissingError where it needs a package."""
    try:
        return AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    except ImportError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "a package is missing").strip()
        raise MissingError(f"the tokenizer can not be loaded: {reason}", where=path, fix="install what it asks for") from error
    except Exception as error:
        # The library behind it raises plain Exception for a file that it can not read.
        raise ModelError(f"the tokenizer can not be loaded: {error}", where=path) from error


def _read(words: Words, text: str, progress: Progress) -> tuple[list[str], Counter[int]]:
    documents: list[str] = []
    counts: Counter[int] = Counter()
    tokens = 0
    for document in documents_of(text):
        ids = _ids(words.tokenizer, document)
        documents.append(document)
        counts.update(ids)
        tokens += len(ids)
        progress("counting tokens", len(documents), 0)
        if tokens >= MOST_TOKENS and not Path(text).is_file():
            break
    if beyond := sorted(i for i in counts if i >= words.rows):
        token = words.tokenizer.convert_ids_to_tokens(beyond[0])
        what = f"the text has the token {token!r} with id {beyond[0]}, and the model only {words.rows} rows"
        raise ModelError(what, where=text, fix="use the tokenizer that belongs to the model")
    return documents, counts


def _given_up(words: Words, documents: Sequence[str], counts: Mapping[int, int]) -> set[int]:
    """Tokens of words that a WordPiece tokenizer began to split and then called unknown."""
    if kind_of(words.spec) != "WordPiece" or not counts.get(words.tokenizer.unk_token_id, 0):
        return set()
    backend: Any = words.tokenizer.backend_tokenizer
    found: set[int] = set()
    for document in documents:
        text = backend.normalizer.normalize_str(document) if backend.normalizer else document
        parts = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
        found |= tried(words.spec, (word for word, _ in parts))
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    # verbose=False: that a document is longer than the model's context does not matter here.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _mean(documents: Sequence[str]) -> int:
    return sum(map(len, documents)) // max(1, len(documents))


def _saved(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found: Iterable[Path] = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        return {place_of(p): p.read_bytes() for p in found}


def _different(what: str) -> ModelError:
    return ModelError(
        f"the pruned tokenizer does not do what the old one does: {what}",
        where="the proof of the vocabulary",
        fix="prune other structures; this tokenizer works in a way that pared does not know",
    )
