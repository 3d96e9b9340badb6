"""Which files are the weights, which tensors are an output head, and where links may lead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import converter_models as tiny
import mlx.core as mx
import numpy as np
import pytest
from mlx_linearard.convert.hf import from_hf, scale
from mlx_linearard.convert.verify import verify
from mlx_lm.utils import load_model

from mlx_linearard.errors import UserError
from mlx_linearard.models.directory import check_model_dir, load, path_for_mlx_lm
from mlx_linearard.models.pair import load_pair
from mlx_linearard.models.weights import check_finite, is_finite, read_header, same_values, weight_files

INDEX = "model.safetensors.index.json"


def refused(source: Path, said: str) -> None:
    """Checking, converting, scaling, verifying and loading refuse alike."""
    for use in (
        lambda: check_model_dir(source),
        lambda: from_hf(source, source.parent / "out"),
        lambda: scale(source, source.parent / "out", method="linear", factor=2.0),
        lambda: verify(source, source),
        lambda: load_pair(source, method="linear", factor=2.0),
    ):
        with pytest.raises(UserError, match=said):
            use()
    assert not (source.parent / "out").exists()


def logits(model) -> np.ndarray:
    return np.array(model(mx.array(tiny.ids(20))).astype(mx.float32))


# -- files --


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "model-extra.safetensors",
        "model_mtp.safetensors",
        "model-00001-of-00009.safetensors",
        "models.safetensors",
        "model[1].safetensors",
    ],
)
def test_a_second_weight_file_is_refused_everywhere(tmp_path: Path, shards: int, name: str) -> None:
    source = tiny.write(tmp_path / "source", shards=shards)
    first = weight_files(source)[0].name
    mx.save_safetensors(str(source / name), {"model.norm.weight": mx.zeros((64,))})
    refused(source, f"holds .*{name.replace('[', '.').replace(']', '.')} beside its weights in {first}")


def test_a_single_file_beside_the_shards_of_an_index(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", shards=2)
    shutil.copy(tiny.write(tmp_path / "other") / "model.safetensors", source)
    refused(source, "model.safetensors beside its weights in model-00001-of-00002")


@pytest.mark.parametrize("name", ["adapters.safetensors", "consolidated.safetensors", "my-model.safetensors"])
def test_files_that_no_library_takes_for_weights_are_ignored(tmp_path: Path, name: str) -> None:
    source = tiny.write(tmp_path / "source")
    (source / name).write_bytes(b"not even safetensors")
    assert weight_files(source) == [source / "model.safetensors"]
    assert check_model_dir(source).stored.keys() == tiny.weights(tiny.config()).keys()


def test_shards_without_an_index_must_be_complete(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", shards=3)
    (source / INDEX).unlink()
    assert [path.name[6:11] for path in weight_files(source)] == ["00001", "00002", "00003"]
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, "model-00002-of-00003.safetensors is missing")
    for path in source.glob("model-*"):
        path.unlink()
    refused(source, "holds no weights: it needs model.safetensors")
    (source / "model-00001-of-99999.safetensors").touch()
    refused(source, "model-00002-of-99999.safetensors is missing")


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    """mlx-lm writes one."""
    source = tiny.write(tmp_path / "source")
    names = dict.fromkeys(tiny.weights(tiny.config()), "model.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": names}))
    assert weight_files(source) == [source / "model.safetensors"]


@pytest.mark.parametrize("name", ["a[0]", "[ab]", "what?", "all*"])
def test_characters_of_a_path_are_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    source = tiny.write(tmp_path / name / "source", shards=2)
    tiny.write(tmp_path / "b" / "source")  # matches [ab]
    pair = load_pair(source, method="linear", factor=2.0, lora_rank=2)
    assert logits(pair.teacher).shape[-1] == tiny.VOCAB
    from_hf(source, tmp_path / name / "out")
    verified = verify(source, tmp_path / name / "out")
    assert verified.logits == 0
    with path_for_mlx_lm(source) as path:
        assert np.array_equal(logits(load_model(path)[0]), logits(pair.teacher))
    assert not path.is_symlink()


def test_weights_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write(tmp_path / "source")

    def denied(path: Path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)  # tests may run as root, whom no mode stops
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read: Permission denied"):
        read_header(source / "model.safetensors")


# -- the output head --

TIED = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("olmo2", {}),
    ("phi3", {}),
    ("smollm3", {}),
    ("gemma3_text", {"sliding_window": 32, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}),
]


def headed(kind: str, extra: dict, head) -> tuple[dict, dict]:
    """The config and weights of a tied model that stores a head all the same; `head` makes it of the embedding."""
    settings = tiny.config(kind, **extra)
    arrays = tiny.weights(settings)
    arrays["lm_head.weight"] = head(arrays["model.embed_tokens.weight"])
    return {**settings, "tie_word_embeddings": True}, arrays


@pytest.mark.parametrize(("kind", "extra"), TIED)
def test_a_head_of_its_own_is_kept(tmp_path: Path, kind: str, extra: dict) -> None:
    settings, arrays = headed(kind, extra, lambda embedding: embedding[::-1] * 1.5)
    source = tiny.write(tmp_path / "source", settings, arrays)
    untied = tiny.write(tmp_path / "untied", {**settings, "tie_word_embeddings": False}, arrays)
    wanted = tiny.logits(untied)
    assert check_model_dir(source).config["tie_word_embeddings"] is False
    for write in (
        lambda: from_hf(source, tmp_path / "a"),
        lambda: scale(source, tmp_path / "b", method="ntk", factor=2),
    ):
        output = write()
        assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert np.array_equal(tiny.logits(tmp_path / "a"), wanted)
    assert not np.allclose(tiny.logits(tmp_path / "b"), wanted)  # another theta
    assert np.abs(logits(load_pair(source, method="ntk", factor=2).teacher) - wanted[:, :20]).max() < 1e-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("kind", "extra"), [*TIED, ("gemma2", {"sliding_window": 256, "query_pre_attn_scalar": 16})])
def test_a_head_that_repeats_the_embedding_is_dropped(tmp_path: Path, kind: str, extra: dict, dtype: mx.Dtype) -> None:
    settings, arrays = headed(kind, extra, lambda embedding: embedding)
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(mx.bfloat16)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].astype(dtype)  # the same numbers in either type
    source = tiny.write(tmp_path / "source", settings, arrays)
    checked = check_model_dir(source)
    assert checked.config["tie_word_embeddings"] is True and "lm_head.weight" not in checked.arrays
    for output in (from_hf(source, tmp_path / "a"), scale(source, tmp_path / "b", method="ntk", factor=2)):
        assert "lm_head.weight" not in mx.load(str(output / "model.safetensors"))
        load_model(output)  # stock mlx-lm takes it
    del arrays["lm_head.weight"]
    plain = tiny.write(tmp_path / "plain", settings, arrays)
    assert np.array_equal(tiny.logits(tmp_path / "a"), tiny.logits(plain))


def test_a_head_that_differs_in_its_last_number_is_not_a_copy(tmp_path: Path) -> None:
    def last(embedding: mx.array) -> mx.array:
        head = embedding * 1
        head[-1, -1] += 1
        return head

    source = tiny.write(tmp_path / "source", *headed("llama", {}, last))
    assert "lm_head.weight" in check_model_dir(source).arrays


def test_a_family_without_a_head_refuses_one(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", *headed("gemma2", {"sliding_window": 64}, lambda e: e * 2))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding, and mlx-lm's gemma2 has no"):
        check_model_dir(source)


def test_values_are_compared_in_pieces(tmp_path: Path) -> None:
    a = mx.arange(300_000).astype(mx.float32)
    b = a * 1
    b[-1] = 0
    mx.save_safetensors(
        str(tmp_path / "x.safetensors"), {"a": a, "b": b, "c": a * 1, "d": a.astype(mx.int32), "e": a[1:]}
    )
    stored, _ = read_header(tmp_path / "x.safetensors")
    same = {name: same_values(stored["a"], stored[name]) for name in "abcde"}
    assert same == {"a": True, "b": False, "c": True, "d": True, "e": False}


def test_weights_that_are_not_finite_are_found_in_the_last_piece() -> None:
    assert is_finite(mx.array(1.0)) and is_finite(mx.zeros((0, 3))) and is_finite(mx.arange(5))
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        array = mx.zeros((3, 100_001), dtype=dtype)
        assert is_finite(array)
        for value in (float("nan"), float("inf"), -float("inf")):
            array[2, -1] = value
            assert not is_finite(array)
    with pytest.raises(UserError, match="here holds weights that are not finite: b; c"):
        check_finite({"c": mx.array([float("nan")]), "a": mx.ones((2,)), "b": array}, Path("here"))


def test_the_loader_equals_mlx_lms(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    quantized = from_hf(source, tmp_path / "quantized", quantize=True)
    for directory in (source, quantized):
        model = load(directory, check_model_dir(directory).config)
        assert np.array_equal(logits(model), logits(load_model(directory)[0]))


# -- links --


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "notes"])
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    source = tiny.write(tmp_path / "source")
    secret = tmp_path / "secret"
    if (source / name).exists():
        (source / name).rename(secret)
    else:
        secret.write_text("secret")
    (source / name).symlink_to(secret)
    refused(source, f"{name} is a link that leads out of its directory")
    (source / name).unlink()
    (source / name).symlink_to("/nowhere")
    refused(source, f"{name} is a link that leads out of its directory")


def test_a_linked_directory_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source")
    (source / "additional_chat_templates").symlink_to(tmp_path)
    refused(source, "additional_chat_templates is a link that leads out")


def test_a_hub_cache_is_read(tmp_path: Path) -> None:
    """snapshots/REVISION/NAME leads to ../../blobs/HASH."""
    repository = tmp_path / "models--owner--name"
    snapshot = tiny.write(repository / "snapshots" / "main")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        path.rename(blob)
        path.symlink_to(Path("..", "..", "blobs", blob.name))
    (tmp_path / "alias").symlink_to(snapshot)  # a link to the directory itself is the user's own
    (snapshot / "inner.txt").symlink_to("config.json")
    for source in (snapshot, tmp_path / "alias"):
        check_model_dir(source)
    from_hf(tmp_path / "alias", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    scale(snapshot, tmp_path / "scaled", method="ntk", factor=2)
    assert not any(path.is_symlink() for path in (tmp_path / "scaled").iterdir())


@pytest.mark.parametrize(
    "blob",
    ["blobs/" + "0" * 40, "models--o--n/blobs/notes", "models--o--n/" + "0" * 40, "models--o--n/blobs/x/" + "0" * 40],
)
def test_other_places_are_no_hub_cache(tmp_path: Path, blob: str) -> None:
    source = tiny.write(tmp_path / "source")
    target = tmp_path / blob
    target.parent.mkdir(parents=True)
    (source / "config.json").rename(target)
    (source / "config.json").symlink_to(target)
    refused(source, "config.json is a link that leads out")
