"""The commands of `pared`, one function each: thin, and importing what they need when they run."""
