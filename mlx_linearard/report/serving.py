"""How other programs load what was exported: commands for a model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..cli import path_word, shell_command


@dataclass(frozen=True)
class Exported:
    """What a folder holds.

    form: `mlx`, `hf`, `peft`, `adapters` or `gguf`. name: the folder or the hub repository. window: in tokens.
    quantized: whether mlx's own quantization is in it. file: of `gguf`, the file's name.
    """

    form: str
    name: str
    window: int
    quantized: bool = False
    file: str = ""


@dataclass(frozen=True)
class Snippet:
    """How one program loads it: a sentence, or code in `language`."""

    program: str
    code: str = ""
    language: str = "bash"
    text: str = ""


def serving(what: Exported) -> Iterator[Snippet]:
    """The programs that load what was exported, each with what to type."""
    yield from {"mlx": _mlx, "hf": _hf, "peft": _peft, "adapters": _adapters, "gguf": _gguf}[what.form](what)


def _mlx(what: Exported) -> Iterator[Snippet]:
    name = path_word(what.name)
    yield Snippet(
        "mlx-lm",
        shell_command("mlx_lm.generate", "--model", name, "--prompt", "Hello")
        + "\n"
        + shell_command("mlx_lm.server", "--model", name),
    )
    if what.quantized:
        yield Snippet(
            "transformers and vLLM",
            shell_command("mlx_linearard.convert", "to-hf", name, "DIR"),
            text="They cannot read weights that mlx quantized. Write a copy that they read:",
        )
    else:
        yield from _hf(what, only=True)
    yield _lm_studio(what)


def _hf(what: Exported, *, only: bool = False) -> Iterator[Snippet]:
    name = what.name
    yield Snippet(
        "transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        "python",
    )
    yield Snippet("vLLM", shell_command("vllm", "serve", path_word(name), "--max-model-len", what.window))
    if not only:
        yield Snippet("mlx-lm", shell_command("mlx_lm.generate", "--model", path_word(name), "--prompt", "Hello"))


def _lm_studio(what: Exported) -> Snippet:
    return Snippet(
        "LM Studio",
        text="Put the folder into LM Studio's models folder as OWNER/NAME, and set the context length to "
        f"{what.window} when you load it; LM Studio's own default is shorter.",
    )


def _adapters(what: Exported) -> Iterator[Snippet]:
    name = path_word(what.name)
    yield Snippet(
        "mlx-lm",
        shell_command("mlx_lm.server", "--model", f"{name}/base", "--adapter-path", f"{name}/adapters"),
        text="`base/` holds the base model's weights with the scaled config, which the adapters need. From the hub, "
        "download the repository first (`hf download`) and name the folder.",
    )


def _peft(what: Exported) -> Iterator[Snippet]:
    yield Snippet(
        "PEFT",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("BASE")\n'
        f"model = PeftModel.from_pretrained(base, {what.name!r})",
        "python",
        "BASE is a copy of the base model with the scaled config, such as `mlx_linearard.convert scale` makes. On "
        "the base model as it is, without its RoPE scaling, the adapters compute something else.",
    )


def _gguf(what: Exported) -> Iterator[Snippet]:
    yield Snippet("llama.cpp", shell_command("llama-server", "-m", path_word(what.file), "-c", what.window))
    yield Snippet(
        "Ollama",
        "ollama create NAME -f Modelfile",
        text="Run this in this folder. The Modelfile sets `num_ctx`; without it Ollama reads a few thousand tokens "
        "only.",
    )
    yield _lm_studio(what)


_SCALINGS = {"yarn": "YaRN", "linear": "linear scaling", "llama3": "Llama 3's scaling"}


def warning(method: str) -> str:
    """What a reader must know about servers, by the method of scaling."""
    if method == "ntk":
        return "The scaling is in `rope_theta`, which every program reads."
    return (
        f"Some servers ignore {_SCALINGS.get(method, 'the scaling')} without a word; long prompts then give poor text. "
        "`mlx_linearard.convert verify --served URL DIR` tells whether a server applies it."
    )
