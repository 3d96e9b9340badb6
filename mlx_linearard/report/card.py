"""The model card (README.md) of what a run made: what it is, what was measured, its limits, and how to serve it.

A card is read by strangers: it names no folder of this machine. Text from the run, from the base model's card and from
names of files is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import CARD, RunDir, add_file, is_as_added, read_config
from ..models.origin import Origin, dump, origin_of
from ..progress import duration
from ..results.info import RunInfo
from ..results.verdict import headline
from ..rope import native_window
from .content import notes, plain, provenance, tables
from .load import RunFacts, read_run
from .render import templates
from .serving import Exported, serving, warning

TEMPLATE = "card.md"
LIBRARIES = {"mlx": "mlx", "adapters": "mlx", "hf": "transformers", "peft": "peft", "gguf": "gguf"}
ADAPTED = ("peft", "adapters")
# The options of the run that make the recipe, in this order; those that are not set are left out.
RECIPE = (
    "method", "factor", "yarn_beta_fast", "yarn_beta_slow", "objective", "layers", "relations", "relation_weight",
    "logits_weight", "long_weight", "long_seq_len", "seq_len", "batch_size", "grad_accum", "steps", "learning_rate",
    "warmup", "weight_decay", "fine_tune_type", "lora_rank", "lora_scale", "lora_dropout", "dtype", "seed",
)  # fmt: skip
TEXTS = ("data", "valid_data", "long_data")  # named by their last part only
CITATION = """@misc{yang2026linearard,
  title         = {LinearARD: Linear-Memory Attention Distillation for RoPE Restoration},
  author        = {Ning Yang and Hengyu Zhong and Wentao Wang and Baoliang Tian and Haijun Zhang and Jun Wang},
  year          = {2026},
  eprint        = {2604.00004},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2604.00004},
}"""


def write_card(
    folder: Path,
    facts: RunFacts,
    form: str,
    *,
    name: str = "",
    bits: int = 0,
    file: str = "",
    weights: Sequence[str] = (),
) -> None:
    """Write the card of what `folder` holds into it.

    Args:
        facts: of the run that made it.
        form: a format of `export`.
        name: the hub repository, if it goes to one.
        bits: of mlx's quantization; 0 if there is none.
        file: of `gguf`, the file's name.
        weights: sentences about these weights.
    """
    model = RunDir(facts.root).model
    what = Exported(form, name or folder.name, native_window(read_config(model)), bool(bits), file)
    add_file(folder, CARD, card(facts, origin_of_run(facts), what, weights))


def update_card(run_dir: str | Path) -> str | None:
    """Write the card of a run's `model/` again, from the results as they are now.

    Returns:
        None; or, if the card was changed by hand and is therefore left as it is, a sentence that says so.
    """
    model = RunDir(run_dir).model
    if not model.is_dir():
        return None
    if not is_as_added(model, CARD):
        return f"{model / CARD} was changed by hand, so it does not get the new results"
    write_card(model, read_run(run_dir), "mlx", bits=bits_of(model))
    return None


def origin_of_run(facts: RunFacts) -> Origin:
    """The base model and licence of a run: by the card in model/, else by the directory that was trained from."""
    known = origin_of(RunDir(facts.root).model)
    base = facts.config.get("model")
    return known or (origin_of(base) if isinstance(base, str) and "\0" not in base else Origin())


def bits_of(folder: Path) -> int:
    """The bits of mlx's quantization of a model directory; 0 if there is none."""
    settings = read_config(folder).get("quantization")
    bits = settings.get("bits") if isinstance(settings, dict) else None
    return bits if isinstance(bits, int) else 0


def card(facts: RunFacts, origin: Origin, what: Exported, weights: Sequence[str] = ()) -> str:
    """The card as Markdown with YAML front matter."""
    method = str(facts.config.get("method"))
    content = {
        "front": dump(_front(origin, what, method)),
        "title": f"{base_name(facts, origin)}, window {what.window}",
        "subtitle": _subtitle(facts, what),
        "about": _about(facts, origin, what),
        "weights": weights,
        "headline": headline(facts),
        "tables": list(tables(facts)),
        "limits": _limits(facts, origin),
        "warning": warning(method),
        "serving": list(serving(what)),
        "recipe": _recipe(facts),
        "citation": CITATION,
    }
    return templates().get_template(TEMPLATE).render(content).rstrip() + "\n"


def _front(origin: Origin, what: Exported, method: str) -> dict[str, Any]:
    relation = "adapter" if what.form in ADAPTED else "quantized" if what.quantized else "finetune"
    tags = ["mlx"] if LIBRARIES[what.form] == "mlx" else []
    return {
        **origin.front,
        **({"base_model_relation": relation} if origin.base_model else {}),
        "library_name": LIBRARIES[what.form],
        "pipeline_tag": "text-generation",
        "tags": [*tags, "long-context", "rope-scaling", method, "linearard"],
    }


def base_name(facts: RunFacts, origin: Origin) -> str:
    """The base model's hub repository, or the last part of the path that was trained from."""
    return origin.base_model or Path(str(facts.config.get("model") or "model")).name


def _subtitle(facts: RunFacts, what: Exported) -> str:
    old = plain((facts.results.run or RunInfo()).native_window)
    if what.form in ADAPTED:
        done = f"Adapters that extend a context window of {old} tokens to {what.window}"
    else:
        done = f"A model whose context window of {old} tokens was extended to {what.window}"
    method, factor = plain(facts.config.get("method")), plain(facts.config.get("factor"))
    return f"{done}, by {method} scaling of RoPE with factor {factor}."


def _about(facts: RunFacts, origin: Origin, what: Exported) -> list[str]:
    info, config = facts.results.run or RunInfo(), facts.config
    trained = f"{plain(info.training_tokens)} tokens" if info.training_tokens else "text"
    took = f" in {duration(info.seconds)}" if info.seconds else ""
    return [
        f"Scaling disturbs a model. This one was restored by distillation from the original with mlx-linearard: "
        f"objective {plain(config.get('objective'))}, {plain(config.get('fine_tune_type'))} training of the q, k and v "
        f"projections on {trained}{took}.",
        f"Base model: {base_name(facts, origin)}.",
        "Its licence applies." if "license" in origin.entries else "Its licence is not known to the tool; it applies.",
    ]


def _limits(facts: RunFacts, origin: Origin) -> list[str]:
    lengths = [n for name in facts.models for n in facts.row(name).perplexity]
    beyond = facts.window is not None and max(lengths, default=0) > facts.window
    return [
        f"Trained on texts of at most {plain(facts.config.get('seq_len'))} tokens"
        + ("." if beyond else "; this run's own perplexities do not reach beyond the old window."),
        "The numbers are those of this run's held-out text. Other text gives other numbers; safety was not measured.",
        *(note.text for note in notes(facts)),
    ]


def _recipe(facts: RunFacts) -> list[tuple[str, str]]:
    config: Mapping[str, Any] = facts.config
    named = [(key, Path(str(config[key])).name) for key in TEXTS if config.get(key)]
    return [*((key, plain(config[key])) for key in RECIPE if config.get(key) is not None), *named, *provenance(facts)]
