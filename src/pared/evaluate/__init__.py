"""What a model is worth and what it costs: perplexity, distance to the dense model, speed and memory."""

from pared.evaluate.perplexity import Logits, Quality, Windows, logits_of, measure, protocol, windows
from pared.evaluate.speed import Speed, measure_speed, peak_memory_bytes

__all__ = [
    "Logits",
    "Quality",
    "Speed",
    "Windows",
    "logits_of",
    "measure",
    "measure_speed",
    "peak_memory_bytes",
    "protocol",
    "windows",
]
