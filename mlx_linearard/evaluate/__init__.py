"""Measurements of a model on text and tasks: one file a suite, `session` runs them, `compare` weighs them.

Each suite is a function: `perplexity`, `fidelity_to`, `multiple_choice`, `last_word`, `passkeys` and `ruler_tasks`
(functions.py) take a model's directory and data and return the suite's entry of results.json. What they are made
of: `open_directory` and `load_subject` (subject.py), then `run_suite` (session.py) with a suite such as
`Perplexity`; `evaluate` for several directories and one results.json.
"""

from __future__ import annotations

import importlib
from typing import Any

# These bring models and tokenizers with them, so they load when first asked for.
_HOMES = {
    **dict.fromkeys(
        ("perplexity", "fidelity_to", "multiple_choice", "last_word", "passkeys", "ruler_tasks"), "functions"
    ),
    **dict.fromkeys(("Directory", "Subject", "load_subject", "open_directory"), "subject"),
    **dict.fromkeys(("Evaluation", "evaluate", "run_suite"), "session"),
    **dict.fromkeys(("Choice", "LastWord"), "choice"),
    "FidelityToReference": "fidelity",
    "Passkey": "passkey",
    "Perplexity": "ppl",
    "QuestionSet": "ruler",
    "Ruler": "ruler",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
