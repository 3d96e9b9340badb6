"""The model card: what the hub and mlx-lm read of it, and that nothing in it can pretend to be something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import tiny_model

from mlx_linearard.distill.__main__ import run as distill_command
from mlx_linearard.evaluate.__main__ import run as evaluate_command
from mlx_linearard.export.formats import export
from mlx_linearard.files import add_file, check_overwrite, new_directory
from mlx_linearard.models.origin import Origin, origin_of
from mlx_linearard.report.card import write_card
from mlx_linearard.report.load import read_run

LIBRARIES = {"mlx": "mlx", "hf": "transformers", "peft": "peft", "adapters": "mlx"}


def test_the_model_of_a_run_has_a_card(finished_run: Path) -> None:
    card = ModelCard.load(finished_run / "model" / "README.md")  # as mlx_lm.upload loads it
    data = card.data.to_dict()
    assert data["base_model"] == "acme/tiny-llama" and data["license"] == "apache-2.0"
    assert data["language"] == ["en", "no"]  # YAML's no is Norwegian here
    assert data["library_name"] == "mlx" and {"mlx", "yarn"} <= set(data["tags"])
    results = json.loads((finished_run / "results.json").read_text())
    for text in (
        "window 512",
        "window of 128 tokens",
        "yarn",
        "mlx_lm.server",
        "vllm serve",
        "LM Studio",
        "2604.00004",
    ):
        assert text in card.text
    assert f"{results['restored']['kl']:.4f} ±" in card.text  # with its error
    assert f"{results['run']['training_tokens']}" in card.text


@pytest.mark.parametrize("form", LIBRARIES)
def test_every_export_has_a_card_and_can_be_replaced(finished_run: Path, tmp_path: Path, form: str) -> None:
    for _ in range(2):
        out = export(finished_run, tmp_path / "out", format=form, overwrite=True)
        data = ModelCard.load(out / "README.md").data
        assert data.library_name == LIBRARIES[form] and data.base_model == "acme/tiny-llama"
        assert data.to_dict()["base_model_relation"] == ("adapter" if form in ("peft", "adapters") else "finetune")


def test_mlx_lm_loads_the_card_before_it_uploads(finished_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """mlx_lm.upload up to its first call of the hub: the provenance names our base model."""
    from mlx_lm.utils import upload_to_hub

    out = export(finished_run, tmp_path / "out")

    class Offline(Exception):
        pass

    def refuse(*_: Any, **__: Any) -> None:
        raise Offline

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(Offline):
        upload_to_hub(str(out), "me/mine")
    text = (out / "README.md").read_text()
    assert "huggingface.co/acme/tiny-llama" in text and "license: apache-2.0" in text


def test_a_card_names_no_folder_of_this_machine(finished_run: Path, text_file: Path) -> None:
    text = (finished_run / "model" / "README.md").read_text()
    assert str(finished_run.parent) not in text and str(text_file.parent) not in text
    assert text_file.name in text


@pytest.mark.parametrize("name", ["x\n# pwned", "a`b```c", "<script>alert(1)</script>", "$(touch x)", "[a](http://b)"])
def test_hostile_names_are_escaped(run_copy: Path, name: str) -> None:
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config.update(model=f"/tmp/{name}", data=f"/tmp/{name}", layers=name)
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    (run_copy / "model" / "README.md").write_text(f"---\n{yaml.safe_dump({'license': name, 'language': [name]})}---\n")
    write_card(run_copy / "model", read_run(run_copy), "mlx", name=name)
    text = (run_copy / "model" / "README.md").read_text()
    data = ModelCard.load(run_copy / "model" / "README.md").data.to_dict()
    assert data.get("license") == (name if name.isprintable() else None)
    body = text.split("---\n", 2)[2]
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)  # code blocks show anything as it is
    assert outside.count("\n# ") == 1 and "<script>" not in outside and not re.search(r"(?<!\\)\]\(", outside)


def test_the_card_of_another_model_is_data_only(tmp_path: Path) -> None:
    front = {
        "license": {"a": 1},
        "license_name": "x" * 300,
        "license_link": "L\u202eICENCE\n",
        "language": ["en", 3, {"a": 1}],
        "base_model": "../../etc",
    }
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\ntext")
    assert origin_of(tmp_path) == Origin(None, {"language": ["en"]})
    for broken in (
        "---\n[\n---\n",
        "---\n- a\n---\n",
        "no front",
        "---\nx: " + "[" * 5000 + "\n---\n",
        "---\n!!python/x\n---\n",
    ):
        (tmp_path / "README.md").write_text(broken)
        assert not origin_of(tmp_path)


def test_a_snapshot_of_the_hub_is_its_own_base_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--tiny--one" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert origin_of(snapshot).base_model == "acme/tiny--one"


def test_a_converted_model_keeps_base_model_and_licence(tmp_path: Path) -> None:
    from mlx_linearard.convert.hf import from_hf, scale

    base = tiny_model(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: [acme/one]\n---\n")
    copy = from_hf(base, tmp_path / "copy")
    scaled = scale(copy, tmp_path / "scaled", method="yarn", factor=2.0)
    assert origin_of(copy) == origin_of(scaled) == Origin("acme/one", {"license": "mit"})


def test_an_added_file_does_not_make_a_directory_foreign(tmp_path: Path) -> None:
    with new_directory(tmp_path / "ours") as folder:
        (folder / "a").write_text("a")
    add_file(tmp_path / "ours", "README.md", "card")
    check_overwrite(tmp_path / "ours")
    (tmp_path / "ours" / "mine").write_text("not of this tool")
    add_file(tmp_path / "ours", "b", "b")
    with pytest.raises(Exception, match="did not write"):
        check_overwrite(tmp_path / "ours")


def test_a_resumed_run_replaces_its_model_and_its_card(run_copy: Path) -> None:
    (run_copy / "model" / "README.md").unlink()
    assert distill_command(["--config", str(run_copy / "config.yaml"), "--output", str(run_copy), "--resume"]) == 0
    assert (run_copy / "model" / "README.md").is_file()


def evaluated(run: Path, text: Path) -> None:
    arguments = ["--run", str(run), "--suite", "passkey", "--data", str(text), "--lengths", "256", "--samples", "1"]
    assert evaluate_command([*arguments, "--depths", "50", "--no-cache"]) == 0


def test_the_card_follows_an_evaluation(run_copy: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_copy / "model" / "README.md"
    before = path.read_text()
    gap = "Finding a detail in a long text and copying it was not measured"
    assert gap in before and "### Pass key" not in before
    evaluated(run_copy, text_file)
    after = path.read_text()
    assert "### Pass key" in after and gap not in after
    assert ModelCard.load(path).data.base_model == "acme/tiny-llama"
    check_overwrite(run_copy / "model")
    assert "changed by hand" not in capsys.readouterr().out


def test_a_card_that_was_changed_by_hand_stays(
    run_copy: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_copy / "model" / "README.md"
    path.write_text(path.read_text() + "\nMine.\n")
    own = path.read_bytes()
    evaluated(run_copy, text_file)
    assert path.read_bytes() == own
    assert f"{path} was changed by hand, so it does not get the new results" in capsys.readouterr().out
