"""Upload to a local server that speaks the hub's protocol: private, resumed, and the token in no message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub import Hub, running

from mlx_linearard.errors import UserError
from mlx_linearard.export import upload as uploads
from mlx_linearard.export.__main__ import run as export_command

TOKEN = "hf_not_to_be_shown"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client of this process talks to, by its own protocol for large files and without waiting."""
    with running(Hub(TOKEN)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False, raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(uploads, "LARGE", 50_000)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def command(run: Path, out: Path, *more: str) -> list[str]:
    return ["--run", str(run), "--to", str(out), "--upload-repo", "me/mine", *more]


def test_an_export_is_uploaded_private_with_its_card(
    hub: Hub, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export_command(command(finished_run, out)) == 0
    made = hub.made[0]
    assert made["organization"] == "me" and (made.get("visibility") == "private" or made.get("private") is True)
    ours = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".mlx_linearard"}
    assert hub.files == ours and hub.lfs == {"model.safetensors"}
    assert hub.commits[0] == ["model.safetensors"] and "config.json" in hub.commits[-1]  # the weights first
    assert b"mlx_lm.generate --model me/mine" in ours["README.md"]
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_broken_connection_is_continued(
    hub: Hub, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.breaks = 100
    with pytest.raises(UserError, match=r"the upload stopped after 0 of \d+ files .*same command again") as caught:
        export_command(command(finished_run, tmp_path / "out"))
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert not hub.commits
    hub.breaks = 0
    assert export_command(command(finished_run, tmp_path / "out")) == 0
    assert "is exported already" in capsys.readouterr().out
    sent, commits = hub.sent, len(hub.commits)
    del hub.files["config.json"]
    (tmp_path / "out" / "tokenizer_config.json").write_text("{}")
    assert export_command(command(finished_run, tmp_path / "out")) == 0
    assert hub.sent == sent and hub.commits[commits:] == [["config.json", "tokenizer_config.json"]]
    assert export_command(command(finished_run, tmp_path / "out")) == 0
    assert "uploading 0 of" in capsys.readouterr().out and len(hub.commits) == commits + 1


def test_the_card_that_is_uploaded_has_the_results_of_today(hub: Hub, run_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_command([*command(run_copy, out, "-q")]) == 0
    before = (out / "README.md").read_text()
    assert "Quantizing cost" in before and "Last word" not in before
    results = json.loads((run_copy / "results.json").read_text())
    metrics = {"metrics": {"acc": {"value": 0.5, "stderr": 0.1, "n": 30}}}
    for name in ("native", "scaled", "restored"):
        results[name]["lambada"] = metrics
    (run_copy / "results.json").write_text(json.dumps(results))
    assert export_command([*command(run_copy, out, "-q")]) == 0
    after = hub.files["README.md"].decode()
    assert "Quantizing cost" in after and "Last word" in after and hub.commits[-1] == ["README.md"]
    (out / "README.md").write_text(f"{after}Mine.\n")
    assert export_command([*command(run_copy, out, "-q")]) == 0
    assert hub.files["README.md"].decode() == f"{after}Mine.\n"


def test_another_export_in_the_way_is_not_uploaded(
    hub: Hub, run_copy: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Another run, another option, or a retrained model does not upload what stands there."""
    out = tmp_path / "out"
    export_command(command(run_copy, out))
    commits = len(hub.commits)
    for arguments in (command(finished_run, out), command(run_copy, out, "--dtype", "float16")):
        with pytest.raises(UserError, match="already exists"):
            export_command(arguments)
    os.utime(run_copy / "model" / "model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="already exists"):
        export_command(command(run_copy, out))
    assert len(hub.commits) == commits
    assert export_command(command(run_copy, out, "--overwrite")) == 0


def test_a_refused_token(hub: Hub, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(UserError, match=r"me/mine: the hub refuses the token \(HTTP 401\)") as caught:
        export_command(command(finished_run, tmp_path / "out"))
    assert "hf_wrong_secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_public_repository_needs_a_word(hub: Hub, finished_run: Path, tmp_path: Path) -> None:
    hub.public = True
    with pytest.raises(UserError, match=r"me/mine is a public repository: .* --public"):
        export_command(command(finished_run, tmp_path / "out"))
    assert not hub.files
    assert export_command(command(finished_run, tmp_path / "out", "--public")) == 0
    assert hub.files and hub.made[-1].get("visibility", "public") == "public"


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "../x", "a/..", "me/ mine", "me/a--b", ""])
def test_a_wrong_name_is_refused_before_anything_is_written(finished_run: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(UserError, match="must be OWNER/NAME"):
        export_command(["--run", str(finished_run), "--to", str(tmp_path / "out"), "--upload-repo", repo])
    assert not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_written(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "token_of_hub", lambda: None)
    monkeypatch.setattr("mlx_linearard.export.formats.token_of_hub", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        export_command(command(finished_run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(finished_run: Path, tmp_path: Path) -> None:
    with running(Hub(TOKEN)) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        words = [
            sys.executable,
            "-m",
            "mlx_linearard.export",
            *command(finished_run, tmp_path / "out", "-q", "--q-group-size", "32"),
        ]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in server.files and TOKEN not in done.stdout + done.stderr
