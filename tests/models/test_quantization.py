"""Models that mlx quantized layer by layer: read as stock mlx-lm reads them, or refused by name."""

import json

import converter_models as tiny
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_linearard.convert.hf import from_hf, to_hf
from mlx_lm.utils import load_model, quantize_model, save_model

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.plan import inspect_model
from mlx_linearard.errors import UserError
from mlx_linearard.export.fuse import write_fused
from mlx_linearard.models.directory import check_model_dir
from mlx_linearard.models.pair import load_pair
from mlx_linearard.models.quantization import Scheme, quantization_of

Q4, Q8, MXFP4 = (
    {"group_size": 32, "bits": 4},
    {"group_size": 32, "bits": 8},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
)
NVFP4, MXFP8 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}, {"group_size": 32, "bits": 8, "mode": "mxfp8"}

# the layers of the first settings, the first settings, the others, and the keys taken out of the config afterwards
MIXED = {
    "8 bits without a group size": ("q_proj", {"bits": 8, "group_size": 64}, {**Q4, "group_size": 64}, "group_size"),
    "8 bits without a name": ("v_proj", Q8, Q4, "v_proj"),
    "mxfp4 in the feed-forward": ("mlp", MXFP4, Q8, None),
    "mxfp4 in the attention": ("attn", MXFP4, Q8, None),
    "mxfp4 without a name": ("attn", MXFP4, Q8, "attn"),
    "nvfp4 in the attention": ("attn", NVFP4, Q4, None),
    "mxfp8 in the attention": ("attn", MXFP8, Q4, None),
    "attention not quantized": ("attn", False, Q4, None),
}


def quantized(place, where, first, others, without=None):
    """A tiny model quantized by mlx-lm itself."""
    source = tiny.write(place / "source")
    model, config = load_model(source)
    default = others or first
    model, config = quantize_model(
        model,
        config,
        default["group_size"],
        default["bits"],
        default.get("mode", "affine"),
        quant_predicate=lambda path, _: first if where in path else others,
    )
    for settings in (config["quantization"], config["quantization_config"]):
        for path in [path for path, own in settings.items() if isinstance(own, dict)]:
            settings[path] = {key: value for key, value in settings[path].items() if key != without}
            if without and without in path:
                del settings[path]
    target = place / "quantized"
    target.mkdir()
    for path in source.glob("tokenizer*"):
        (target / path.name).write_bytes(path.read_bytes())
    save_model(target, model)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("case", MIXED.values(), ids=MIXED.keys())
def test_mixed_quantization_converts(tmp_path, case):
    source = quantized(tmp_path, *case)
    logits = tiny.logits(source)
    np.testing.assert_array_equal(tiny.logits(from_hf(source, tmp_path / "mlx")), logits)
    plain = to_hf(source, tmp_path / "plain")
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    assert {a.dtype for a in mx.load(str(plain / "model.safetensors")).values()} == {mx.float32}
    assert np.abs(tiny.logits(plain) - logits).max() < 1e-4  # the same numbers, multiplied by another kernel


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", ["8 bits without a name", "mxfp4 in the attention", "nvfp4 in the attention"])
def test_mixed_quantization_trains_and_exports(tmp_path, case, kind):
    source = quantized(tmp_path, *MIXED[case])
    inspect_model(DistillConfig(model=str(source), data="x", output="y", fine_tune_type=kind), source)
    pair = load_pair(source, method="linear", factor=4.0, fine_tune_type=kind, lora_rank=4)
    tokens = mx.array(tiny.ids(40))
    gradient = nn.value_and_grad(pair.student, lambda model: model(tokens).square().mean())(pair.student)[1]
    assert all(np.isfinite(np.array(a)).all() for _, a in nn.utils.tree_flatten(gradient))
    mx.random.seed(3)
    pair.set_parameters(
        [{n: a + 0.1 * mx.random.normal(a.shape) for n, a in leaves.items()} for leaves in pair.parameters()]
    )
    pair.student.eval()
    trained = np.array(pair.student(tokens))
    write_fused(pair, tmp_path / "fused")
    assert np.abs(trained - np.array(pair.teacher(tokens))).max() > 0.1
    assert np.abs(trained - tiny.logits(tmp_path / "fused", np.array(tokens))).max() < 1e-3


def test_a_mixture_quantizes_to_the_end(tmp_path):
    """A fused 4-bit model holds q, k and v as floats."""
    source = quantized(tmp_path, "self_attn.q", False, Q4)
    whole = from_hf(source, tmp_path / "whole", quantize=True, q_bits=4, q_group_size=32)
    expected = quantized(tmp_path / "b", "nothing", False, Q4)
    np.testing.assert_array_equal(tiny.logits(whole), tiny.logits(expected))
    eight = from_hf(source, tmp_path / "eight", quantize=True, q_bits=8, q_group_size=32)
    schemes = check_model_dir(eight).quantized
    assert schemes["model.layers.0.self_attn.q_proj"] == Scheme(32, 8)
    assert schemes["model.layers.0.self_attn.k_proj"] == Scheme(32, 4)
    with pytest.raises(UserError, match="already quantized"):
        from_hf(whole, tmp_path / "again", quantize=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**Q4, "mode": "fp2"}, "mode 'fp2' is not read"),
        ({**Q4, "mode": ["affine"]}, "is not read"),
        (
            {**MXFP4, "group_size": 64},
            "groups of 64, mode 'mxfp4' is not read: mode 'mxfp4' has 4 bits and groups of 32",
        ),
        ({**Q4, "bits": 7}, "7 bits"),
        ({**Q4, "bits": True}, "True bits"),
        ({**Q4, "bits": "4"}, "'4' bits"),
        ({"bits": 4}, "needs bits and group_size"),
        ({**Q4, "lm_head": {"bits": 9}}, "lm_head: quantization of 9 bits"),
        ({**Q4, "lm_head": {"mode": "int4"}}, "lm_head: quantization of mode 'int4'"),
        ({**Q4, "lm_head": {**NVFP4, "quantize_input": True}}, "lm_head: quantization with quantize_input"),
        ({**Q4, "lm_head": {**NVFP4, "global_scale": True}}, "lm_head: quantization with global_scale"),
        ({**Q4, "zero_point": 3}, "quantization with zero_point"),
        ("4 bits", "must be a JSON object"),
    ],
)
def test_other_quantization_is_refused_by_name(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        quantization_of({"quantization": settings}, tmp_path / "config.json")
    source = quantized(tmp_path, "nothing", False, Q4)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization": settings}))
    with pytest.raises(UserError, match=said):
        check_model_dir(source)


def test_quantized_activations_are_refused(tmp_path):
    with pytest.raises(UserError, match="quantize_activations"):
        quantization_of({"quantization": Q4, "quantize_activations": True}, tmp_path)


def test_scales_of_another_mode_are_refused(tmp_path):
    source = quantized(tmp_path, "attn", MXFP4, Q8)
    config = json.loads((source / "config.json").read_text())
    config["quantization"]["model.layers.0.self_attn.q_proj"]["mode"] = "affine"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"q_proj"):
        check_model_dir(source)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dora_is_refused_where_mlx_lm_miscounts(tmp_path, bits):
    """Before the run, so --dry-run says it too: mlx-lm's DoRA takes 32 // bits values per word."""
    source = quantized(tmp_path, "self_attn.q", {"group_size": 32, "bits": bits}, {**Q4})

    def inspect(kind):
        config = DistillConfig(model=str(source), data="x", output="y", fine_tune_type=kind)
        return inspect_model(config, source)

    inspect("lora")
    with pytest.raises(UserError, match="full cannot train"):
        inspect("full")
    if bits in (2, 4, 8):
        inspect("dora")
        return
    with pytest.raises(UserError, match=rf"q_proj of {bits} bits.*use lora"):
        inspect("dora")
    with pytest.raises(UserError, match=rf"q_proj of {bits} bits"):
        load_pair(source, method="linear", factor=4.0, fine_tune_type="dora", lora_rank=4)
