"""Measurements of a model on text and tasks: one file a suite, `session` runs them, `compare` weighs them.

As functions: `open_directory` and `load_subject` (subject.py), then `run_suite` (session.py) with a suite such
as `Perplexity`, `FidelityToReference`, `Choice`, `LastWord`, `Passkey` or `Ruler`; `evaluate` for several
directories and one results.json.
"""
