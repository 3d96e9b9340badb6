"""The names of the files that rooms share."""

from __future__ import annotations

from pathlib import Path

# The files of a model directory, with the names that transformers and mlx-lm use.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"  # the model card
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
LOCK = ".lock"  # inside a directory that a process has locked
# mlx-lm's adapter directory.
ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# In every directory that this tool writes: only such a directory may be overwritten.
MARKER = ".mlx_linearard"


class RunDir:
    """The paths of a run directory (the contract that users and checks rely on)."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.adapters = self.root / "adapters"
        self.base = self.root / "base"
        self.model = self.root / "model"
        self.checkpoints = self.root / "checkpoints"
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.report_markdown = self.root / "report.md"
        self.before = self.root / "before.json"  # native and scaled, kept for a resumed run
        self.evaluations = self.root / "evaluations.jsonl"  # the evaluations of --eval-every
        self.logs = self.root / "logs"  # what --report-to writes
        self.held_out = self.root / "held_out.json"  # each model's numbers by piece of held-out text, for paired tests
        self.held_out_tokens = self.root / "held_out_tokens.json"  # the held-out text itself, by length
        self.items = self.root / "results.items"  # the measurements of `evaluate`, item by item
        self.comparison = self.root / "comparison.json"  # the settings that all runs of a --compare share
