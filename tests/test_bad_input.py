"""Every command with wrong input: status 2, one line on standard error, nothing written.

Each invocation is a process of its own. `{}` in an argument is the folder of broken things that `world` makes.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Commands
from tiny import PROSE, tiny_model

from mlx_linearard.distill.__main__ import run as distil

DISTILL = [
    "--model",
    "{}/model",
    "--data",
    "{}/text.txt",
    "--output",
    "{}/out",
    "--seq-len",
    "32",
    "--steps",
    "2",
    "--grad-accum",
    "1",
    "--lora-rank",
    "4",
    "--eval-tokens",
    "64",
]
EVALUATE = ["--model", "{}/model", "--suite", "ppl", "--data", "{}/text.txt", "--out", "{}/out.json"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a finished run, and damaged copies of each."""
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "model")
    (root / "text.txt").write_text(PROSE * 60)
    assert distil([part.format(root) for part in [*DISTILL, "--output", "{}/run"]]) == 0
    _models(root)
    _texts(root)
    _runs(root)
    (root / "cwd").mkdir()
    return root


def _models(root: Path) -> None:
    def broken(name: str, change: Callable[[Path], object]) -> None:
        shutil.copytree(root / "model", root / name)
        change(root / name)

    def config(**changes: object) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            held = json.loads((folder / "config.json").read_text())
            held.update(changes)
            (folder / "config.json").write_text(json.dumps({k: v for k, v in held.items() if v != "gone"}))

        return change

    weights = "model.safetensors"
    broken("m-no-config", lambda m: (m / "config.json").unlink())
    broken("m-config-text", lambda m: (m / "config.json").write_text("a model"))
    broken("m-config-list", lambda m: (m / "config.json").write_text("[]"))
    broken("m-config-binary", lambda m: (m / "config.json").write_bytes(b"\xff\xfe\x00"))
    broken("m-config-deep", lambda m: (m / "config.json").write_text("[" * 100_000))
    broken("m-no-type", config(model_type="gone"))
    broken("m-odd-type", config(model_type="mamba_of_tomorrow"))
    broken("m-type-list", config(model_type=["llama"]))
    broken("m-runs-code", config(model_file="evil.py"))
    broken("m-no-width", config(hidden_size="gone"))
    broken("m-width-text", config(hidden_size="64"))
    broken("m-no-heads", config(num_attention_heads=0))
    broken("m-heads-apart", config(num_key_value_heads=3))
    broken("m-head-dim", config(head_dim=-16))
    broken("m-wide", config(hidden_size=128))
    broken("m-deep", config(num_hidden_layers=4))
    broken("m-no-window", config(max_position_embeddings="gone"))
    broken("m-window-text", config(max_position_embeddings="long"))
    broken("m-theta", config(rope_theta="high"))
    broken("m-theta-zero", config(rope_theta=0))
    broken("m-rope-odd", config(rope_scaling={"type": "spiral", "factor": 2.0}))
    broken("m-rope-list", config(rope_scaling=[2.0]))
    broken("m-scaled", config(rope_scaling={"rope_type": "linear", "factor": 2.0}))
    broken("m-quantized-oddly", config(quantization={"bits": 7, "group_size": 64}))
    broken("m-quantization-text", config(quantization="4 bits"))
    broken("m-gptq", config(quantization_config={"quant_method": "gptq"}))
    broken("m-no-weights", lambda m: (m / weights).unlink())
    broken("m-pickled", lambda m: (m / weights).rename(m / "pytorch_model.bin"))
    broken("m-truncated", lambda m: (m / weights).write_bytes((m / weights).read_bytes()[:-100]))
    broken("m-stub", lambda m: (m / weights).write_bytes(b"\x08\0"))
    broken("m-lfs", lambda m: (m / weights).write_text("version https://git-lfs.github.com/spec/v1\n"))
    broken("m-index", lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'))
    broken("m-tokenizer", lambda m: (m / "tokenizer.json").write_text("{}"))
    broken("m-no-tokenizer", lambda m: (m / "tokenizer.json").unlink())
    broken("m-tokenizer-config", lambda m: (m / "tokenizer_config.json").write_text("[1]"))


def _texts(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "empty.txt").write_text("")
    (root / "blank.txt").write_text(" \n" * 50)
    (root / "short.txt").write_text("Too short.")
    (root / "binary.txt").write_bytes(bytes(range(128)) * 90)
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    (root / "text.pdf").write_text("%PDF")
    (root / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (root / "fieldless.jsonl").write_text('{"body": "fine"}\n')
    (root / "list.jsonl").write_text('["fine"]\n')
    (root / "cut.txt.gz").write_bytes(gzip.compress((root / "text.txt").read_bytes())[:60])
    (root / "not.txt.xz").write_text("plain")
    (root / "typo.yaml").write_text("lora_rnk: 4\n")
    (root / "kind.yaml").write_text("lora_rank: many\n")
    (root / "list.yaml").write_text("- steps\n")
    (root / "tab.yaml").write_text("steps:\t{\n")
    (root / "latin.yaml").write_bytes(b"output: caf\xe9\n")
    (root / "tag.yaml").write_text("!!python/object/apply:os.system ['true']\n")
    (root / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 40)
    (root / "cut.gguf").write_bytes(b"GG")
    (root / "broken.json").write_text("{")
    (root / "list.json").write_text("[]")


def _runs(root: Path) -> None:
    def broken(name: str, change: Callable[[Path], object], file: str) -> None:
        shutil.copytree(root / "run", root / name)
        change(root / name / file)
        if "checkpoints" in file:  # a run would resume from another checkpoint that is undamaged
            for other in (root / name / "checkpoints").iterdir():
                if not (root / name / file).is_relative_to(other):
                    shutil.rmtree(other)

    checkpoint = next((root / "run" / "checkpoints").glob("step-*2")).relative_to(root / "run")
    state = str(checkpoint / "state.json")
    broken("r-state-text", lambda f: f.write_text("{"), state)
    broken("r-state-list", lambda f: f.write_text("[]"), state)
    broken("r-state-empty", lambda f: f.write_text("{}"), state)
    broken("r-arrays", lambda f: f.write_bytes(b"x" * 100), str(checkpoint / "state.safetensors"))
    broken("r-arrays-cut", lambda f: f.write_bytes(f.read_bytes()[:-9]), str(checkpoint / "state.safetensors"))
    broken("r-config", lambda f: f.write_text("steps: [\n"), "config.yaml")
    broken("r-no-config", lambda f: f.unlink(), "config.yaml")
    broken("r-results", lambda f: f.write_text("{"), "results.json")
    broken("r-results-list", lambda f: f.write_text("[]"), "results.json")
    broken("r-no-model", lambda f: shutil.rmtree(f), "model")
    broken("r-no-base", lambda f: shutil.rmtree(f), "base")
    broken("r-adapters", lambda f: f.write_bytes(b"x" * 50), "adapters/adapters.safetensors")
    broken("r-adapter-config", lambda f: f.write_text("{"), "adapters/adapter_config.json")
    broken("r-adapter-list", lambda f: f.write_text("[]"), "adapters/adapter_config.json")
    broken("r-adapter-empty", lambda f: f.write_text("{}"), "adapters/adapter_config.json")


def with_model(name: str) -> list[str]:
    return [*DISTILL, "--model", f"{{}}/{name}"]


def resumed(name: str) -> list[str]:
    return [*DISTILL, "--output", f"{{}}/{name}", "--resume", "--steps", "4"]


def export(name: str, *more: str) -> list[str]:
    return ["--run", f"{{}}/{name}", "--to", "{}/out", *more]


BROKEN_MODELS = [
    "m-no-config", "m-config-text", "m-config-list", "m-config-binary", "m-config-deep", "m-no-type", "m-odd-type",
    "m-type-list", "m-runs-code", "m-no-width", "m-width-text", "m-no-heads", "m-heads-apart", "m-head-dim", "m-wide",
    "m-deep", "m-no-window", "m-window-text", "m-theta", "m-theta-zero", "m-rope-odd", "m-rope-list",
    "m-quantized-oddly", "m-quantization-text", "m-gptq", "m-no-weights", "m-pickled", "m-truncated", "m-stub",
    "m-lfs", "m-index", "m-tokenizer", "m-no-tokenizer", "m-tokenizer-config", "empty", "nowhere", "text.txt",
]  # fmt: skip
CASES: list[tuple[str, list[str]]] = [
    *(("distill", with_model(name)) for name in BROKEN_MODELS),
    *(("distill", [*DISTILL, "--dry-run", "--model", f"{{}}/{name}"]) for name in ("m-stub", "m-scaled", "m-wide")),
    *(("distill", [*DISTILL, *more]) for more in (
        ["--factor", "1"], ["--factor", "x"], ["--factor", "inf"],
        ["--factor", "1e300"], ["--method", "cubic"], ["--method", "llama3x"],
        ["--layers", "first"], ["--layers", "7"], ["--relations", "qx"], ["--objective", "mse"],
        ["--seq-len", "129"], ["--seq-len", "0"], ["--seq-len", "1e3"], ["--batch-size", "-1"],
        ["--batch-size", "5000"], ["--steps", "0"], ["--tokens", "9"], ["--learning-rate", "nan"],
        ["--learning-rate", "-1"], ["--lora-dropout", "1"], ["--seed", "-1"], ["--dtype", "int8"],
        ["--workspace", "0"], ["--eval-lengths", "x"], ["--eval-lengths", "100000"], ["--patience", "2"],
        ["--fine-tune-type", "prefix"], ["--normalization", "l2"], ["--compare", "relation,mse"],
        ["--wired-limit", "5"], ["--steqs", "5"], ["stray"], ["--resume"], ["--resume", "--overwrite"],
        ["--output", "{}/text.txt"], ["--output", "{}/text.txt/run"], ["--output", "/proc/run"],
        ["--output", "{}/run"], ["--output", "{}/model"], ["--model", "{}/m-scaled"],
        ["--data", "{}/nowhere"], ["--data", "{}/empty"], ["--data", "{}/empty.txt"], ["--data", "{}/blank.txt"],
        ["--data", "{}/short.txt"], ["--data", "{}/binary.txt"], ["--data", "{}/latin.txt"],
        ["--data", "{}/text.pdf"], ["--data", "{}/bad.jsonl"], ["--data", "{}/fieldless.jsonl"],
        ["--data", "{}/list.jsonl"], ["--data", "{}/cut.txt.gz"], ["--data", "{}/not.txt.xz"],
        ["--data", "hf:no/such-set"], ["--valid-data", "{}/short.txt"], ["--valid-data", "{}/nowhere"],
        ["--config", "{}/nowhere.yaml"], ["--config", "{}/typo.yaml"], ["--config", "{}/kind.yaml"],
        ["--config", "{}/list.yaml"], ["--config", "{}/tab.yaml"], ["--config", "{}/latin.yaml"],
        ["--config", "{}/tag.yaml"], ["--config", "{}/empty"],
    )),
    *(("distill", resumed(name)) for name in (
        "r-state-text", "r-state-list", "r-state-empty", "r-arrays", "r-arrays-cut", "r-config", "model", "nowhere",
    )),
    ("distill", [*resumed("run"), "--lora-scale", "3"]),
    *(("convert", words) for words in (
        [], ["to-onnx", "{}/model", "{}/out"], ["from-hf"], ["from-hf", "{}/model"], ["from-hf", "{}/model", "{}/run"],
        ["from-hf", "{}/model", "{}/model", "--overwrite"], ["from-hf", "{}/model", "{}/out", "--dtype", "int4"],
        ["from-hf", "{}/model", "{}/out", "-q", "--q-bits", "7"],
        ["from-hf", "{}/model", "{}/out", "-q", "--q-group-size", "100"],
        ["from-hf", "{}/m-truncated", "{}/out"], ["from-hf", "{}/m-no-config", "{}/out"],
        ["from-hf", "{}/nowhere", "{}/out"], ["from-hf", "{}/text.txt", "{}/out"],
        ["from-hf", "{}/model", "/proc/out"], ["from-hf", "{}/model", "{}/text.txt/out"],
        ["to-hf", "{}/m-index", "{}/out"], ["to-hf", "{}/m-gptq", "{}/out"], ["to-hf", "{}/empty", "{}/out"],
        ["from-gguf", "{}/bad.gguf", "{}/out"], ["from-gguf", "{}/cut.gguf", "{}/out"],
        ["from-gguf", "{}/model", "{}/out"], ["from-gguf", "{}/nowhere.gguf", "{}/out"],
        ["to-peft", "{}/empty", "{}/out"], ["to-peft", "{}/r-adapters/adapters", "{}/out"],
        ["to-peft", "{}/r-adapter-config/adapters", "{}/out"], ["to-peft", "{}/r-adapter-list/adapters", "{}/out"],
        ["to-peft", "{}/r-adapter-empty/adapters", "{}/out"], ["from-peft", "{}/run/adapters", "{}/out"],
        ["from-peft", "{}/nowhere", "{}/out"], ["scale", "{}/model", "{}/out"],
        ["scale", "{}/model", "{}/out", "--factor", "0.5"], ["scale", "{}/model", "{}/out", "--factor", "nan"],
        ["scale", "{}/model", "{}/out", "--factor", "2", "--method", "cubic"],
        ["scale", "{}/m-scaled", "{}/out", "--factor", "2"], ["scale", "{}/m-odd-type", "{}/out", "--factor", "2"],
        ["verify", "{}/model"], ["verify", "{}/model", "{}/nowhere"], ["verify", "{}/model", "{}/m-wide"],
        ["verify", "{}/model", "{}/model", "--tokens", "0"],
    )),
    *(("export", words) for words in (
        [], ["--run", "{}/run"], ["--to", "{}/out"], export("nowhere"), export("model"), export("text.txt"),
        export("r-no-model"), export("r-no-base", "--format", "adapters"), export("run", "--format", "onnx"),
        export("run", "--dtype", "int8"), export("run", "-q", "--q-bits", "1"),
        export("run", "-q", "--q-group-size", "7"), ["--run", "{}/run", "--to", "{}/model"],
        ["--run", "{}/run", "--to", "/proc/out"], export("r-adapters", "--format", "peft"),
        export("r-adapter-config", "--format", "peft"), export("r-adapter-empty", "--format", "peft"),
        export("run", "--format", "peft", "-q"),
    )),
    *(("evaluate", words) for words in (
        [], ["--suite", "ppl"], [*EVALUATE, "--suite", "mmlu"], [*EVALUATE, "--suite", ","],
        [*EVALUATE, "--model", "{}/nowhere"], [*EVALUATE, "--model", "{}/m-truncated"],
        [*EVALUATE, "--model", "{}/m-no-tokenizer"], [*EVALUATE, "--model", "{}/m-window-text"],
        [*EVALUATE, "--model", "{}/m-no-window"], [*EVALUATE, "--model", "{}/m-config-list"],
        [*EVALUATE, "--data", "{}/empty.txt"], [*EVALUATE, "--data", "ppl={}/nowhere"],
        [*EVALUATE, "--data", "ppl={}/binary.txt"], [*EVALUATE, "--lengths", "1"], [*EVALUATE, "--lengths", "4096"],
        [*EVALUATE, "--tokens", "0"], [*EVALUATE, "--tokens", "x"], [*EVALUATE, "--stride", "-1"],
        [*EVALUATE, "--dtype", "int8"], [*EVALUATE, "--chunk", "0"], [*EVALUATE, "--against", "{}/empty"],
        [*EVALUATE, "--out", "{}/list.json"], [*EVALUATE, "--out", "{}/broken.json"],
        [*EVALUATE, "--out", "/proc/out.json"], [*EVALUATE, "--out", "{}/model"],
        [*EVALUATE, "--suite", "fidelity"], [*EVALUATE, "--suite", "choice"],
        [*EVALUATE, "--suite", "choice", "--data", "choice={}/fieldless.jsonl"],
        [*EVALUATE, "--suite", "lambada", "--data", "lambada={}/bad.jsonl"],
        [*EVALUATE, "--suite", "ruler", "--tasks", "niah"], [*EVALUATE, "--suite", "passkey", "--depths", "x"],
        ["--run", "{}/model", "--suite", "ppl", "--data", "{}/text.txt"],
        ["--run", "{}/r-no-config", "--suite", "ppl", "--data", "{}/text.txt"],
        ["--run", "{}/r-config", "--suite", "ppl", "--data", "{}/text.txt"],
        ["--run", "{}/run", "--model", "{}/model", "--suite", "ppl"],
    )),
    *(("report", words) for words in (
        [], ["{}/nowhere"], ["{}/model"], ["{}/text.txt"], ["{}/empty"], ["{}/run", "{}/run"], ["--html", "{}/run"],
        ["{}/r-results"], ["{}/r-results-list"],
    )),
    *(("doctor", words) for words in (["--jsn"], ["now"], ["--json", "yes"])),
]  # fmt: skip


def tree(root: Path) -> dict[str, tuple[int, int] | None]:
    """Every file below `root` with the time and size of its last change, and every folder."""
    paths = {str(path): path for path in root.rglob("*")}
    return {
        name: None if path.is_dir() else (path.lstat().st_mtime_ns, path.lstat().st_size)
        for name, path in paths.items()
    }


def test_there_are_many() -> None:
    assert len(CASES) >= 60 and {module for module, _ in CASES} == {
        "distill",
        "convert",
        "export",
        "evaluate",
        "report",
        "doctor",
    }


# A third of them, from all commands, in every run of the tests; the others with the slow ones.
@pytest.mark.parametrize(
    ("module", "words"),
    [pytest.param(*case, marks=[] if i % 3 == 0 else pytest.mark.slow) for i, case in enumerate(CASES)],
    ids=[f"{i}-{m.split('.')[0]}-{'_'.join(w[-2:])}" for i, (m, w) in enumerate(CASES)],
)
def test_a_mistake_prints_one_line_and_writes_nothing(
    commands: Commands, world: Path, module: str, words: list[str]
) -> None:
    before = tree(world)
    status, errors = commands.run(module, [word.format(world) for word in words], world / "cwd")
    assert status == 2, errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert re.match(r"error: .{10}", errors) and "Traceback" not in errors
    assert tree(world) == before
