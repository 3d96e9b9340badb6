"""GGUF files that are written: keys by the gguf package's own reader, logits after our own conversion back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
import sentencepieces
from mlx_linearard.convert.__main__ import run as convert
from mlx_linearard.convert.gguf import from_gguf, unpermute
from mlx_linearard.convert.gguf_write import permute, to_gguf
from mlx_linearard.convert.hf import scale
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from mlx_linearard.errors import UserError
from mlx_linearard.models.origin import Origin, origin_of

gguf = pytest.importorskip("gguf")


def with_merges(directory: Path, split: Any = None) -> Path:
    """Give a directory a byte-level tokenizer with merges, which llama.cpp demands, and an end token that it adds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "Ġt", "he", "Ġthe"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    made.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    (directory / "tokenizer.json").write_text(made.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    return directory


def model(folder: Path, kind: str = "llama", **over: Any) -> Path:
    return with_merges(tiny.write(folder, settings := tiny.config(kind, **over), tiny.weights(settings)))


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
SCALINGS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "linear": ({}, {"type": "linear", "factor": 4.0}),
    "yarn": ({}, {**YARN, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}),
    "yarn12": ({"beta_fast": 12.0, "beta_slow": 6.0}, {**YARN, "yarn_beta_fast": 12.0, "yarn_beta_slow": 6.0}),
    "ntk": ({}, {}),
    "llama3": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize("method", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_scaling_is_read_back(tmp_path: Path, method: str, tied: bool) -> None:
    betas, keys = SCALINGS[method]
    base = model(tmp_path / "base", tie_word_embeddings=tied)
    scaled = scale(base, tmp_path / "scaled", method=method.rstrip("12"), factor=4.0, **betas)
    to_gguf(scaled, tmp_path / "out.gguf")
    found = fields(tmp_path / "out.gguf")
    assert found["general.architecture"] == "llama" and found["llama.context_length"] == 256
    named = {key.removeprefix("llama.rope.scaling."): value for key, value in found.items() if "rope.scaling" in key}
    assert named == keys
    config = json.loads((scaled / "config.json").read_text())
    assert found["llama.rope.freq_base"] == pytest.approx(config["rope_theta"], rel=1e-7)
    assert ("rope_freqs.weight" in {t.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}) == (
        method == "llama3"
    )
    back = from_gguf(tmp_path / "out.gguf", tmp_path / "back")
    assert np.abs(tiny.logits(back) - tiny.logits(scaled)).max() <= 2e-5  # ids far beyond the window of 64


@pytest.mark.parametrize(
    "over", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 32}, {"num_key_value_heads": 4}]
)
def test_other_shapes_compute_the_same(tmp_path: Path, over: dict[str, Any]) -> None:
    base = model(tmp_path / "base", **over)
    back = from_gguf(to_gguf(base, tmp_path / "out.gguf"), tmp_path / "back")
    assert np.abs(tiny.logits(back) - tiny.logits(base)).max() == 0


def test_mistral_is_a_llama_to_llama_cpp(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "mistral", sliding_window=None)
    back = from_gguf(to_gguf(base, tmp_path / "out.gguf"), tmp_path / "back")
    assert np.abs(tiny.logits(back) - tiny.logits(base)).max() == 0


TYPES = {"float32": ("F32", 0.0), "float16": ("F16", 2**-11), "bfloat16": ("BF16", 2**-8), "q8_0": ("Q8_0", 1 / 127)}


@pytest.mark.parametrize("dtype", TYPES)
def test_the_type_of_the_matrices(tmp_path: Path, dtype: str) -> None:
    """By the gguf package: matrices have the type that was asked for, vectors are float32, values are rounded once."""
    base = model(tmp_path / "base")
    to_gguf(base, tmp_path / "out.gguf", dtype=dtype)
    kind, step = TYPES[dtype]
    weights = mx.load(str(base / "model.safetensors"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if len(tensor.shape) == 1 else kind)
    stored = next(t for t in reader.tensors if t.name == "blk.1.attn_v.weight")
    want = np.array(weights["model.layers.1.self_attn.v_proj.weight"])
    got = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(want.shape)
    blocks = np.abs(want.reshape(-1, 32)).max(-1, keepdims=True) if kind == "Q8_0" else np.abs(want.reshape(-1, 32))
    assert (np.abs(got - want).reshape(-1, 32) <= step * blocks + 1e-12).all()
    assert from_gguf(tmp_path / "out.gguf", tmp_path / "back")


def test_the_stored_type_is_the_default(tmp_path: Path) -> None:
    settings = tiny.config()
    base = with_merges(tiny.write(tmp_path / "base", settings, tiny.weights(settings, dtype=mx.bfloat16)))
    found = fields(to_gguf(base, tmp_path / "out.gguf"))
    assert found["general.file_type"] == 32  # LLAMA_FTYPE_MOSTLY_BF16
    back = from_gguf(tmp_path / "out.gguf", tmp_path / "back", dtype="bfloat16")
    assert np.abs(tiny.logits(back) - tiny.logits(base)).max() == 0


def test_a_quantized_model_is_dequantized(tmp_path: Path) -> None:
    from mlx_linearard.convert.hf import from_hf, to_hf

    small = from_hf(model(tmp_path / "base"), tmp_path / "small", quantize=True, q_group_size=32)
    back = from_gguf(to_gguf(small, tmp_path / "out.gguf"), tmp_path / "back")
    plain = to_hf(small, tmp_path / "plain")
    assert np.abs(tiny.logits(back) - tiny.logits(plain)).max() == 0


def test_permute_is_the_inverse_of_unpermute() -> None:
    rows = np.arange(4 * 6 * 5).reshape(4 * 6, 5)
    assert (unpermute(np.array(permute(mx.array(rows), 4)), 4) == rows).all()
    assert not (np.array(permute(mx.array(rows), 4)) == rows).all()


def digits() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@pytest.mark.parametrize(("split", "name"), [(None, "gpt-2"), (digits, "smollm")])
def test_the_tokenizer_is_read_back(tmp_path: Path, split: Any, name: str) -> None:
    base = with_merges(tiny.write(tmp_path / "base", tiny.config(bos_token_id=1)), split and split())
    found = fields(to_gguf(base, tmp_path / "out.gguf"))
    assert found["tokenizer.ggml.pre"] == name and found["tokenizer.ggml.add_bos_token"] is True
    assert len(found["tokenizer.ggml.tokens"]) == tiny.VOCAB  # filled up to the embeddings
    back = from_gguf(tmp_path / "out.gguf", tmp_path / "back")
    one, other = (AutoTokenizer.from_pretrained(path) for path in (base, back))
    for text in ("the 1984 cats, naïve <s> café", "  \n\n x9y", "日本"):
        assert one.encode(text) == other.encode(text)
    assert other.chat_template == "{{ messages }}" and other.eos_token == "</s>"


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_read_back(tmp_path: Path, with_model: bool, prefix: bool) -> None:
    """From tokenizer.model with its scores, and from the tokenizer.json that transformers makes of it."""
    from mlx_linearard.convert.hf import from_hf

    raw = tiny.write(tmp_path / "raw", settings := tiny.config(vocab_size=448), tiny.weights(settings))
    (raw / "tokenizer.json").unlink()
    (raw / "tokenizer.model").write_bytes(sentencepieces.train("bpe", add_dummy_prefix=prefix))
    base = from_hf(raw, tmp_path / "base")
    if not with_model:
        (base / "tokenizer.model").unlink()
    found = fields(to_gguf(base, tmp_path / "out.gguf"))
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is prefix
    back = from_gguf(tmp_path / "out.gguf", tmp_path / "back")
    one, other = (AutoTokenizer.from_pretrained(path) for path in (base, back))
    for text in sentencepieces.TEXTS:
        assert one.encode(text) == other.encode(text), text


def test_what_is_not_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="olmo2 is not written to GGUF, only llama, mistral"):
        to_gguf(model(tmp_path / "olmo", "olmo2"), tmp_path / "out.gguf")
    odd = model(tmp_path / "odd")
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(UserError, match="splits text in a way that is not written"):
        to_gguf(with_merges(odd, split), tmp_path / "out.gguf")
    with pytest.raises(UserError, match=r"must end in \.gguf"):
        to_gguf(odd, tmp_path / "out.bin")
    config = json.loads((odd / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"mscale|does not compute|disagree|differ"):
        to_gguf(odd, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))


def test_weights_that_are_not_finite_leave_no_file(tmp_path: Path) -> None:
    settings = tiny.config()
    weights = tiny.weights(settings)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    base = with_merges(tiny.write(tmp_path / "base", settings, weights))
    with pytest.raises(UserError, match=r"up_proj\.weight does not fit in float16"):
        to_gguf(base, tmp_path / "out.gguf", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_command_writes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: acme/one\n---\n")
    assert convert(["to-gguf", str(base), str(tmp_path / "out.gguf"), "--dtype", "q8_0"]) == 0
    assert "out.gguf is ready" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists"):
        convert(["to-gguf", str(base), str(tmp_path / "out.gguf")])
    found = fields(tmp_path / "out.gguf")
    assert found["general.license"] == "mit" and found["general.base_model.0.repo_url"].endswith("/acme/one")
    assert origin_of(from_gguf(tmp_path / "out.gguf", tmp_path / "back")) == Origin(
        None, {"license": "mit", "language": ["en"]}
    )
