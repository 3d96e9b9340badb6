"""Adapters to PEFT and back: bit for bit, and refused if mlx-lm cannot express it."""

import json
import math

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_linearard.convert.peft import alpha, from_peft, to_peft
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

from mlx_linearard.errors import UserError

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def adapter(directory, base, *, rank=8, scale=2.0, layers=2, keys=QKV, dora=False, seed=0):
    """A random adapter in mlx-lm's format, and the logits of the model that carries it."""
    model, _ = load_model(base)
    model.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(keys)}
    linear_to_lora_layers(model, layers, parameters, use_dora=dora)
    random = np.random.default_rng(seed)
    held = {}
    for name, value in tree_flatten(model.parameters()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("lora_a", "lora_b"):
            held[name] = mx.array(random.normal(0, 0.15, value.shape).astype(np.float32))
        elif leaf == "m":
            held[name] = value * 1.25
    model.load_weights(list(held.items()), strict=False)
    model.eval()
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "adapters.safetensors"), held)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": parameters,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return held, np.array(model(mx.array(tiny.ids())))


def adapted(base, directory):
    model, _ = load_model(base)
    load_adapters(model, str(directory))
    model.eval()
    return np.array(model(mx.array(tiny.ids())))


# rank 64 is the model's width: every factor of q is square, and a missing transpose would load
CASES = [
    {"rank": 8},
    {"rank": 64},
    {"rank": 64, "scale": 2.3, "dora": True},
    {"rank": 4, "layers": 1},
    {"rank": 5, "scale": 1 / 3, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(tmp_path, case):
    base = tiny.write(tmp_path / "base")
    held, logits = adapter(tmp_path / "ours", base, **case)
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    back = from_peft(theirs, tmp_path / "back")
    found = mx.load(str(back / "adapters.safetensors"))
    assert found.keys() == held.keys()
    for name in held:
        assert mx.array_equal(found[name], held[name]), name
    scale = json.loads((back / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    assert scale == case.get("scale", 2.0)
    np.testing.assert_array_equal(adapted(base, back), logits)
    assert np.abs(logits - tiny.logits(base)).max() > 0.1
    assert tiny.files(to_peft(back, tmp_path / "again")) == tiny.files(theirs)


def test_what_peft_reads(tmp_path):
    held, _ = adapter(tmp_path / "ours", tiny.write(tmp_path / "base"), rank=64, layers=1)
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs", base_model="a/b")
    config = json.loads((theirs / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/b"
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (64, 128, [1])
    assert config["target_modules"] == ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    found = mx.load(str(theirs / "adapter_model.safetensors"))
    name = "model.layers.1.self_attn.q_proj"
    assert mx.array_equal(found[f"base_model.model.{name}.lora_A.weight"], held[f"{name}.lora_a"].T)
    assert mx.array_equal(found[f"base_model.model.{name}.lora_B.weight"], held[f"{name}.lora_b"].T)


def test_names_that_training_scripts_leave(tmp_path):
    held, _ = adapter(tmp_path / "ours", tiny.write(tmp_path / "base"))
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    path = theirs / "adapter_model.safetensors"
    renamed = {}
    for name, array in mx.load(str(path)).items():
        name = name.replace("base_model.model.", "base_model.model._orig_mod.module.")
        renamed[name.replace(".weight", ".default.weight")] = array
    mx.save_safetensors(str(path), renamed)
    found = mx.load(str(from_peft(theirs, tmp_path / "back") / "adapters.safetensors"))
    assert found.keys() == held.keys() and all(mx.array_equal(found[name], held[name]) for name in held)


@pytest.mark.parametrize("rank", [1, 3, 7, 64, 100])
@pytest.mark.parametrize("scale", [2.0, 0.1, 1 / 3, 20.0, 2.3])
def test_alpha_gives_the_scale_back(rank, scale):
    # exactly, or within the last bit where no float64 divided by the rank gives the scale (0.1 and 3)
    assert abs(alpha(scale, rank) / rank - scale) <= (0 if scale in (2.0, 20.0, 2.3) else math.ulp(scale))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3' adapter"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save replaces whole modules"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks of their own"),
        ({"alpha_pattern": {"q_proj": 4}}, "scales of their own"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
        ({"r": 16}, "says r = 16"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"use_dora": True}, "lora_a, lora_b, m of each module"),
    ],
)
def test_settings_that_mean_more_are_refused(tmp_path, change, said):
    adapter(tmp_path / "ours", tiny.write(tmp_path / "base"))
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=said):
        from_peft(theirs, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_rslora_and_weights_that_do_not_fit(tmp_path):
    adapter(tmp_path / "ours", tiny.write(tmp_path / "base"), rank=16)
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    path = theirs / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_rslora": True}))
    back = from_peft(theirs, tmp_path / "rs")
    assert json.loads((back / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 8.0
    weights = mx.load(str(theirs / "adapter_model.safetensors"))
    lost = sorted(weights)[0]
    mx.save_safetensors(str(theirs / "adapter_model.safetensors"), {k: v for k, v in weights.items() if k != lost})
    with pytest.raises(UserError, match="should hold lora_a, lora_b of each module: model"):
        from_peft(theirs, tmp_path / "back")
    mx.save_safetensors(str(theirs / "adapter_model.safetensors"), {**weights, "base_model.x.bias": weights[lost]})
    with pytest.raises(UserError, match=r"unexpected base_model\.x\.bias"):
        from_peft(theirs, tmp_path / "back")
    (theirs / "adapter_model.safetensors").unlink()
    (theirs / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled"):
        from_peft(theirs, tmp_path / "back")


FIRST_LAYERS = {
    "chosen layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    "a pattern": {"target_modules": r".*layers\.[01]\..*q_proj", "layers_to_transform": None},
    "excluded modules": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.[23]\..*"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]},
}


@pytest.mark.parametrize("change", FIRST_LAYERS.values(), ids=FIRST_LAYERS.keys())
def test_an_adapter_of_the_first_layers_stays_on_them(tmp_path, change):
    base = tiny.write(tmp_path / "base", tiny.config(num_hidden_layers=4))
    names = [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    _, logits = adapter(tmp_path / "ours", base, keys=names)
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    path = theirs / "adapter_config.json"
    config = {**json.loads(path.read_text()), "layers_to_transform": None, **change}
    path.write_text(json.dumps(config))
    np.testing.assert_array_equal(adapted(base, from_peft(theirs, tmp_path / "back")), logits)
    assert np.abs(logits - tiny.logits(base)).max() > 0.1


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_an_adapter_of_every_layer_keeps_short_keys(tmp_path, targets):
    adapter(tmp_path / "ours", tiny.write(tmp_path / "base"), keys=["self_attn.q_proj"])
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": targets}))
    config = json.loads((from_peft(theirs, tmp_path / "back") / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj"] and config["num_layers"] == 2


def test_embedding_adapters_have_the_names_that_peft_reads(tmp_path):
    base = tiny.write(tmp_path / "base")
    held, logits = adapter(tmp_path / "ours", base, rank=8, keys=["self_attn.q_proj", "model.embed_tokens"])
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs", base_model=str(base))
    found = mx.load(str(theirs / "adapter_model.safetensors"))
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    assert {key for key in found if "embed" in key} == {f"{name}A", f"{name}B"}
    # PEFT's formula: the rows of A^T, times B^T, times alpha / r
    ours = held["model.embed_tokens.lora_a"] @ held["model.embed_tokens.lora_b"]
    np.testing.assert_allclose(np.array(found[f"{name}A"].T @ found[f"{name}B"].T), np.array(ours), rtol=1e-6)
    back = from_peft(theirs, tmp_path / "back")
    np.testing.assert_array_equal(adapted(base, back), logits)


@pytest.mark.parametrize("case", ["tied", "unknown base", "dora"])
def test_embedding_adapters_that_peft_would_compute_differently_are_refused(tmp_path, case):
    settings = tiny.config(tie_word_embeddings=case == "tied")
    base = tiny.write(tmp_path / "base", settings)
    adapter(tmp_path / "ours", base, keys=["self_attn.q_proj", "model.embed_tokens"], dora=case == "dora")
    named = "owner/name" if case == "unknown base" else str(base)
    said = {"tied": "ties its output", "unknown base": "is unknown", "dora": "with DoRA"}[case]
    with pytest.raises(UserError, match=said):
        to_peft(tmp_path / "ours", tmp_path / "theirs", base_model=named)
    assert not (tmp_path / "theirs").exists()


def test_linear_names_of_an_embedding_are_refused(tmp_path):
    """PEFT ignores them, so an adapter that holds them computes something else there."""
    adapter(tmp_path / "ours", tiny.write(tmp_path / "base"))
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    path = theirs / "adapter_model.safetensors"
    extra = {f"base_model.model.model.embed_tokens.lora_{x}.weight": mx.zeros((8, 8)) for x in "AB"}
    mx.save_safetensors(str(path), {**mx.load(str(path)), **extra})
    with pytest.raises(UserError, match=r"unexpected base_model\.model\.model\.embed_tokens\.lora_A"):
        from_peft(theirs, tmp_path / "back")


def test_a_base_directory_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    base = tiny.write(tmp_path / "my-run" / "base")
    adapter(tmp_path / "ours", base)
    monkeypatch.chdir(tmp_path)
    theirs = to_peft("ours", "theirs", base_model="my-run/base")
    assert json.loads((theirs / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    back = from_peft("theirs", "back")
    assert json.loads((back / "adapter_config.json").read_text())["model"] == str(base)
    again = to_peft("back", "again")  # the recorded base, from any folder
    assert json.loads((again / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    hub = to_peft("ours", "hub", base_model="owner/name")
    assert json.loads((hub / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"


def test_a_quantized_base_is_said_to_need_to_hf(tmp_path):
    base = tiny.write(tmp_path / "base")
    adapter(tmp_path / "ours", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4, "group_size": 64}}))
    lines = []
    to_peft(tmp_path / "ours", tmp_path / "theirs", base_model=str(base), progress=lines.append)
    assert "to-hf" in lines[-1] and str(base) in lines[-1]


ODD = [None, True, -1, 1.5, math.nan, math.inf, 10**400, "x", "\ud800", [], [[]], {"a": 1}, "a" * 5000, "x\0y"]


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:12])
def test_odd_settings_are_one_line_or_harmless(tmp_path, odd):
    adapter(tmp_path / "ours", tiny.write(tmp_path / "base"))
    to_peft(tmp_path / "ours", tmp_path / "theirs")
    extra = {"ours": ["model"], "theirs": ["exclude_modules", "layers_to_transform", "rank_pattern", "use_rslora"]}
    for name, convert in (("ours", to_peft), ("theirs", from_peft)):
        path = tmp_path / name / "adapter_config.json"
        config = json.loads(path.read_text())
        for key in [*config, *extra[name]]:
            path.write_text(json.dumps({**config, key: odd}))
            try:
                convert(tmp_path / name, tmp_path / "out", overwrite=True)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 12000
