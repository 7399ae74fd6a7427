"""GenEval-style scoring and the shapes suite."""
