"""Writing a checkpoint in the form of another engine."""

from pared.export.gguf_file import QUANTIZATIONS, Exported, export_gguf

__all__ = ["QUANTIZATIONS", "Exported", "export_gguf"]
