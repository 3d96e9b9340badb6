"""Hostile and damaged model directories: one UserError and no output; and mutations of a valid directory."""

import json
import os
import pickle
import shutil
from pathlib import Path

import converter_models as tiny
import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_linearard.convert.hf import from_hf

from mlx_linearard.errors import UserError
from mlx_linearard.models.directory import check_model_dir
from mlx_linearard.models.weights import read_header

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path):
    return tiny.write(tmp_path / "source", shards=2)


def refused(source, said):
    """Both the check and the conversion refuse, and no output is left."""
    with pytest.raises(UserError, match=said) as caught:
        check_model_dir(source)
    with pytest.raises(UserError):
        from_hf(source, source.parent / "out")
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    return str(caught.value)


def edit_index(source, change):
    path = source / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_header(path, change, keep_length=False):
    """Rewrite a safetensors header; the data stay where they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def first(header):
    return min(header, key=lambda name: (header[name] or {}).get("data_offsets", [1 << 60])[0])


def test_a_sound_directory_passes(source):
    checked = check_model_dir(source, finite=True)
    assert checked.config["rope_parameters"]["rope_theta"] == 10000.0
    assert checked.arrays.keys() == checked.stored.keys()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_names_no_file_elsewhere(source, name):
    shutil.copy(source / SHARD, source.parent.parent / "secret.safetensors")
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    refused(source, "not a file of its own directory")


def test_shards_missing_truncated_and_disagreeing(source):
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[:-10])
    refused(source, "truncated: .* download it again")
    (source / SHARD).write_bytes(data[:5])
    refused(source, "header too small")
    (source / SHARD).write_bytes(data + b"x")
    refused(source, "file not fully covered")
    (source / SHARD).unlink()
    refused(source, f"{SHARD} is missing although")
    (source / SHARD).write_bytes(data)
    edit_index(source, lambda weight_map: weight_map.pop("model.norm.weight"))
    refused(source, r"model\.norm\.weight is not in the index")
    (source / INDEX).unlink()
    check_model_dir(source)
    shutil.copy(source / SHARD, source / "model-00003.safetensors")
    refused(source, r"model-00003\.safetensors beside")


def test_a_header_length_beyond_the_file(source):
    data = (source / SHARD).read_bytes()
    for length in (len(data), 1 << 62, 0, 1):
        (source / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
        refused(source, "header too large|invalid header length|invalid JSON in header")
    (source / SHARD).write_bytes((20).to_bytes(8, "little") + data[8:])
    refused(source, "invalid JSON in header")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.update(data_offsets=[0, 1 << 40]), "invalid (shape|offset)"),
        (lambda e: e.update(data_offsets=[-8, e["data_offsets"][1]]), "expected usize"),
        (lambda e: e.update(data_offsets=[e["data_offsets"][1], e["data_offsets"][0]]), "invalid (shape|offset)"),
        (lambda e: e.update(data_offsets=[n + 4 for n in e["data_offsets"]]), "invalid offset"),
        (lambda e: e.update(data_offsets=[0.5, 2]), "expected usize"),
        (lambda e: e.update(data_offsets=[0]), "invalid length 1"),
        (lambda e: e.update(shape=[1 << 61, 1 << 61]), "overflow"),
        (lambda e: e.update(shape=[-1]), "expected usize"),
        (lambda e: e.update(shape="large"), "expected a sequence"),
        (
            lambda e: e.update(dtype="F8_E4M3", shape=[e["data_offsets"][1]], data_offsets=[0, e["data_offsets"][1]]),
            "'F8_E4M3'",
        ),
        (lambda e: e.update(dtype="BF16"), "invalid shape"),
        (lambda e: e.pop("dtype"), "missing field `dtype`"),
    ],
)
def test_headers_that_do_not_fit_the_file(source, change, said):
    edit_header(source / SHARD, lambda header: change(header[first(header)]))
    refused(source, said)


def test_two_tensors_may_not_share_bytes(source):
    def share(header):
        names = [name for name in header if name.endswith("input_layernorm.weight")]
        same = [name for name in header if name.endswith("post_attention_layernorm.weight")]
        header[names[0]]["data_offsets"] = header[same[0]]["data_offsets"]

    edit_header(source / SHARD, share)
    refused(source, "invalid offset")


def test_all_bad_tensors_are_named_at_once(tmp_path):
    stored = tiny.weights(tiny.config())
    del stored["model.layers.0.self_attn.q_proj.weight"]
    del stored["model.norm.weight"]
    stored["model.layers.7.odd"] = mx.zeros((2,))
    stored["lm_head.weight"] = stored["lm_head.weight"][:, :32]
    said = refused(tiny.write(tmp_path / "source", tiny.config(), stored), "does not fit its config")
    for name in (
        "missing model.layers.0.self_attn.q_proj.weight",
        "missing model.norm.weight",
        "unexpected model.layers.7.odd",
        "lm_head.weight is (272, 32), not (272, 64)",
    ):
        assert name in said


def test_weights_that_are_not_finite(tmp_path):
    stored = tiny.weights(tiny.config())
    for name in ("model.norm.weight", "lm_head.weight"):
        stored[name] = stored[name] * float("inf")
    source = tiny.write(tmp_path / "source", tiny.config(), stored)
    with pytest.raises(UserError, match=r"not finite: lm_head\.weight; model\.norm\.weight"):
        check_model_dir(source, finite=True)


def test_pickles_are_never_opened(tmp_path):
    source = tiny.write(tmp_path / "source")
    (source / "model.safetensors").unlink()
    trap = tmp_path.parent / f"{tmp_path.name}-trap"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(source, "only pickled weights")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("\xff\xfe", "model_type|not valid JSON|cannot be read"),
        (json.dumps({**tiny.config(), "model_type": "mamba"}), "'mamba'"),
        (json.dumps({**tiny.config(), "model_type": "../../evil"}), "not among"),
        (json.dumps({**tiny.config(), "model_type": ["llama"]}), "no model_type"),
        (json.dumps({**tiny.config(), "model_file": "evil.py"}), "run no code"),
        (json.dumps({**tiny.config(), "num_hidden_layers": 10**9}), "num_hidden_layers"),
        (json.dumps({**tiny.config(), "num_hidden_layers": 4000}), "layers, but the weights"),
        (json.dumps({**tiny.config(), "num_attention_heads": 0}), "num_attention_heads"),
        (json.dumps({**tiny.config(), "rope_scaling": 3}), "rope_scaling must be"),
        (json.dumps({**tiny.config(), "quantization_config": {"quant_method": "gptq"}}), "'gptq'"),
        (json.dumps({**tiny.config(), "quantization": {"bits": 4, "group_size": 7}}), "groups of 7"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_configs_that_are_refused(source, text, said):
    (source / "config.json").write_text(text, encoding="latin-1")
    refused(source, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'silu' only, and the config has 'gelu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "layer_types"),
        ({"quantize_activations": True}, "quantize_activations"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_settings_that_mlx_lm_ignores_are_refused_by_name(source, changes, said):
    (source / "config.json").write_text(json.dumps({**tiny.config(), **changes}))
    refused(source, said)


def test_no_code_of_the_model_runs(source):
    marker = source.parent.parent / f"{source.parent.name}-ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    settings_ = {**tiny.config(), "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (source / "config.json").write_text(json.dumps(settings_))
    from_hf(source, source.parent / "out")
    assert not marker.exists()
    assert "auto_map" not in json.loads((source.parent / "out" / "config.json").read_text())
    assert not (source.parent / "out" / "evil.py").exists()


def test_a_model_without_a_tokenizer(source):
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    refused(source, "tokenizer.json is damaged")
    (source / "tokenizer.json").unlink()
    refused(source, "no tokenizer")
    (source / "tokenizer.model").write_bytes(b"\x0a\xff")
    refused(source, "not a sentencepiece model")


def test_a_header_is_read_as_written(source):
    tensors, metadata = read_header(source / SHARD)
    arrays = mx.load(str(source / SHARD))
    assert tensors.keys() == arrays.keys() and isinstance(metadata, dict)
    for name, tensor in tensors.items():
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            assert file.read(tensor.nbytes) == bytes(memoryview(arrays[name]))


# -- mutations --


def _sources(root):
    sources = root / "one", root / "two"
    if not sources[0].exists():
        tiny.write(sources[0])
        tiny.write(sources[1], shards=2)
    return sources


_places = st.one_of(st.integers(0, 600), st.integers(0, 1 << 20))
_edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "delete", "digit", "swap"]),
        _places,
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def mutate(data, edits):
    data = bytearray(data)
    for kind, place, value in edits:
        at = place % max(len(data), 1)
        if kind == "set":
            data[at : at + len(value)] = value
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = value
        elif kind == "delete":
            del data[at : at + len(value)]
        elif kind == "swap":
            data[at : at + 2] = data[at : at + 2][::-1]
        else:  # another digit at the next digit, which keeps the JSON valid but wrong
            digits = (i for i in range(at, len(data)) if data[i : i + 1].isdigit())
            where = next(digits, None)
            if where is not None:
                data[where] = ord("0") + value[0] % 10
    return bytes(data)


def check_mutant(root, which, file, edits):
    """A mutated directory converts, or is refused with a UserError; nothing else."""
    source = _sources(root)[which]
    names = sorted(path.name for path in source.iterdir())
    name = names[file % len(names)]
    mutant = root / "mutant"
    shutil.rmtree(mutant, ignore_errors=True)
    mutant.mkdir()
    for other in names:
        if other != name:
            os.link(source / other, mutant / other)
    (mutant / name).write_bytes(mutate((source / name).read_bytes(), edits))
    target = root / "out"
    shutil.rmtree(target, ignore_errors=True)
    try:
        from_hf(mutant, target)
        converted = True
    except UserError as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 4000
        converted = False
    assert target.exists() == converted
    assert {path.name for path in root.iterdir()} <= {"one", "two", "mutant", "out"}


_mutants = given(which=st.integers(0, 1), file=st.integers(0, 20), edits=_edits)
_quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@_mutants
@settings(max_examples=100, deadline=None, suppress_health_check=_quiet)
def test_a_hundred_mutations(tmp_path_factory, which, file, edits):
    check_mutant(_root(tmp_path_factory, "hundred"), which, file, edits)


@pytest.mark.slow
@_mutants
@settings(max_examples=2000, deadline=None, suppress_health_check=_quiet)
def test_two_thousand_mutations(tmp_path_factory, which, file, edits):
    check_mutant(_root(tmp_path_factory, "thousands"), which, file, edits)


def _root(factory, name):
    root = factory.getbasetemp() / name
    root.mkdir(exist_ok=True)
    return root


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bos_token_id", "x"), ("bos_token_id", [1]), ("bos_token_id", True), ("eos_token_id", {}),
        ("eos_token_id", [1, "x"]), ("pad_token_id", 1.5), ("max_position_embeddings", 0),
        ("max_position_embeddings", -1), ("max_position_embeddings", "8"), ("max_position_embeddings", {}),
    ],
)  # fmt: skip
def test_windows_and_token_ids_of_a_wrong_type_are_refused_by_name(source, key, value):
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=f"config.json: .*{key} must be"):
        check_model_dir(source)
