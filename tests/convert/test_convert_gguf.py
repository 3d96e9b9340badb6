"""GGUF files: types against mlx's own reader, weights un-permuted, tokenizers, refusals."""

import json
import math
import struct

import converter_models as tiny
import gguf_files
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_linearard.convert.gguf import from_gguf, unpermute
from mlx_linearard.convert.gguf_file import Gguf
from mlx_lm.gguf import permute_weights
from transformers import AutoTokenizer

from mlx_linearard.errors import UserError
from mlx_linearard.rope import inverse_frequencies

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def metadata(**over):
    """The metadata of a llama GGUF of `tiny.config()`, with a byte-level BPE tokenizer."""
    tokenizer = json.loads(tiny.tokenizer().to_str())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokens += ["Ġt", "he", "Ġthe", *(f"[extra{i}]" for i in range(tiny.VOCAB - len(tokens) - 3))]
    base = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (tiny.VOCAB - 3),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
    }
    base.update(over)
    return {key: item for key, item in base.items() if item is not None}


def tensors(arrays, kind="F32"):
    """Hugging Face tensors under GGUF names, q and k permuted by mlx-lm's own exporter."""
    found = {}
    for name, array in arrays.items():
        if "q_proj" in name or "k_proj" in name:
            array = permute_weights(array, 4 if "q_proj" in name else 2)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        array = np.array(array)
        found[name] = (array, kind if array.ndim == 2 else "F32")
    return found


def write(tmp_path, kind="F32", **over):
    arrays = tiny.weights(tiny.config())
    return gguf_files.write(tmp_path / "model.gguf", metadata(**over), tensors(arrays, kind)), arrays


def test_a_float32_file_gives_back_the_model(tmp_path):
    path, arrays = write(tmp_path)
    ours = from_gguf(path, tmp_path / "ours")
    held = mx.load(str(ours / "model.safetensors"))
    assert held.keys() == arrays.keys()
    for name in arrays:
        assert mx.array_equal(held[name], arrays[name]), name
    reference = tiny.write(tmp_path / "reference", tiny.config(), arrays)
    np.testing.assert_array_equal(tiny.logits(ours), tiny.logits(reference))
    config = json.loads((ours / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_is_read_as_mlx_reads_it(tmp_path, kind):
    path, arrays = write(tmp_path, kind)
    file = Gguf(path)
    theirs = mx.load(str(path))
    for name, entry in file.tensors.items():
        ours = file.read(name)
        assert ours.dtype == np.float32 and ours.shape == entry.shape
        stem = name.removesuffix(".weight")
        if entry.kind.startswith("Q"):
            bits = int(entry.kind[1])
            parts = (theirs[f"{stem}.{leaf}"] for leaf in ("weight", "scales", "biases"))
            weight, scales, biases = parts
            expected = mx.dequantize(
                weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits
            )
        elif entry.kind == "BF16":  # mlx's reader has none; the top half of a float32
            expected = np.frombuffer(gguf_files.encode(file.read(name), "F32"), np.uint32) >> 16 << 16
            expected = mx.array(expected.view(np.float32).reshape(entry.shape))
        else:
            expected = theirs[name].astype(mx.float32)
        # mlx stores Q4_0 and Q8_0 with a float16 bias of -8 d or -128 d, whose rounding is theirs
        np.testing.assert_allclose(ours, np.array(expected), rtol=1e-3, atol=2e-3)
    if kind == "F32":
        return
    source = tensors(arrays)["blk.1.ffn_down.weight"][0]
    steps = {"F16": 2**-11, "BF16": 2**-7, "Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 2 / 15}
    worst = np.abs(file.read("blk.1.ffn_down.weight") - source).max()
    assert 0 < worst <= steps[kind] * np.abs(source).max()


def test_the_natural_dtype(tmp_path):
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16"), ("Q4_1", "float16"), ("F32", "float32")):
        ours = from_gguf(write(tmp_path, kind)[0], tmp_path / kind)
        assert json.loads((ours / "config.json").read_text())["torch_dtype"] == dtype
        assert {str(a.dtype) for a in mx.load(str(ours / "model.safetensors")).values()} == {f"mlx.core.{dtype}"}


@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_unpermute_undoes_the_exporter(heads, half, width):
    rows = mx.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    np.testing.assert_array_equal(unpermute(np.array(permute_weights(rows, heads)), heads), np.array(rows))


def test_the_tokenizer_and_chat_template(tmp_path):
    ours = from_gguf(write(tmp_path)[0], tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(ours)
    assert tokenizer.tokenize("of the 2048") == ["o", "f", "Ġthe", "Ġ", "2", "0", "4", "8"]
    assert tokenizer.encode("<s>a</s>") == [1, tokenizer.convert_tokens_to_ids("a"), 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    for text in ("  two  spaces\n\n", "naïve 日本 🤗", "tab\t1234567890"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<s>hi</s>"
    with_bos = from_gguf(write(tmp_path, **{"tokenizer.ggml.add_bos_token": True})[0], tmp_path / "bos")
    assert AutoTokenizer.from_pretrained(with_bos).encode("a")[0] == 1


def test_llama_31_factors_become_its_scaling(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny.config(max_position_embeddings=131072, rope_theta=500000.0)
    native = inverse_frequencies(config)["full_attention"]
    factors = native / inverse_frequencies({**config, "rope_scaling": scaling})["full_attention"]
    over = {"llama.context_length": 131072, "llama.rope.freq_base": 500000.0}
    found = tensors(tiny.weights(tiny.config()))
    found["rope_freqs.weight"] = (factors.astype(np.float32), "F32")
    path = gguf_files.write(tmp_path / "a.gguf", metadata(**over), found)
    config = json.loads((from_gguf(path, tmp_path / "ours") / "config.json").read_text())
    assert config["rope_scaling"] == {"type": "llama3", **scaling}
    found["rope_freqs.weight"] = (np.linspace(1, 3, 8, dtype=np.float32), "F32")
    path = gguf_files.write(tmp_path / "b.gguf", metadata(**over), found)
    with pytest.raises(UserError, match="not Llama"):
        from_gguf(path, tmp_path / "other")


def test_linear_and_yarn_scalings_are_kept(tmp_path):
    over = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    over["llama.rope.scaling.original_context_length"] = 16
    ours = from_gguf(write(tmp_path, **over)[0], tmp_path / "yarn")
    scaling = json.loads((ours / "config.json").read_text())["rope_scaling"]
    assert scaling == {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2'; only llama"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "rotates 8 of 16"),
        ({"llama.attention.sliding_window": 32}, "sliding window of 32"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not converted"),
        ({"llama.embedding_length": 0}, "embedding_length must be a positive integer"),
        ({"llama.block_count": None}, "block_count must be"),
        ({"llama.block_count": 3}, "missing model.layers.2.input_layernorm.weight; missing"),
        ({"llama.feed_forward_length": 64}, r"mlp.down_proj.weight is \(64, 96\), not \(64, 64\)"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "must be a positive number"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.pre": "falcon"}, "splits text by 'falcon'"),
        ({"tokenizer.ggml.merges": ["Ġ t", "no such"]}, "its tokenizer is damaged"),
        ({"tokenizer.ggml.tokens": ["a"] * tiny.VOCAB}, "names a token twice"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "must be an id below"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "does not hold 272 numbers"),
        ({"llama.rope.mystery": 1.0}, r"has llama\.rope\.mystery, which the conversion does not know"),
        ({"llama.rope.dimension_sections": [4, 4]}, r"llama\.rope\.dimension_sections"),
        ({"llama.rope.scaling.mystery": 1}, r"llama\.rope\.scaling\.mystery"),
        ({"llama.attention.temperature_scale": 0.1}, r"llama\.attention\.temperature_scale"),
        ({"llama.attention.layer_norm_epsilon": 1e-5}, r"llama\.attention\.layer_norm_epsilon"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor is 0\.5, which"),
        ({"llama.rope.scaling.yarn_attn_factor": 1.25}, r"yarn_attn_factor is 1\.25, which"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.5}, r"yarn_log_multiplier is 0\.5, which"),
        ({"llama.rope.scaling.attn_factor": 2.0}, r"attn_factor is 2\.0, which"),
        ({"llama.rope.scaling.attn_factor": "two"}, "attn_factor is 'two', which"),
        ({"llama.rope.scaling.yarn_ext_factor": math.nan}, "yarn_ext_factor is nan"),
        ({"llama.attention.causal": False}, "attention.causal is False"),
        ({"llama.attention.clamp_kqv": 8.0}, r"clamp_kqv is 8\.0"),
        ({"llama.attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"llama.attention.scale": [0.25, 0.25]}, "attention.scale must be a positive number"),
        ({"llama.attention.value_length": 8}, "values of 8 and keys of 16"),
        ({"llama.logit_scale": 0.25}, "logit_scale is 0.25"),
        ({"llama.attention.head_count_kv": 3}, "4 heads of 16 dimensions in 3 groups"),
        ({"llama.rope.scaling.type": 2}, "type must be a string, not 2"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": "four"}, "must be a positive number"),
        ({"split.count": 2, "split.no": 0}, "one of 2 parts of a split model"),
        ({"general.architecture": ["llama", "llama"]}, "general.architecture must be a string"),
        ({"tokenizer.ggml.model": ["llama"]}, "only gpt2 and llama"),
        ({"tokenizer.ggml.pre": 5}, "splits text by 5"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "adds a bos token"),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": None}, "adds a eos token"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "must be true or false"),
        ({"tokenizer.ggml.eot_token_id": 272}, "eot_token_id must be an id below 272"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is not a chat template"),
        ({"tokenizer.chat_template.../x": "evil"}, "is not a chat template"),
        (
            {
                "tokenizer.ggml.tokens": [f"t{i}" for i in range(300)],
                "tokenizer.ggml.merges": None,
                "tokenizer.ggml.token_type": None,
            },
            "300 tokens, but embeddings for only 272",
        ),
    ],
)
def test_refused_by_name(tmp_path, over, said):
    path, _ = write(tmp_path, **over)
    with pytest.raises(UserError, match=said):
        from_gguf(path, tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def rope_scaling(path):
    return json.loads((path / "config.json").read_text())["rope_scaling"]


def test_yarn_keeps_its_betas(tmp_path):
    over = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    over |= {"llama.rope.scaling.original_context_length": 16, "llama.rope.scaling.finetuned": True}
    over |= {"llama.rope.scaling.yarn_beta_fast": 4.0, "llama.rope.scaling.yarn_beta_slow": 0.5}
    over |= {"llama.rope.scaling.yarn_ext_factor": 1.0, "llama.rope.scaling.yarn_attn_factor": 1.0}
    over |= {"llama.rope.scaling.yarn_log_multiplier": 0.0, "llama.attention.scale": 0.25}
    scaling = rope_scaling(from_gguf(write(tmp_path, **over)[0], tmp_path / "ours"))
    assert (scaling["rope_type"], scaling["beta_fast"], scaling["beta_slow"]) == ("yarn", 4.0, 0.5)


def test_a_factor_without_a_type_scales_linearly_as_in_llama_cpp(tmp_path):
    for number, over in enumerate(({"llama.rope.scaling.factor": 4.0}, {"llama.rope.scale_linear": 4.0})):
        ours = from_gguf(write(tmp_path, **over)[0], tmp_path / str(number))
        assert rope_scaling(ours)["rope_type"] == "linear" and rope_scaling(ours)["factor"] == 4.0
    over = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert not rope_scaling(from_gguf(write(tmp_path, **over)[0], tmp_path / "none"))


def test_a_file_as_llama_quantize_writes_it(tmp_path):
    """Q4_0 with its output in Q6_K. A block has 256 values, so the model is 256 wide."""
    settings = tiny.config(hidden_size=256, num_hidden_layers=1)
    found = tensors(tiny.weights(settings), "Q4_0")
    found["output.weight"] = (found["output.weight"][0], "Q6_K")
    over = {"llama.embedding_length": 256, "llama.block_count": 1, "llama.attention.key_length": 16}
    ours = from_gguf(gguf_files.write(tmp_path / "a.gguf", metadata(**over), found), tmp_path / "ours")
    held = mx.load(str(ours / "model.safetensors"))
    assert held["lm_head.weight"].shape == (tiny.VOCAB, 256) and held["lm_head.weight"].dtype == mx.float16


def generation(path):
    return json.loads((path / "generation_config.json").read_text()).get("eos_token_id")


def test_generation_stops_at_the_end_of_a_turn(tmp_path):
    from mlx_lm import load

    over = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    ours = from_gguf(write(tmp_path, **over)[0], tmp_path / "ours")
    assert generation(ours) == [2, 5, 6]
    assert load(str(ours))[1].eos_token_ids == {2, 5, 6}
    tokens = metadata()["tokenizer.ggml.tokens"]
    tokens[-1] = "<|eot_id|>"
    for kind, ends in ((3, [2, 271]), (1, 2)):  # found by its name, if it is a control token
        types = [3, 3, 3] + [1] * (tiny.VOCAB - 4) + [kind]
        over = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        assert generation(from_gguf(write(tmp_path, **over)[0], tmp_path / f"kind{kind}")) == ends
    assert generation(from_gguf(write(tmp_path)[0], tmp_path / "one")) == 2


def test_named_chat_templates_are_kept(tmp_path):
    over = {"tokenizer.chat_template.tool_use": "TOOLS {{ messages }}", "tokenizer.chat_templates": ["tool_use"]}
    ours = from_gguf(write(tmp_path, **over)[0], tmp_path / "ours")
    assert set(AutoTokenizer.from_pretrained(ours).chat_template) == {"default", "tool_use"}


def test_types_and_tensors_we_do_not_read(tmp_path):
    found = tensors(tiny.weights(tiny.config()))
    found["blk.0.ffn_up.weight"] = (np.zeros((96, 256), np.float32), "IQ3_S")
    path = gguf_files.write(tmp_path / "k.gguf", metadata(), found)
    with pytest.raises(UserError, match="holds IQ3_S tensors; only F32, F16, BF16, Q8_0, Q4_0, Q4_1"):
        from_gguf(path, tmp_path / "ours")
    found = tensors(tiny.weights(tiny.config()))
    found["blk.0.mystery.weight"] = found["blk.0.ffn_up.weight"]
    path = gguf_files.write(tmp_path / "m.gguf", metadata(), found)
    with pytest.raises(UserError, match=r"llama does not have: blk\.0\.mystery"):
        from_gguf(path, tmp_path / "ours")


def packed(kind, layout, *numbers):
    return gguf_files.Raw(struct.pack(f"<I{layout}", kind, *numbers))


ODD = {
    "a 64-bit count": packed(10, "Q", 2**64 - 1),
    "a negative number": packed(11, "q", -1),
    "infinity": packed(12, "d", math.inf),
    "a list": [1, 2],
    "a list of texts": ["a", "b"],
    "an empty list": packed(9, "IQ", 6, 0),
    "a list of lists": gguf_files.Raw(struct.pack("<IIQIQ", 9, 9, 1, 5, 0)),
    "an absurd list": packed(9, "IQ", 8, 2**63),
    "half of a surrogate pair": gguf_files.Raw(struct.pack("<IQ", 8, 3) + b"\xed\xa0\x80"),
    "a text": "x" * 5000,
    "a truth value": True,
    "an unknown type": packed(99, ""),
}
KEYS = [
    "general.architecture",
    "general.alignment",
    "llama.block_count",
    "llama.attention.head_count",
    "llama.attention.scale",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "split.count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template",
]


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_a_value_of_another_kind_is_one_line_or_harmless(tmp_path, odd):
    for key in KEYS:
        path, _ = write(tmp_path, **{key: odd})
        try:
            from_gguf(path, tmp_path / key)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
            assert not (tmp_path / key).exists()


def test_a_file_that_names_a_key_twice_or_a_long_name_is_damaged(tmp_path):
    path, _ = write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama.rope.freq_base", b"llama.context_length"))
    with pytest.raises(UserError, match=r"'llama\.context_length' twice"):
        from_gguf(path, tmp_path / "ours")
    path, _ = write(tmp_path, **{"k" * 2000: 1})
    with pytest.raises(UserError, match="a metadata value has a name of 2000 characters"):
        from_gguf(path, tmp_path / "ours")


def test_cut_anywhere_it_is_refused(tmp_path):
    path, _ = write(tmp_path, "Q4_1")
    whole = path.read_bytes()
    for length in [0, 3, 4, 8, 23, 24, *range(30, len(whole), 4999), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"truncated|not a GGUF|damaged"):
            from_gguf(path, tmp_path / "ours")


@given(places=st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_damaged_headers_raise_nothing_but_our_error(tmp_path_factory, places):
    root = tmp_path_factory.getbasetemp() / "gguf"
    if not root.exists():
        root.mkdir()
        write(root)
    data = bytearray((root / "model.gguf").read_bytes())
    for place, byte in places:
        data[place] = byte
    (root / "mutant.gguf").write_bytes(data)
    try:
        made = from_gguf(root / "mutant.gguf", root / "out", overwrite=True)
    except UserError:
        return
    assert (made / "config.json").is_file()
