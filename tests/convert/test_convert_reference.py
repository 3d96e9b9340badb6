"""The real transformers and peft on torch, in float32, below and beyond the native window."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from launched import hears_ctrl_c
from mlx_linearard.convert.hf import from_hf, scale, to_hf
from mlx_linearard.convert.peft import to_peft
from mlx_linearard.convert.verify import torch_logits
from mlx_lm.utils import _get_classes
from test_convert_peft import CASES, adapter

from mlx_linearard.export.fuse import write_fused
from mlx_linearard.models.pair import load_pair
from mlx_linearard.rope import FAMILIES, METHODS, attention_factor, inverse_frequencies, scale_rope

pytestmark = pytest.mark.slow

CLOSE = 1e-4  # absolute, on logits of a few units
EXTRA = {
    "olmo3": {"sliding_window": 32, "num_hidden_layers": 4},
    "gemma3_text": {"sliding_window": 32, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
KINDS = (*tiny.FAMILIES, "olmo3", "gemma3_text", "granite", "smollm3")


def in_memory(native, method):
    """Logits of the model that a run holds in memory: its student, or its teacher if nothing is scaled."""
    pair = load_pair(native, method=method or "ntk", factor=4.0, lora_rank=4)
    return np.array((pair.student if method else pair.teacher)(mx.array(tiny.ids())))


def torch_frequencies(directory):
    """The inverse frequencies and attention factor of transformers' own rotary embedding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rotary = model.model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return {"full_attention": rotary.inv_freq.numpy()}, rotary.attention_scaling
    kinds = ("full_attention", "sliding_attention")
    found = {kind: getattr(rotary, f"{kind}_inv_freq").numpy() for kind in kinds}
    return found, rotary.full_attention_attention_scaling


# What is not here is refused, which test_rope.py checks.
HONOURED = [(kind, m) for kind in KINDS for m in (None, *METHODS) if m is None or m in FAMILIES[kind].methods]


@pytest.mark.parametrize(("kind", "method"), HONOURED)
def test_three_ways_to_the_same_logits(tmp_path, kind, method):
    settings = tiny.config(kind, **EXTRA.get(kind, {}))
    arrays = tiny.weights(settings)
    ours = from_hf(tiny.write(tmp_path / "source", settings, arrays, shards=2), tmp_path / "native")
    if method is not None:
        ours = scale(ours, tmp_path / "ours", method=method, factor=4.0)
    theirs = to_hf(ours, tmp_path / "theirs")
    config = json.loads((ours / "config.json").read_text())
    reference = torch_logits(theirs, tiny.ids())
    for logits in (tiny.logits(ours), in_memory(tmp_path / "native", method)):
        apart = np.abs(logits - reference)[0].max(axis=-1)
        assert apart[: tiny.WINDOW].max() < CLOSE
        assert apart[tiny.WINDOW :].max() < CLOSE
    if method is not None:  # the comparison is worth something: scaling changes the logits
        assert np.abs(reference - tiny.logits(tmp_path / "native")).max() > 100 * CLOSE
    frequencies, factor = torch_frequencies(theirs)
    for layers, expected in inverse_frequencies(config).items():
        np.testing.assert_allclose(frequencies[layers], expected, rtol=0, atol=1e-6)
    assert factor == pytest.approx(attention_factor(config), abs=1e-6)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
@pytest.mark.parametrize(("adapter", "bits"), [("lora", None), ("dora", None), ("full", None), ("lora", 4)])
def test_a_trained_student_is_the_same_in_transformers(tmp_path, kind, adapter, bits):
    """Changed adapters: the student in memory, its fused export in mlx-lm, and the same export on torch."""
    settings = tiny.config(kind, **EXTRA.get(kind, {}))
    source = tiny.write(tmp_path / "source", settings)
    native = from_hf(source, tmp_path / "native", quantize=bits is not None, q_bits=bits or 4, q_group_size=32)
    pair = load_pair(native, method="linear", factor=4.0, fine_tune_type=adapter, lora_rank=4)
    before = np.array(pair.student(mx.array(tiny.ids())))
    mx.random.seed(3)
    pair.set_parameters(
        [{n: a + 0.1 * mx.random.normal(a.shape) for n, a in leaves.items()} for leaves in pair.parameters()]
    )
    student = np.array(pair.student(mx.array(tiny.ids())))
    write_fused(pair, tmp_path / "fused")
    assert np.abs(student - before).max() > 100 * CLOSE
    assert np.abs(student - tiny.logits(tmp_path / "fused")).max() < CLOSE
    theirs = torch_logits(to_hf(tmp_path / "fused", tmp_path / "theirs"), tiny.ids())
    assert np.abs(student - theirs).max() < CLOSE


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_what_transformers_5_saves_is_read(tmp_path, kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = scale_rope(tiny.config(kind, **EXTRA.get(kind, {})), "yarn", 4.0)
    torch.manual_seed(0)
    del settings["model_type"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float()
    model.save_pretrained(tmp_path / "source")
    saved = json.loads((tmp_path / "source" / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_scaling" not in saved
    (tmp_path / "source" / "tokenizer.json").write_text(tiny.tokenizer().to_str())
    ours = from_hf(tmp_path / "source", tmp_path / "ours")
    apart = np.abs(tiny.logits(ours) - torch_logits(tmp_path / "source", tiny.ids())).max()
    assert apart < CLOSE


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_on_the_scaled_base(tmp_path, case):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    native = from_hf(tiny.write(tmp_path / "source"), tmp_path / "native")
    base = scale(native, tmp_path / "base", method="linear", factor=4.0)
    _, ours = adapter(tmp_path / "ours", base, **case)
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(to_hf(base, tmp_path / "hf"), dtype=torch.float32)
    model = PeftModel.from_pretrained(model, theirs).eval()
    with torch.no_grad():
        logits = model(torch.tensor(tiny.ids())).logits.numpy()
    assert np.abs(ours - logits).max() < CLOSE
    assert np.abs(ours - tiny.logits(base)).max() > 100 * CLOSE


def test_an_adapter_that_peft_saved(tmp_path):
    """As the authors' training script saves one: LoRA on q_proj, k_proj and v_proj of every layer."""
    import torch
    from mlx_linearard.convert.peft import from_peft
    from peft import LoraConfig, get_peft_model
    from test_convert_peft import adapted
    from transformers import AutoModelForCausalLM

    base = from_hf(tiny.write(tmp_path / "source"), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(to_hf(base, tmp_path / "hf"), dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj"]
    config = LoraConfig(r=64, lora_alpha=128, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
        logits = model(torch.tensor(tiny.ids())).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    ours = adapted(base, from_peft(tmp_path / "theirs", tmp_path / "ours"))
    assert np.abs(ours - logits).max() < CLOSE


PEAK = """
import resource, sys
from mlx_linearard.convert.hf import from_hf
from_hf(sys.argv[1], sys.argv[2], dtype=sys.argv[3] or None, shard_bytes=150 << 20)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak if sys.platform == "darwin" else peak * 1024)
"""


def large(directory, layers):
    """An unquantized model with 0.14 GB for each layer and 0.26 GB beside them, random, in shards of 0.15 GB."""
    from mlx_linearard.models.save import Tensor, write_config, write_weights

    settings = tiny.config(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        vocab_size=32000,
    )
    model_class, args_class = _get_classes(settings)
    from mlx.utils import tree_flatten

    shapes = tree_flatten(model_class(args_class.from_dict(settings)).parameters())
    directory.mkdir()
    numbers = mx.random.normal((1 << 20,)).astype(mx.bfloat16)  # repeated: fresh ones take a minute

    def filled(shape):
        size = math.prod(shape)
        return lambda: mx.tile(numbers, -(-size // numbers.size))[:size].reshape(shape)

    tensors = [Tensor(name, tuple(v.shape), mx.bfloat16, filled(tuple(v.shape))) for name, v in shapes]
    write_weights(directory, tensors, shard_bytes=150 << 20)
    write_config(directory, settings)
    (directory / "tokenizer.json").write_text(tiny.tokenizer().to_str())
    return directory


def test_memory_is_that_of_a_shard_at_most(tmp_path):
    source = large(tmp_path / "source", layers=7)
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    allowed = 1.5 * max(shards) + 500e6
    assert len(shards) > 2 and sum(shards) > 1.4 * allowed
    for dtype in ("", "float16"):
        line = [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"ours{dtype}"), dtype]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        assert int(done.stdout) < allowed


def started(source, target):
    line = [sys.executable, "-m", "mlx_linearard.convert", "from-hf", str(source), str(target)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)


def test_ctrl_c_midway_leaves_nothing(tmp_path):
    source = large(tmp_path / "source", layers=6)
    (tmp_path / "place").mkdir()
    process = started(source, tmp_path / "place" / "ours")
    deadline = time.monotonic() + 60
    while not any((tmp_path / "place").glob(".ours.*/*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told.count("\n") == 1
    assert not list((tmp_path / "place").iterdir())


FULL = """
set -e
mount -t tmpfs -o size=2m tmpfs "$1"
shift
status=0
"$@" || status=$?
ls -A "$PLACE"
exit $status
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_full_disk_midway_leaves_nothing(tmp_path):
    settings = tiny.config(hidden_size=512, intermediate_size=1024)
    source = tiny.write(tmp_path / "source", settings)
    place = tmp_path / "place"
    place.mkdir()
    inside = ["bash", "-c", FULL, "bash", str(place), sys.executable, "-m", "mlx_linearard.convert"]
    outside = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    line = [*outside, *inside, "from-hf", str(source), str(place / "ours")]
    environment = {**os.environ, "PLACE": str(place)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout.strip()  # nothing is left on the small disk


def test_models_convert_from_anywhere(tmp_path):
    """The console script's module runs outside the repository."""
    tiny.write(tmp_path / "source")
    line = [sys.executable, "-m", "mlx_linearard.convert", "scale", "source", "ours", "--factor", "4"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "ours" / "config.json").is_file()


def test_peft_computes_the_same_with_an_embedding_adapter(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = from_hf(tiny.write(tmp_path / "source"), tmp_path / "base")
    keys = ["self_attn.q_proj", "model.embed_tokens"]
    _, ours = adapter(tmp_path / "ours", base, keys=keys)
    theirs = to_peft(tmp_path / "ours", tmp_path / "theirs", base_model=str(base))
    model = AutoModelForCausalLM.from_pretrained(to_hf(base, tmp_path / "hf"), dtype=torch.float32)
    model = PeftModel.from_pretrained(model, theirs).eval()
    with torch.no_grad():
        logits = model(torch.tensor(tiny.ids())).logits.numpy()
    assert np.abs(ours - logits).max() < CLOSE


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.[01]\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.[23]\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
    ],
)
def test_an_adapter_of_the_first_layers_that_peft_saved(tmp_path, settings):
    import torch
    from mlx_linearard.convert.peft import from_peft
    from peft import LoraConfig, get_peft_model
    from test_convert_peft import adapted
    from transformers import AutoModelForCausalLM

    base = from_hf(tiny.write(tmp_path / "source", tiny.config(num_hidden_layers=4)), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(to_hf(base, tmp_path / "hf"), dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
        logits = model(torch.tensor(tiny.ids())).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    assert np.abs(adapted(base, from_peft(tmp_path / "theirs", tmp_path / "ours")) - logits).max() < CLOSE


def test_a_gguf_with_yarn_betas_is_the_same_in_transformers(tmp_path):
    import gguf_files
    from mlx_linearard.convert.gguf import from_gguf
    from test_convert_gguf import metadata, tensors

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    settings = tiny.config(rope_scaling={**scaling, "beta_fast": 4.0, "beta_slow": 0.5})
    arrays = tiny.weights(settings)
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 4.0, "yarn_beta_slow": 0.5}
    over = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    ours = from_gguf(gguf_files.write(tmp_path / "a.gguf", metadata(**over), tensors(arrays)), tmp_path / "ours")
    theirs = torch_logits(tiny.write(tmp_path / "theirs", settings, arrays), tiny.ids())
    assert np.abs(tiny.logits(ours) - theirs).max() < CLOSE
