"""The export command: the next command that it prints can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from mlx_linearard.convert.verify import verify

from mlx_linearard.errors import UserError
from mlx_linearard.export import __main__ as command
from mlx_linearard.export.formats import FORMATS, export
from mlx_linearard.files import new_directory


@pytest.mark.parametrize("name", ["out", "my model", "a;touch b", "$(touch b)", "it's"])
@pytest.mark.parametrize("form", ["mlx", "adapters"])
def test_the_next_command_names_the_directory_as_one_word(
    tmp_path: Path, name: str, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "export", lambda run, out, **_: out)
    assert command.run(["--run", "x", "--to", str(tmp_path / name), "--format", form]) == 0
    words = shlex.split(capsys.readouterr().out.split("next: ")[1], comments=True)
    model = words[words.index("--model") + 1]
    assert model == str(tmp_path / name) + ("/base" if form == "adapters" else "")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("target", ["run", "run/model", "run/adapters", "run/base", "."])
def test_overwrite_never_deletes_the_run(tmp_path: Path, form: str, target: str) -> None:
    for name in ("model", "adapters", "base"):
        with new_directory(tmp_path / "run" / name) as folder:
            (folder / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="the source"):
        export(tmp_path / "run", tmp_path / target, format=form, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("quantized", [True, False])
def test_peft_adapters_of_a_quantized_base_say_what_to_load_them_on(
    tmp_path: Path, quantized: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "export", lambda run, out, **_: out)
    (tmp_path / "run" / "base").mkdir(parents=True)
    config = '{"quantization": {"group_size": 64, "bits": 4}}' if quantized else "{}"
    (tmp_path / "run" / "base" / "config.json").write_text(config)
    command.run(["--run", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--format", "peft"])
    assert ("mlx_linearard.convert to-hf" in capsys.readouterr().out) == quantized


@pytest.mark.parametrize("bits", [None, 8])
def test_gguf_is_a_folder_with_card_and_modelfile(finished_run: Path, tmp_path: Path, bits: int | None) -> None:
    pytest.importorskip("gguf")
    out = export(finished_run, tmp_path / "out", format="gguf", quantize=bits is not None, q_bits=bits)
    (file,) = out.glob("*.gguf")
    assert file.name == "tiny-llama-512.gguf"
    assert (out / "Modelfile").read_text() == f"FROM ./{file.name}\nPARAMETER num_ctx 512\n"
    card = (out / "README.md").read_text()
    assert f"llama-server -m {file.name} -c 512" in card and "library_name: gguf" in card
    assert "`mlx_linearard.convert verify --served URL DIR`" in card
    result = verify(finished_run / "model", file)
    assert result.logits <= (0 if bits is None else 1.0) and (result.agreement == 1) == (bits is None)


def test_gguf_has_eight_bits_only(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama-quantize"):
        export(finished_run, tmp_path / "out", format="gguf", quantize=True, q_bits=4)
    assert not (tmp_path / "out").exists()
