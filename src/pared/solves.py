"""What the solves of one block take: bytes at their worst moment, and operations."""

from __future__ import annotations

from dataclasses import dataclass

from pared.elimination import ROUNDS
from pared.fewrows import are_few
from pared.leastsquares import STRIP

# Dampings that are tried on the way to the best.
TRIED = 3


@dataclass(frozen=True)
class Consumer:
    """A matrix [out, n] back into the residual stream, refitted on so many tokens, of whose inputs the share `keep` stays."""

    n: int
    out: int
    tokens: int
    keep: float
    processes: int = 1

    @property
    def few(self) -> bool:
        return self.processes == 1 and are_few(self.tokens, self.n)

    @property
    def _left(self) -> float:
        return self.keep * self.n

    @property
    def weights(self) -> int:
        """Bytes of the refitted weights, float32."""
        return int(4 * self._left * self.out)

    def sums(self, out: int, n: float | None = None) -> int:
        """Bytes of what is known of the tokens. out: 0 without targets; n: of so many channels alone."""
        n = self.n if n is None else n
        return int(4 * (self.tokens * (n + out) if self.few else n * (n + STRIP) / 2 + n * out))

    @property
    def gathered(self) -> int:
        """What is known of the tokens to fit to and of those to judge by."""
        return self._twice(self.n)

    def _twice(self, n: float) -> int:
        return self.sums(self.out, n) * (1 if self.few else 2)

    @property
    def eliminated(self) -> int:
        """H and V while columns go."""
        h = 8 * (4 * self.tokens * self.n + 2 * self.tokens**2) if self.few else 8 * self.n**2
        rows = 3 * 8 * self.n * max(self.n / ROUNDS, 0 if self.few else STRIP)
        return int(h + 4 * self.n * self.out * (2 if self.few else 1.2) + rows)

    @property
    def selected(self) -> int:
        """While units are chosen."""
        return self.gathered + self.eliminated

    @property
    def peak(self) -> int:
        """At the worst moment of choosing, of trying dampings, of the solve that counts."""
        k, out = self._left, self.out
        tried = self._twice(k) + 4 * (3 * k * out + (0 if self.few else k * k))
        last = self.sums(out, k) + 8 * ((0 if self.few else k * k) + 2 * k * out) + 4 * k * out
        return int(max(self.selected, tried, last))

    @property
    def elimination_flops(self) -> float:
        """Until the share that goes is gone, float64."""
        n, gone = self.n, (1 - self.keep) * self.n
        if self.few:
            return (1 - self.keep) * ROUNDS * self.tokens**2 * n + 2.0 * gone * n * (self.tokens + self.out / 2)
        return n**3 + 2.0 * n * n * gone + n * self.out * gone

    @property
    def solves(self) -> float:
        """Operations in float64."""
        n, k, out, t = self.n, self._left, self.out, self.tokens
        if self.few:
            return self.elimination_flops + 2.0 * t * out * (2 * n + k)
        return self.elimination_flops + 2.0 * out * n * n + k**3 / 3 + 2.0 * out * k * k

    @property
    def flops(self) -> float:
        """Operations in float32."""
        n, k, out, t = self.n, self._left, self.out, self.tokens
        if self.few:
            return 2.0 * t * out * n * 2 + TRIED * 4.0 * t * out * k
        return t * n * (n + 2.0 * out) + 2.0 * out * n * n + TRIED * (k**3 / 3 + 4.0 * out * k * k)


@dataclass(frozen=True)
class Moved:
    """Matrices of so many entries in all that read the residual stream, refitted to what it has become, on so many tokens."""

    hidden: int
    entries: int
    tokens: int
    processes: int = 1

    @property
    def few(self) -> bool:
        return self.processes == 1 and are_few(self.tokens, self.hidden)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: the largest of the matrices is taken to be half of all."""
        h = self.hidden
        return int(4 * self.entries / 2 + (8 * 6 * self.tokens * h if self.few else 4 * 14 * h * h))

    @property
    def solves(self) -> float:
        """Operations in float64."""
        return 4.0 * self.tokens**2 * self.hidden if self.few else 2 * (self.hidden**3 / 3 + 2.0 * self.hidden**3)

    @property
    def flops(self) -> float:
        """Operations in float32; a block has two such groups."""
        h, t = self.hidden, self.tokens
        if self.few:
            return (2 + TRIED) * 2.0 * t * self.entries
        return 2 * (3.0 * t * h * h + TRIED * 7.0 * h**3) + 4.0 * self.entries * h
