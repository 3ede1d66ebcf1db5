"""How many rows of the vocabulary stay: what a text needs, rounded up to the alignment, or as many as an amount allows."""

from __future__ import annotations

import math

from pared.budget import Budget


def rows_to_keep(budget: Budget, needed: int, *, asked: bool) -> int:
    """Rows that stay, at least those `needed`. asked: whether the vocabulary alone has to meet the budget's amount.

    UsageError, with what is in reach, where the amount would take needed rows.
    """
    rows, step, of = budget.layout.sizes["vocab"], budget.step("vocab"), budget.amount.of
    least = min(rows, math.ceil(needed / step) * step)
    if not asked:
        return least

    def removed(kept: int) -> int:
        return budget.before.amount(of) - budget.count(vocab=kept).amount(of)

    each = removed(rows - 1)  # every row counts the same
    most = rows - math.ceil(budget.target / each) if each else -1
    if most < least:
        raise budget.unreachable(removed(least) / budget.before.amount(of))
    return max(least, most // step * step)
