"""Measurements of a model on text and tasks.

Each suite is a function of a model's directory and data that returns the suite's entry of results.json:
`perplexity`, `fidelity_to`, `multiple_choice`, `last_word`, `passkeys`, `ruler_tasks` and `far_context` (api.py).
Their parts are `open_directory` and `load_subject` (model.py), suites such as `Perplexity` (suites/), and `run_suite`
(runner.py). `evaluate` (runner.py) measures several directories into one results.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .api import far_context, fidelity_to, last_word, multiple_choice, passkeys, perplexity, ruler_tasks
    from .model import Directory, Subject, load_subject, open_directory
    from .runner import Evaluation, evaluate, run_suite
    from .suites.choice import Choice
    from .suites.far import FarContext
    from .suites.fidelity import FidelityToReference
    from .suites.lambada import LastWord
    from .suites.passkey import Passkey
    from .suites.ppl import Perplexity
    from .suites.ruler import QuestionSet, Ruler

# Where each public name is defined. A name is loaded at its first use, because models and tokenizers come with it.
_HOMES = {
    "Choice": "suites.choice",
    "Directory": "model",
    "Evaluation": "runner",
    "FarContext": "suites.far",
    "FidelityToReference": "suites.fidelity",
    "LastWord": "suites.lambada",
    "Passkey": "suites.passkey",
    "Perplexity": "suites.ppl",
    "QuestionSet": "suites.ruler",
    "Ruler": "suites.ruler",
    "Subject": "model",
    "evaluate": "runner",
    "far_context": "api",
    "fidelity_to": "api",
    "last_word": "api",
    "load_subject": "model",
    "multiple_choice": "api",
    "open_directory": "model",
    "passkeys": "api",
    "perplexity": "api",
    "ruler_tasks": "api",
    "run_suite": "runner",
}

__all__ = [
    "Choice",
    "Directory",
    "Evaluation",
    "FarContext",
    "FidelityToReference",
    "LastWord",
    "Passkey",
    "Perplexity",
    "QuestionSet",
    "Ruler",
    "Subject",
    "evaluate",
    "far_context",
    "fidelity_to",
    "last_word",
    "load_subject",
    "multiple_choice",
    "open_directory",
    "passkeys",
    "perplexity",
    "ruler_tasks",
    "run_suite",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
