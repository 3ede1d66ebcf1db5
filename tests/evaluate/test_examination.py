"""Several checkpoints in one examination: protocols by name, tasks through lm-eval, and what models write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import made
import tiny
from command import pared, refused
from pared.evaluate.examination import PROTOCOLS, examine
from pared.evaluate.generation import loops, repetition, write

TASK = """
task: our_own
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = made.models_in(tmp_path_factory.mktemp("examined"))
    made.text(root / "one.jsonl")
    made.text(root / "two.jsonl", seed=1)
    return root


def test_several_models_and_texts_make_one_table(home: Path) -> None:
    names = ("pruned", "per-layer")
    command = ["eval", *(home / n for n in names), "--against", home / "dense", "--no-speed", "--seq-len", 32]
    command += ["--text", home / "one.jsonl", "--text", home / "two.jsonl"]
    done = pared(*command, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["models"]
    assert [Path(r["model"]).name for r in found] == [*names, "dense"]
    for record in found:
        alone = pared("eval", record["model"], "--no-speed", "--seq-len", 32, "--text", home / "two.jsonl", "--format", "json")
        assert record["texts"][str(home / "two.jsonl")]["perplexity"] == pytest.approx(json.loads(alone.out)["perplexity"])
    assert found[0]["texts"][str(home / "one.jsonl")]["kl"] > 0 and found[2]["texts"][str(home / "one.jsonl")]["kl"] is None
    shown = pared(*command).out
    assert all(word in shown for word in ("pruned", "per-layer", "dense", "one.jsonl", "two.jsonl"))


def test_a_protocol_sets_the_window(tmp_path: Path) -> None:
    """LLM-Pruner's: contiguous windows of 128, the rest dropped, the first token of each not scored."""
    made.checkpoint(tmp_path / "dense", max_position_embeddings=2048)
    text = made.text(tmp_path / "text.jsonl", documents=200)
    model = made.loaded(tmp_path / "dense")
    ids = torch.tensor(
        [t for line in text.read_text().splitlines() for t in made.tokenizer()(json.loads(line)["text"])["input_ids"]]
    )
    for name, (length, _) in PROTOCOLS.items():
        [record] = examine([tmp_path / "dense"], protocol=name, texts=[str(text)], speed=False)
        rows = ids[: len(ids) // length * length].view(-1, length)
        with torch.no_grad():
            log_p = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
        nll = -log_p.gather(-1, rows[:, 1:, None]).mean()
        assert record["texts"][str(text)]["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)


def test_protocols_that_can_not_be_kept_are_refused(home: Path) -> None:
    model = home / "pruned"
    refused(home, 2, "eval", model, "--protocol", "llm-prunr", words=("llm-pruner, standard",))
    refused(home, 2, "eval", model, "--protocol", "llm-pruner", "--seq-len", 64, words=("a protocol says how text is cut",))
    # Without a text the protocol's own are fetched, which needs a network, or the package that fetches them.
    refused(home, 4, "eval", model, "--protocol", "llm-pruner", words=("wikitext",))


@pytest.mark.parametrize(
    ("tokens", "n", "share"), [([1, 2, 3, 4], 1, 0.0), ([1, 1, 1, 1], 1, 0.75), ([1, 2, 1, 2, 1], 2, 0.5), ([1], 4, 0.0)]
)
def test_repetition_is_the_share_of_n_grams_that_came_before(tokens: list[int], n: int, share: float) -> None:
    assert repetition(tokens, n) == share


def test_a_loop_is_the_same_three_times_at_the_end() -> None:
    assert loops([9, 8, 1, 2, 1, 2, 1, 2]) and loops([5, 7, 7, 7])
    assert not loops([1, 2, 1, 2, 1, 3]) and not loops([7, 7, 7, 5]) and not loops([])


def test_greedy_samples_are_what_the_model_finds_likeliest(home: Path) -> None:
    model = made.loaded(home / "dense")
    prompts = tiny.tokens(2, 4)
    done = write(model, made.tokenizer(), prompts, length=6)
    ids = prompts
    for _ in range(6):
        ids = torch.cat([ids, tiny.logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    for said, row in zip(done.samples, ids[:, 4:].tolist(), strict=True):
        row = row[: row.index(2)] if 2 in row else row
        assert said == made.tokenizer().decode(row, skip_special_tokens=True)
    one, other = (write(model, made.tokenizer(), prompts, temperature=1.0, seed=s).samples for s in (0, 1))
    assert one != other and one == write(model, made.tokenizer(), prompts, temperature=1.0, seed=0).samples


def test_what_models_write_stands_side_by_side(home: Path) -> None:
    command = [
        "eval",
        home / "pruned",
        home / "dense",
        "--no-speed",
        "--seq-len",
        32,
        "--text",
        home / "one.jsonl",
        "--generate",
        2,
    ]
    done = pared(*command, "--format", "json")
    assert done.code == 0, done.err
    for record in json.loads(done.out)["models"]:
        assert len(record["written"]["greedy"]["samples"]) == 2
        assert set(record["written"]["sampled"]["repeated"]) == {"1", "2", "3", "4"}
    assert "sample 2" in pared(*command).out


def test_tasks_without_lm_eval_are_refused_with_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(home, 4, "eval", home / "pruned", "--no-speed", "--tasks", "piqa", words=("pip install 'pared[eval]'",))


@pytest.fixture(scope="module")
def task_dir(home: Path) -> Path:
    pytest.importorskip("lm_eval")
    folder = home / "tasks"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    words = [[made.WORDS[int(i)] for i in torch.randint(0, len(made.WORDS), (6,), generator=g)] for _ in range(12)]
    rows = [
        {"question": f"{a} {b}", "choices": [f"{c} {d}", f"{e} {f}"], "answer": i % 2}
        for i, (a, b, c, d, e, f) in enumerate(words)
    ]
    data = folder / "data.json"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "our_own.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.slow  # lm-eval looks through thousands of task files
def test_tasks_are_scored_as_the_likelihood_of_the_choices_says(home: Path, task_dir: Path, tmp_path: Path) -> None:
    command = ["eval", home / "pruned", home / "per-layer", "--against", home / "dense", "--no-speed", "--seq-len", 32]
    command += ["--text", home / "one.jsonl", "--tasks", "our_own", "--task-dir", task_dir, "--format", "json"]
    done = pared(*command)
    assert done.code == 0, done.err
    found = json.loads(done.out)["models"]
    rows = [json.loads(line) for line in (task_dir / "data.json").read_text().splitlines()]
    for record in found:
        model, tokenizer = made.loaded(Path(record["model"])), made.tokenizer()
        right = 0
        for row in rows:
            scores = []
            for choice in row["choices"]:
                before = tokenizer(row["question"], add_special_tokens=True)["input_ids"]
                after = tokenizer(choice, add_special_tokens=False)["input_ids"]
                log_p = tiny.logits(model, torch.tensor([before + after])).log_softmax(-1)[0]
                scores.append(sum(float(log_p[len(before) + i - 1, t]) for i, t in enumerate(after)))
            right += scores[row["answer"]] == max(scores)
        assert record["average"] == record["accuracy"]["our_own"] == pytest.approx(right / len(rows))
        assert record["kept"] == pytest.approx(record["average"] / found[-1]["average"])


@pytest.mark.slow  # lm-eval looks through thousands of task files
def test_tasks_whose_data_is_not_at_hand_are_all_named(home: Path, task_dir: Path) -> None:
    refused(home, 4, "eval", home / "pruned", "--no-speed", "--tasks", "piqa,boolq", words=("piqa", "boolq", "neither cached"))
    refused(home, 2, "eval", home / "pruned", "--no-speed", "--tasks", "pika", words=("did you mean",))
