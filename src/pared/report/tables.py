"""The records that pared makes, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

_SIZES = (("params", "parameters"), ("block_params", "of these in blocks"))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """A plain table; the first `left` columns are words, the others numbers."""
    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        out.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def pruned(
    report: Mapping[str, Any], kept: Mapping[str, Sequence[int]], without: Mapping[str, Sequence[int]] | None = None
) -> Iterator[RenderableType]:
    """Before and after, and the sizes that are left. report: of `pared.prune`; kept, without: from `kept_units`, `skipped`."""
    before, after = report["before"], report["after"]
    names = (
        *_SIZES,
        ("flops", f"multiply-adds per token, context {before['context']}"),
        ("kv_cache", "cache entries per token"),
        ("layers", "layers"),
    )
    rows = [(label, f"{before[key]:,}", f"{after[key]:,}", _change(before[key], after[key])) for key, label in names]
    yield table("", ("", "before", "after", "change"), rows)
    asked = "" if report.get("requested") is None else f" ({report['requested']:.2%} asked for)"
    yield f"removed {report['removed']:.2%} of {report['of']}{asked}"
    if timed := report.get("latency"):
        yield (
            f"blocks took {1000 * timed['dense']:.2f} ms and are to take {1000 * timed['predicted']:.2f} ms "
            f"({timed['predicted'] / timed['dense'] - 1:+.1%}, {-timed['requested']:.1%} asked for)"
        )
    if words := report.get("vocabulary"):
        yield (
            f"vocabulary: {words['before']:,} tokens before, {words['after']:,} after; {words['needed']:,} are needed "
            f"({words['different']:,} different ones stand in {words['text']}). Tried on {words['documents_proved']:,} of its "
            f"documents: all come back as they did, {words['documents_split_alike']:,} are split as before"
        )
    if kept:
        yield "kept in each layer: " + ", ".join(f"{axis} {_spread(counts)}" for axis, counts in kept.items())
    for kind, layers in (without or {}).items():
        yield f"layers without {kind}: {', '.join(map(str, layers))}"
    never = report.get("experts_never_routed")
    if never and never["count"]:
        yield f"{never['count']:,} of {never['of']:,} experts were sent no token of the calibration text"


def recovered(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a training gave: its held-out loss on the way, and what it was. report: of `pared.recover`."""
    judged = report.get("held_out") or {}
    if judged.get("curve"):
        rows = [(f"{step:,}", f"{tokens:,}", f"{loss:.4f}") for step, tokens, loss in judged["curve"]]
        yield table("", ("step", "tokens", "held-out loss"), rows, left=0)
    what = "all weights" if report["method"] == "full" else f"LoRA, {report['trained_parameters']:,} parameters"
    yield f"{what}, {report['objective']}: {report['tokens']:,} tokens in {report['steps']:,} steps, rate {report['learning_rate']:.2g}"
    if report.get("stopped"):
        yield f"stopped {report['stopped']}"
    if judged.get("best_step") == 0 and report["steps"]:
        yield "no evaluation was better than the start: the weights are those of the start"


def prediction(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a run would take. found: of `pared.predict`."""
    hardware = found["hardware"]
    rows = [
        ("peak memory", nbytes(found["peak"])),
        ("the least it can do with", nbytes(found["least"])),
        ("hidden states on disk", nbytes(found["spill"])),
        ("read of the weights", f"{nbytes(found['read'])}, {found['read_over_weights']:.2f} times"),
        ("written", nbytes(found["written"])),
        ("operations", f"{found['flops']:.2e}, and {found['solve_flops']:.2e} in float64"),
        ("hours", f"{found['hours']:.2f} at {hardware['flops']:.1e} and {hardware['solve_flops']:.1e} a second"),
    ]
    yield table("foreseen", ("", ""), rows)
    yield f"hardware: {hardware['said']}"


def kept_units(plan: Any) -> dict[str, list[int]]:
    """Axis -> units that stay, in each layer where some go; of a nested axis in each unit of its parent."""
    from pared.plan import from_ranges

    found: dict[str, list[int]] = {}
    for layer in plan.layers:
        for axis, kept in layer.keep.items():
            found.setdefault(axis, []).append(len(from_ranges(kept if isinstance(kept, str) else kept[0])))
    if plan.hidden is not None:
        found["hidden"] = [len(from_ranges(plan.hidden))]
    return found


def skipped(plan: Any) -> dict[str, list[int]]:
    """Sublayer -> the layers of the result that do without it."""
    found: dict[str, list[int]] = {}
    for i, layer in enumerate(plan.layers):
        for kind in layer.skip:
            found.setdefault(kind, []).append(i)
    return found


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def evaluation(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Quality and cost of a model, beside those of the dense one where there is one."""
    dense = report.get("against")
    rows: list[tuple[str, ...]] = []
    for key, label, form in _EVALUATED:
        ours = report.get(key)
        if ours is None:
            continue
        if dense is None:
            rows.append((label, form(ours)))
            continue
        theirs = dense.get(key)
        numbers = theirs is not None and key not in _ONLY_OURS
        rows.append((label, form(theirs) if numbers else "", form(ours), _change(theirs, ours) if numbers else ""))
    yield table("", ("", "dense", "pruned", "change") if dense else ("", "model"), rows)
    yield report["protocol"]


def long_context(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Loss by position, keys found again by length and depth, and the cache; the dense model's beside them where there is one."""
    dense = report.get("against")
    rows = []
    for i, b in enumerate(report["positions"]):
        theirs = [f"{dense['positions'][i]['perplexity']:.2f}", f"{b['kl']:.4f}"] if dense else []
        mark = "" if b["end"] <= report["trained"] else " (past the trained length)"
        rows.append((f"{b['first']:,} to {b['end'] - 1:,}{mark}", f"{b['perplexity']:.2f}", *theirs))
    heads = ("positions", "perplexity", *(("dense", "KL") if dense else ()))
    yield table("Loss by position", heads, rows)
    depths = sorted({r["depth"] for r in report["retrieval"]})
    for name, cells in [
        ("Keys found again", report["retrieval"]),
        *([("The dense model's", dense["retrieval"])] if dense else []),
    ]:
        share = {(r["length"], r["depth"]): f"{r['found'] / r['asked']:.0%}" for r in cells}
        lines = [(f"{n:,} tokens", *(share[n, d] for d in depths)) for n in sorted({r["length"] for r in cells})]
        yield table(name, ("depth", *(f"{d:.0%}" for d in depths)), lines)
    cache = report["cache"]
    yield (
        f"cache: {nbytes(cache['bytes_per_token'])} a token ({nbytes(cache['measured_bytes_per_token'])} measured), "
        f"{nbytes(cache['bytes_at_longest'])} at {report['longest']:,} tokens"
    )
    yield report["protocol"]


def examination(records: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Checkpoints side by side. records: of `pared.evaluate.examination.examine`."""
    texts = list(records[0]["texts"])
    tasks = list(records[0].get("accuracy") or {})
    columns = ["model", "parameters"]
    columns += [column for t in texts for column in (f"perplexity, {Path(t).name}", "KL")]
    columns += [*tasks, *(["average", "kept"] if tasks else [])]
    written = "written" in records[0]
    columns += ["repeated 4-grams, greedy", "sampled", "loops, greedy"] if written else []
    rows = []
    for r in records:
        row = [Path(r["model"]).name, f"{r['params']:,}"]
        row += [_number(r["texts"][t][k], ".4g") for t in texts for k in ("perplexity", "kl")]
        row += [_number(r["accuracy"][t], ".3f") for t in tasks]
        row += [_number(r["average"], ".3f"), _number(r["kept"], ".1%")] if tasks else []
        if written:
            greedy, sampled = r["written"]["greedy"], r["written"]["sampled"]
            row += [f"{greedy['repeated']['4']:.1%}", f"{sampled['repeated']['4']:.1%}", f"{greedy['looping']:.1%}"]
        rows.append(row)
    yield table("", columns, rows)
    for t in texts:
        yield records[0]["texts"][t]["protocol"]
    if written:
        for i in range(min(3, len(records[0]["written"]["sampled"]["samples"]))):
            texts_of = [(Path(r["model"]).name, r["written"]["sampled"]["samples"][i]) for r in records]
            yield table(f"sample {i + 1}", ("model", "wrote"), texts_of, left=2)


def steps(reports: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """What each step of a pipeline did. reports: of `pared.pipeline`."""
    rows = []
    for r in reports:
        if r["kind"] == "prune":
            rows.append(
                (str(r["step"]), "prune", f"{r['removed']:.2%} of {r['of']}", f"{r['after']['params']:,} parameters left")
            )
        else:
            judged = r.get("held_out") or {}
            said = f"held-out loss {judged['start']:.4f} to {judged['best']:.4f}" if judged.get("best") is not None else ""
            rows.append((str(r["step"]), "recover", f"{r['tokens']:,} tokens, {r['method']}, {r['objective']}", said))
    yield table("", ("step", "", "what", "result"), rows, left=4)


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def nbytes(n: float) -> str:
    """Bytes for a reader: 1.03 GB."""
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.2f} GB" if n < 1000 else f"{n / 1000:,.3f} TB"


def _count(n: float) -> str:
    return f"{n:,.0f}"


_ONLY_OURS = {"kl", "top1_agreement"}
_EVALUATED = (
    ("perplexity", "perplexity", lambda v: f"{v:.4g}"),
    ("bits_per_byte", "bits per byte", lambda v: f"{v:.4f}"),
    ("kl", "KL(dense || pruned), nats per token", lambda v: f"{v:.4f}"),
    ("top1_agreement", "same first choice", lambda v: f"{v:.1%}"),
    ("params", "parameters", _count),
    ("block_params", "of these in blocks", _count),
    ("bytes", "bytes", nbytes),
    ("macs_per_token", "multiply-adds per token", _count),
    ("kv_cache_per_token", "cache entries per token", _count),
    ("prefill_tokens_per_s", "prefill, tokens/s", _count),
    ("decode_tokens_per_s", "decode, tokens/s", _count),
    ("peak_memory_bytes", "peak memory", nbytes),
)


def inspection(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a model is made of, what can go, and what is left then."""
    sizes = ", ".join(f"{k} {_units(v)}" for k, v in report["sizes"].items())
    yield f"{report['model']}: {report['model_type']}, {report['layers']} layers, {sizes}"
    yield (
        f"{report['params']:,} parameters ({report['block_params']:,} in blocks), "
        f"{nbytes(report['bytes'])} as {report['dtype']}, "
        f"{nbytes(report['kv_cache_bytes_per_token'])} of cache per token"
        + ("" if report["weights"] == "headers" else f" ({report['weights']})")
    )
    rows = []
    for a in report["axes"]:
        rows.append(
            (
                a["axis"],
                f"{_units(a['units'])}" + (f" per {a['inside']}" if a["inside"] else ""),
                f"{a['parameters']:,}",
                f"{a['share']:.1%}",
                "proved" if a["proved"] else f"no: {a['reason']}",
                _expressible(a["config"], report["model_type"]),
                f"multiples of {a['multiple_of']}" if a["multiple_of"] > 1 else "any",
            )
        )
    columns = ("axis", "units", "parameters", "share", "removable", "sizes that a config can say", "alignment")
    out = table("What can be removed", columns, rows)
    for i in (4, 5, 6):
        out.columns[i].justify = "left"
    yield out
    rows = []
    for p in report["predictions"]:
        start = (f"{p['remove']:.0%}",)
        if "reason" in p:
            rows.append((*start, "out of reach", "", "", "", "", ""))
            continue
        rows.append(
            (
                *start,
                f"{p['removed']:.2%}",
                f"{p['params']:,}",
                nbytes(p["bytes"]),
                f"{p['macs_per_token']:,}",
                nbytes(p["kv_cache_bytes_per_token"]),
                ", ".join(f"{a} {n}" for a, n in p["sizes"].items())
                + ("" if p["written_as"] == report["model_type"] else f", as {p['written_as']}"),
            )
        )
    what = ", ".join(report["removes"]) or "nothing"
    columns = ("remove", "removed", "parameters", "bytes", "multiply-adds/token", "cache/token", "sizes left in each layer")
    form = "uniform" if report["shape"] == "uniform" else "--shape per-layer"
    yield table(f"What --remove of block-params would leave (taking {what}, {form})", columns, rows)
    yield table(
        "Quantised formats that take its matrices as they are", ("format", "inputs", "outputs", "fits"), _formats(report)
    )


def _formats(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for f in report["formats"]:
        mend = f"; --align {f['align']} would" if f["align"] else ""
        fits = "yes" if f["fits"] else f"no: {f['misfits']} do not, as {f['first']}{mend}"
        sides = (f"multiples of {n}" if n > 1 else "any" for n in (f["inputs"], f["outputs"]))
        rows.append((f["format"], *sides, fits))
    return rows


def _units(units: Any) -> str:
    return f"{units:,}" if isinstance(units, int) else f"{min(units):,} to {max(units):,}"


def _expressible(config: Mapping[str, str] | None, own: str) -> str:
    if config is None:
        return ""
    # A family's own sizes first, then those that another family's config says for it.
    order = sorted(config, key=lambda kind: (kind != own, kind == "per-layer", kind))
    return "; ".join(config[k] if k == own else f"{config[k]} {'' if k == 'per-layer' else 'as '}{k}" for k in order)


def census(found: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """What is proved of each model type. stock: the family's own config says the result; form: the per-layer form does."""
    inside = [f for f in found if not f["outside"]]
    axes = sorted({a for f in inside for a in f["axes"]}, key=lambda a: (*_CENSUS, a).index(a))
    words = {"proved": "stock", "per-layer form": "form"}
    rows = []
    for f in inside:
        why = f["failed"] or "; ".join(f"{a}: {r}" for a, r in f["axes"].items() if r not in words)
        rows.append((f["model_type"], *(words.get(f["axes"].get(a, ""), "no" if a in f["axes"] else "") for a in axes), why))
    out = table("What is proved to be removable", ("model type", *axes, "why not"), rows)
    out.columns[-1].justify = "left"
    yield out
    yield table(
        "Not decoder-only language models",
        ("model type", ""),
        [(f["model_type"], f["outside"]) for f in found if f["outside"]],
        left=2,
    )
    yield "; ".join(f"{what} {share:.0%} of {n}" for what, share, n in census_shares(found))


_CENSUS = ("kv", "query", "ffn", "expert", "expert_ffn", "shared_ffn", "hidden", "vocab", "layer")


def census_shares(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """(what, share proved, of how many): layers and hidden over all types in scope, FFN of any kind and heads where there are any."""
    inside = [f["axes"] for f in found if not f["outside"]]
    widths = ("ffn", "expert_ffn", "shared_ffn", "expert")
    wide = [f["axes"] for f in found if not f["outside"] and (f["failed"] or any(a.endswith("ffn") for a in f["axes"]))]
    good = ("proved", "per-layer form")

    def share(what: str, names: tuple[str, ...], among: list[Mapping[str, str]]) -> tuple[str, float, int]:
        have = [any(a.get(n) in good for n in names) for a in among]
        return what, sum(have) / max(1, len(have)), len(have)

    return [
        share("FFN", widths, wide),
        share("layers", ("layer",), inside),
        share("heads", ("kv", "query"), [a for a in inside if {"kv", "query"} & a.keys()]),
        share("hidden", ("hidden",), inside),
    ]


def criteria(found: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    rows = [(c["name"], c["needs"], ", ".join(c["axes"]) if c["axes"] else "all", c["paper"], c["about"]) for c in found]
    yield table("", ("criterion", "needs", "scores", "paper", ""), rows, left=5)
