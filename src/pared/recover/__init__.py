"""Recovery: a short training that brings back what pruning cost, by distillation from the dense model or on text alone."""

from pared.recover.run import Recovered, recover
from pared.recovery import Recovery, make_recovery

__all__ = ["Recovered", "Recovery", "make_recovery", "recover"]
