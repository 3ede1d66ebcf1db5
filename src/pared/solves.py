"""What the solves of one block take: bytes at their worst moment, and operations."""

from __future__ import annotations

from dataclasses import dataclass

from pared.elimination import HELD_OUT, ROUNDS
from pared.fewrows import are_eliminated, are_few
from pared.inverses import WAITING
from pared.leastsquares import STRIP

# Dampings that are tried on the way to the best.
TRIED = 3


@dataclass(frozen=True)
class _Known:
    """What is known of so many tokens of a matrix [out, n]: second moments, or the tokens where they are few."""

    n: int
    tokens: int
    processes: int = 1

    @property
    def few(self) -> bool:
        return self.processes == 1 and are_few(self.tokens, self.n)

    @property
    def _held_out(self) -> int:
        return -(-self.tokens // HELD_OUT)

    @property
    def _fitted(self) -> int:
        return self.tokens - self._held_out if self.tokens >= HELD_OUT else self.tokens

    def _sums(self, n: float, out: float) -> float:
        return 4 * (n * (n + STRIP) / 2 + n * out)

    def _known(self, n: float, out: float) -> float:
        """Bytes of all of it with n channels, of the tokens to fit to and of those to judge by."""
        if self.few:
            return 4 * self.tokens * (n + out)
        rows = self.processes == 1 and are_few(self._held_out, self.n)
        return self._sums(n, out) + (4 * self._held_out * (n + out) if rows else self._sums(n, out))

    def _judging(self, n: float, out: float) -> float:
        """Operations of one look at how far weights are off on the tokens to judge by, float32."""
        if self.processes == 1 and are_few(self._held_out, self.n):
            return 4.0 * self._held_out * n * out
        return 2.0 * out * n * n


@dataclass(frozen=True)
class Consumer(_Known):
    """A matrix [out, n] back into the residual stream, refitted on so many tokens, of whose inputs the share `keep` stays.

    units: how many of its inputs' channels go together, in groups; 0 where each goes alone.
    """

    out: int = 0
    keep: float = 1.0
    units: int = 0

    @property
    def _left(self) -> float:
        return self.keep * self.n

    @property
    def weights(self) -> int:
        """Bytes of the refitted weights, float32."""
        return int(4 * self._left * self.out)

    def sums(self, out: int) -> int:
        """Bytes of what is known of the tokens where none is held out. out: 0 without targets."""
        return int(4 * self.tokens * (self.n + out) if self.few else self._sums(self.n, out))

    @property
    def gathered(self) -> int:
        """Bytes of what is known of the tokens to fit to and of those to judge by."""
        return int(self._known(self.n, self.out))

    @property
    def eliminated(self) -> int:
        """Bytes of H and V while columns go, and of what they are made with."""
        n, out, t = self.n, self.out, self.tokens
        v = 4 * n * out
        moving = 3 * 8 * n * min(n, WAITING + n / ROUNDS)
        if self.few and are_eliminated(t, n):
            return int(8 * (4 * t * n + 2 * t * t) + 2 * v + moving)
        if self.few:
            return int(8 * n * n + max(8 * t * n, v + 8 * (t * n + 2 * t * out + 2 * t * t) + 8 * STRIP * n, v + moving))
        return int(8 * n * n + v + max(2 * 8 * STRIP * n, moving))

    @property
    def selected(self) -> int:
        """Bytes while units are chosen."""
        return self.gathered + self.eliminated

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of choosing, of trying dampings, of the solve that counts, its result included."""
        k, out, t = self._left, self.out, self.tokens
        known = self._known(k, out)
        if self.few:
            tried = 4 * (t * k + 2 * t * out + 2 * t * t + 2 * k * out)
            last = 8 * (t * k + 2 * t * out + 2 * t * t + k * out) + 4 * k * out
        else:
            tried = 4 * (k * k + 2 * k * out + 3 * STRIP * k)
            last = 8 * (k * k + k * out + 2 * STRIP * k) + 4 * k * out
        return int(max(self.selected, known + tried, known + last, known + 8 * k * out + 2 * 4 * k * out))

    def elimination(self, gone: float, rounds: int) -> float:
        """Operations until a share is gone, all of which would go in so many rounds, float64."""
        n, t = self.n, self._fitted
        rounds = self.units or rounds
        looked = 2.0 * gone * n * n * self.out if self.units else 0.0  # a system for each that is left, in each round
        if self.few and are_eliminated(t, n):
            return looked + 2.0 * t * t * n + gone * (rounds * t * t * n + 2.0 * n * n * t)
        made = 3.0 * t * t * n + t**3 / 3 + t * n * n if self.few else 0.0
        return looked + made + 2.0 * gone * n**3

    @property
    def inverted(self) -> float:
        """Operations of a factor and an inverse of all columns, float64."""
        return 0.0 if self.few else 1.0 * self.n**3

    def moving(self, gone: float) -> float:
        """Operations that move the weights after what goes, float32."""
        return 2.0 * gone * self.n**2 * self.out

    def touched(self, gone: float, rounds: int) -> float:
        """Bytes that elementwise work reads and writes meanwhile: each round looks at all weights and at the inverse."""
        n, t = self.n, self.tokens
        if self.units:
            return gone * self.units * 8.0 * 4 * n * self.out
        return gone * rounds * (4.0 * n * self.out + (8.0 * 2 * t * n if self.few and are_eliminated(t, n) else 0.0))

    @property
    def _regressed(self) -> float:
        """Operations of the weights that elimination begins with, float64."""
        n, out = self.n, self.out
        return self._between(n, self._fitted) if self.few else 2.0 * out * n * n

    def _between(self, n: float, t: int) -> float:
        """Operations of one solve between so many tokens."""
        out = self.out
        return 2.0 * t * t * n + t**3 / 3 + 4.0 * t * n * out + 2.0 * t * t * out

    @property
    def solves(self) -> float:
        """Operations in float64, but for the inverse."""
        k, out = self._left, self.out
        last = self._between(k, self.tokens) if self.few else k**3 / 3 + 2.0 * out * k * k
        return self.elimination(1 - self.keep, ROUNDS) + self._regressed + last

    @property
    def flops(self) -> float:
        """Operations in float32."""
        n, k, out, t = self.n, self._left, self.out, self.tokens
        moving = self.moving(1 - self.keep)
        judged = TRIED * self._judging(k, out)
        if self.few:
            return moving + judged + 2.0 * t * out * n + TRIED * self._between(k, self._fitted)
        return moving + judged + t * n * (n + 2.0 * out) + 2.0 * out * n * n + TRIED * (k**3 / 3 + 2.0 * out * k * k)


@dataclass(frozen=True)
class Moved(_Known):
    """Matrices of so many entries in all that read the residual stream of width n, refitted to what it has become."""

    entries: int = 0

    @property
    def gathered(self) -> int:
        """Bytes of what is known of the tokens."""
        return int(self._known(self.n, self.n))

    @property
    def peak(self) -> int:
        """Bytes at the worst moment beside the refitted matrices, of which the largest is taken to be half of all."""
        h, t = self.n, self.tokens
        if self.few:
            return int(self.gathered + 8 * (4 * t * h + 2 * t * t) + 4 * self.entries / 2)
        rows = self.processes == 1 and are_few(self._held_out, h)
        judged = 4 * self._held_out * (2 * h + 2 * self.entries / h) if rows else 4 * 8 * h * h
        return int(self.gathered + max(4 * 3 * h * h + judged, 8 * 2 * h * h, 12 * h * h + 4 * self.entries / 2))

    @property
    def solves(self) -> float:
        """Operations in float64, of two such groups."""
        h, t = self.n, self.tokens
        return 2 * (4.0 * t * t * h + t**3 / 3 if self.few else h**3 / 3 + 2.0 * h**3)

    @property
    def flops(self) -> float:
        """Operations in float32, of two such groups."""
        h, t = self.n, self.tokens
        if self.few:
            held = self._held_out
            return 4.0 * t * self.entries + TRIED * (
                2 * (4.0 * t * t * h + t**3 / 3 + 4.0 * t * held * h) + 2.0 * held * self.entries
            )
        rows = self.processes == 1 and are_few(self._held_out, h)
        judged = 2 * 2.0 * self._held_out * h * h + 2.0 * self._held_out * self.entries if rows else 2 * 6.0 * h**3
        return 2 * 3.0 * t * h * h + TRIED * (2 * 7.0 / 3 * h**3 + judged) + 2.0 * self.entries * h
