"""Every option of distill, defined once: type, default, help and check. Flags, YAML and help use this definition."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..errors import UserError
from ..rope import METHODS, methods_help
from .checks import (
    DTYPES,
    FINE_TUNE_TYPES,
    KEEPS,
    LARGEST_COUNT,
    LONG_OBJECTIVES,
    NORMALIZATIONS,
    OBJECTIVES,
    RECOMPUTES,
    extends,
    fraction,
    layer_list,
    length_list,
    loggers,
    not_negative,
    objectives_of,
    positive,
    relation_names,
    several_objectives,
    shortened,
)
from .option import complaint, documented, flag, option

# The defaults of what is trained: what was measured best so far (docs/measured.md).
METHOD, OBJECTIVE, STEP_COUNT = "yarn", "logits", 157
STEP_TOKENS, LEARNING_RATE = 8192, 4.5e-4  # tokens per step, long text not counted, and the rate of such steps
LONG_OBJECTIVE, LONG_WEIGHT, RECALL_WEIGHT = "ce+recall", 0.2, 0.1
ALSO = {"lengths": "eval_lengths"}  # a name that other commands use as well -> the option's name


def default_rate(tokens: int) -> float:
    """The learning rate of a run whose steps have so many tokens, if none is given. Long text does not count.

    The fewer the tokens, the more of a step's gradient is chance: the rate falls with their square root
    (docs/measured.md, "The learning rate").
    """
    return float(f"{LEARNING_RATE * math.sqrt(min(1.0, tokens / STEP_TOKENS)):.2g}")


@dataclass(frozen=True)
class DistillConfig:
    """The options of `mlx_linearard.distill`. None: the value is chosen for the model, the data and the machine.

    Raises UserError, in one line, for a value that is wrong or of another type.

    >>> DistillConfig(method="yarn", factor=8.0).lora_rank
    64
    >>> DistillConfig(factor="4")
    Traceback (most recent call last):
    mlx_linearard.errors.UserError: --factor 4: must be a float, not a str
    """

    model: str | None = option(
        None,
        "a local mlx-lm or Hugging Face directory, or a hub repository; by default SmolLM2-135M-Instruct",
        metavar="PATH_OR_REPO",
        group="model and data",
    )
    data: str | None = option(
        None,
        "training data: a .txt, .md, .jsonl, .json or .parquet (.gz and .xz too); a folder of .txt and .md; a folder "
        "with train.jsonl, and with valid.jsonl as the held-out text; or hf:NAME[:CONFIG][@SPLIT]. Rows have `text`, "
        "`messages` or `prompt` and `completion`. By default the prose of this Python's own documentation",
        metavar="PATH_OR_DATASET",
        group="model and data",
    )
    valid_data: str | None = option(
        None,
        "held-out text, in the same forms; by default valid.jsonl if --data has one, else the last part of --data",
        metavar="PATH_OR_DATASET",
        group="model and data",
    )
    data_tokens: int = option(
        16_000_000,
        "read at most this many tokens of --data",
        check=positive,
        most=LARGEST_COUNT,
        metavar="N",
        group="model and data",
    )
    mask_prompt: bool = option(
        False,
        "with objective ce: only the last message of a conversation, or the completion, counts in the loss, as in "
        "mlx-lm; held-out text and the long part count every token",
        group="model and data",
    )
    output: str = option("linearard-run", "the run directory to write", metavar="DIR")
    method: str = option(METHOD, f"how RoPE is scaled; {methods_help()}", choices=METHODS, group="window")
    factor: float = option(4.0, "how many times longer the window becomes", check=extends, metavar="X", group="window")
    yarn_beta_fast: float | None = option(
        None,
        "yarn: dimensions that turn more often than this in the native window keep their frequency (default: 32)",
        check=positive,
        metavar="X",
        group="window",
    )
    yarn_beta_slow: float | None = option(
        None,
        "yarn: dimensions that turn less often than this are divided by the factor (default: 1)",
        check=positive,
        metavar="X",
        group="window",
    )
    objective: str = option(
        OBJECTIVE,
        "the loss: attention relations (LinearARD), the teacher's logits, both, or plain next-token cross-entropy",
        choices=OBJECTIVES,
        group="objective",
    )
    compare: str | None = option(
        None,
        "train each of these objectives on the same tokens from the same start, each in its own run below --output, "
        "and compare them in one report; `restored` is the first of them; by default only --objective is trained",
        check=several_objectives,
        metavar="OBJECTIVE,OBJECTIVE",
        group="objective",
    )
    layers: str = option(
        "last", "layers whose relations are matched: last, all or 0,5,11", check=layer_list, group="objective"
    )
    relations: str = option("qkv", "which relations are matched", check=relation_names, group="objective")
    normalization: str = option(
        "heads",
        "divide each relation by its own number of heads, or all by the query heads as the paper's code does",
        choices=NORMALIZATIONS,
        group="objective",
    )
    relation_weight: float = option(1.0, "weight of the relation loss", check=positive, metavar="W", group="objective")
    logits_weight: float = option(
        1.0, "weight of the logits loss in relation+logits", check=positive, metavar="W", group="objective"
    )
    long_weight: float | None = option(
        None,
        "weight of the long part of every step: one block of long text, which teaches the student to use its new "
        f"window; 0 leaves it out (default: {LONG_WEIGHT:g}, or 0 if text, memory or time allow no block longer than "
        "the native window)",
        check=not_negative,
        metavar="W",
        group="long text",
    )
    long_objective: str = option(
        LONG_OBJECTIVE,
        "what the long part teaches. ce: predict every next token (cross-entropy). longce: the same, with more weight "
        "on tokens that distant text makes more likely. recall: continue a passage that stands far above as the native "
        "model continues one that it has just read; + uses two of them",
        choices=LONG_OBJECTIVES,
        group="long text",
    )
    recall_weight: float = option(
        RECALL_WEIGHT,
        "weight of recall beside ce or longce, within the long part",
        check=positive,
        metavar="W",
        group="long text",
    )
    recall_passage: int | None = option(
        None,
        "recall: tokens of a passage, of which an eighth of the block is made; by default 256, or a quarter of the "
        "native window if that is less",
        check=positive,
        metavar="N",
        group="long text",
    )
    long_seq_len: int | None = option(
        None,
        "tokens of a block of long text, its repeated passages included; at most the new window, by default twice the "
        "native window and the passages, or as many as fit the memory",
        check=positive,
        metavar="T",
        group="long text",
    )
    long_data: str | None = option(
        None,
        "long text, in the forms of --data; by default the text of --data, first the documents that are long enough",
        metavar="PATH_OR_DATASET",
        group="long text",
    )
    seq_len: int | None = option(
        None,
        "tokens per block, at most the model's native window; by default 2048, or the native window if that is less",
        check=positive,
        metavar="T",
        group="training",
    )
    batch_size: int = option(1, "blocks per forward pass", check=positive, metavar="N", group="training")
    grad_accum: int | None = option(
        None,
        "forward passes per step, of all processes together; by default enough for about 8192 tokens",
        check=positive,
        metavar="N",
        group="training",
    )
    steps: int | None = option(
        None,
        f"optimizer steps; by default {STEP_COUNT}, or sized to the machine without --model and --data",
        check=positive,
        metavar="N",
        group="training",
    )
    tokens: int | None = option(
        None,
        "training tokens, instead of --steps; by default those of the steps",
        check=positive,
        metavar="N",
        group="training",
        most=LARGEST_COUNT,
    )
    learning_rate: float | None = option(
        None,
        f"peak learning rate of AdamW; by default {LEARNING_RATE:g}, and for steps of fewer than {STEP_TOKENS} tokens "
        "less, in proportion to the square root of their tokens",
        check=positive,
        metavar="LR",
        group="training",
    )
    warmup: int = option(4, "warm-up steps", check=not_negative, metavar="N", group="training")
    weight_decay: float = option(0.0, "AdamW's weight decay", check=not_negative, metavar="W", group="training")
    clip: float = option(
        5.0,
        "clip the gradient's norm to this; 0 turns clipping off",
        check=not_negative,
        metavar="NORM",
        group="training",
    )
    lora_rank: int = option(64, "rank of the adapters", check=positive, metavar="R", group="training")
    lora_scale: float = option(
        2.0, "scale of the adapters (alpha / rank)", check=positive, metavar="S", group="training"
    )
    lora_dropout: float = option(0.0, "dropout before the adapters", check=fraction, metavar="P", group="training")
    fine_tune_type: str = option(
        "lora",
        "how the q, k and v projections are trained: with low-rank adapters, with DoRA adapters, or in full",
        choices=FINE_TUNE_TYPES,
        group="training",
    )
    seed: int = option(
        0, "seed of adapters, data order and dropout", check=not_negative, metavar="N", most=LARGEST_COUNT
    )
    save_every: int = option(50, "steps between checkpoints; 0 saves only the last", check=not_negative, metavar="N")
    eval_every: int = option(
        0,
        "steps between evaluations on held-out text; 0 evaluates only at the start and at the end",
        check=not_negative,
        metavar="N",
    )
    keep: str = option(
        "best",
        "which state is exported: the last one, or the best one on held-out text, by KL to the teacher (by perplexity "
        "with objective ce), among the start, the states that --eval-every evaluated, and the end",
        choices=KEEPS,
    )
    patience: int = option(
        0,
        "stop after this many evaluations in a row without improvement; 0 never does",
        check=not_negative,
        metavar="N",
    )
    keep_checkpoints: int = option(
        2, "how many checkpoints are kept, besides the best one", check=positive, metavar="N"
    )
    eval_tokens: int | None = option(
        None,
        "held-out tokens per length; by default at most 32768, so many that measuring takes about a quarter of the "
        "training time",
        check=positive,
        metavar="N",
    )
    eval_lengths: str = option(
        "auto",
        "lengths at which perplexity is measured; auto is the block length, and on a GPU also twice the native window",
        check=length_list,
        metavar="T,T",
    )
    report_to: str | None = option(
        None,
        "also report the numbers of every step and measurement to these: csv, tensorboard, wandb, swanlab, trackio; "
        "by default to none",
        check=loggers,
        metavar="NAME,NAME",
    )
    project_name: str | None = option(
        None, "the project in a tracking service; by default the name of --output", metavar="NAME"
    )
    dtype: str = option(
        "auto",
        "dtype of the frozen weights in memory; auto is float32 on a CPU, else the model's own",
        choices=DTYPES,
    )
    workspace: int = option(256, "MB for tiles of scores", check=positive, metavar="MB")
    recompute: str = option(
        "auto",
        "which activations are computed again in the backward pass instead of kept in memory: all (least memory), "
        "feed-forward (of these parts of the layers), none (fastest), or auto: only those that do not fit into "
        "--memory-limit, by default half of the machine's memory",
        choices=RECOMPUTES,
    )
    memory_limit: int | None = option(
        None,
        "MB of arrays above which mlx waits for running work and frees its cache; by default mlx's own limit",
        check=positive,
        metavar="MB",
    )
    cache_limit: int | None = option(
        None, "MB that mlx keeps for reuse; by default mlx's own limit", check=not_negative, metavar="MB"
    )
    wired_limit: int | None = option(
        None, "MB that the system never moves out of memory (Apple GPUs); by default none", check=positive, metavar="MB"
    )
    resume: bool = option(False, "continue from the last checkpoint in --output")
    overwrite: bool = option(False, "replace the run that --output already holds")
    dry_run: bool = option(False, "print the plan (data, steps, memory) and stop, without loading the weights")
    force: bool = option(False, "run even if the plan needs more memory than the machine has")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if (wrong := complaint(item, value)) is not None:
                raise UserError(f"--{flag(item.name)} {shortened(value)}: {wrong}")
        if self.steps is not None and self.tokens is not None:
            raise UserError("--steps and --tokens both set the length of the training: give one of them")
        if self.patience and not self.eval_every:
            raise UserError(f"--patience {self.patience} counts evaluations: give --eval-every as well")
        if self.compare and self.objective != OBJECTIVE:
            raise UserError("--compare and --objective both choose the loss: give one of them")
        if self.mask_prompt and "ce" not in (self.objective, *objectives_of(self.compare)):
            raise UserError(
                f"--mask-prompt is for next-token cross-entropy, and --objective {self.objective} compares the student "
                "with its teacher at every token: give --objective ce, or leave --mask-prompt out"
            )
        self._check_relations()
        self._check_long_part()
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite replaces it: give one of them")

    def _check_relations(self) -> None:
        """Refuse options of relations if no objective has relations."""
        if any("relation" in name for name in (self.objective, *objectives_of(self.compare))):
            return
        names = ("layers", "relations", "normalization", "relation_weight")
        found = [f for f in dataclasses.fields(self) if f.name in names and getattr(self, f.name) != f.default]
        if found:
            given = ", ".join("--" + flag(f.name) for f in found)
            raise UserError(f"{given} needs an objective with relations, such as relation+logits, not {self.objective}")

    @property
    def weight_of_long(self) -> float:
        """The weight of the long part that is wanted: the given one or the default."""
        return LONG_WEIGHT if self.long_weight is None else self.long_weight

    @property
    def needs_long(self) -> bool:
        """Whether the user asks for a long part, so that a run is refused if it is not possible."""
        return bool(self.long_weight or self._options_of_long())

    def _options_of_long(self) -> list[str]:
        """The given options of the long part beside its weight."""
        given = {
            "--long-seq-len": self.long_seq_len,
            "--long-data": self.long_data,
            "--long-objective": self.long_objective != LONG_OBJECTIVE,
            "--recall-passage": self.recall_passage,
            "--recall-weight": self.recall_weight != RECALL_WEIGHT,
        }
        return [name for name, value in given.items() if value]

    def _check_long_part(self) -> None:
        if not self.weight_of_long and (names := self._options_of_long()):
            raise UserError(f"{' and '.join(names)} belong to the long part: give --long-weight as well")
        if self.recall_passage and "recall" not in self.long_objective:
            raise UserError(f"--recall-passage needs recall in --long-objective, not {self.long_objective}")
        if self.recall_weight != RECALL_WEIGHT and not self.long_objective.endswith("+recall"):
            wanted = "ce+recall or longce+recall, or --long-weight alone"
            raise UserError(f"--recall-weight is for two terms, not for {self.long_objective}: give {wanted}")


DistillConfig.__doc__ = documented(DistillConfig)
