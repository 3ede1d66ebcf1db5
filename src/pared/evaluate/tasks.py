"""Accuracy on benchmark tasks, through lm-eval's own API and model class: for every model that pared loads, per-layer ones too."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.errors import MissingError, UsageError

# Which of a task's measures stands for it in an average: normalised by length where the task has that.
_STANDS_FOR = ("acc_norm,none", "acc,none", "exact_match,none")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_dir: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Every measure of every task, and the mean over tasks of the one that stands for each.

    task_dir: a folder with task files of one's own (lm-eval's YAML). limit: so many examples of each task.
    UsageError for a task that does not exist; MissingError that names all tasks whose data is not at hand.
    """
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from lm_eval.tasks import get_task_dict  # type: ignore[import-not-found, import-untyped, unused-ignore]

    manager = _manager(None if task_dir is None else str(task_dir))
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 1)
            fix = f"did you mean {near[0]!r}?" if near else "lm-eval ls tasks lists them; --task-dir names a folder with others"
            raise UsageError(f"lm-eval knows no task {task!r}", where="--tasks", fix=fix)
    missing: dict[str, str] = {}
    with _quiet():
        for task in tasks:
            try:
                get_task_dict([task], manager)
            except Exception as error:  # whatever the data's library raises where there is no network
                missing[task] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if missing:
        raise MissingError(
            "the data of these tasks is neither cached nor can be fetched: "
            + "; ".join(f"{t} ({why})" for t, why in missing.items()),
            where="--tasks",
            fix="run once with a network to fill the cache of 'datasets', copy that cache (HF_HOME), or leave these tasks out",
        )
    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    results = {t: {k: v for k, v in r.items() if isinstance(v, int | float)} for t, r in found["results"].items()}
    chosen = {t: next((r[m] for m in _STANDS_FOR if m in r), None) for t, r in results.items()}
    values = [v for v in chosen.values() if v is not None]
    return {
        "tasks": results,
        "accuracy": chosen,
        "average": sum(values) / len(values) if values else None,
        "shots": {t: found.get("n-shot", {}).get(t) for t in results},
        "limit": limit,
    }


@functools.lru_cache(maxsize=1)
def _manager(task_dir: str | None) -> Any:
    """What knows all tasks. It reads thousands of files: once for all models of an examination."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return TaskManager(include_path=task_dir)


def _lm_eval() -> Any:
    try:
        import lm_eval  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingError("tasks need the package 'lm-eval'", where="--tasks", fix="pip install 'pared[eval]'") from error
    return lm_eval


@contextlib.contextmanager
def _quiet() -> Any:
    """Without lm-eval's log and progress, which would mix with what is asked for."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
