"""`export --upload-repo`: the files of an export to the hub, private unless asked otherwise.

Large files go first, each in a commit of its own, and the small ones last, so that nobody can load half a model. A file
that is there already is not sent again: the same command continues an upload that was stopped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..files import LOCK, MARKER, reading

LARGE = 10_000_000  # bytes from which a file has a commit of its own
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

Progress = Callable[[str], None]


def check_upload(repo: str, token: str | None) -> None:
    """UserError for a name that is no repository, and without a token; before anything is written."""
    if not _REPOSITORY.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"--upload-repo {repo!r} must be OWNER/NAME")
    if not token:
        raise UserError("--upload-repo needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def token_of_hub() -> str | None:
    """The token that the hub's own tools use."""
    from huggingface_hub import get_token

    return get_token()


def upload(folder: Path, repo: str, *, public: bool = False, progress: Progress | None = None) -> str:
    """Upload the files of an export; returns the repository's address.

    Raises:
        UserError: the token is refused, the repository is public and `public` is false, or the connection broke.
    """
    from huggingface_hub import HfApi

    say = progress or (lambda _: None)
    token = token_of_hub()
    check_upload(repo, token)
    api = HfApi(token=token)
    with _hub_errors(repo, token, "cannot be made"):
        address = str(api.create_repo(repo, private=not public, exist_ok=True))
        if not public and api.model_info(repo).private is False:
            raise UserError(f"{repo} is a public repository: choose another, or pass --public")
        remote = _remote(api, repo)
    with reading(folder):
        files = list(_files(folder))
        missing = [(path, name) for path, name in files if not _is_there(path, remote.get(name))]
    say(f"uploading {len(missing)} of {len(files)} files to {repo}" + ("" if public else ", which is private"))
    large = [(path, name) for path, name in missing if path.stat().st_size >= LARGE]
    small = [item for item in missing if item not in large]
    done = len(files) - len(missing)
    for batch in [*([item] for item in large), small]:
        if not batch:
            continue
        with _hub_errors(repo, token, f"the upload stopped after {done} of {len(files)} files"):
            _commit(api, repo, batch)
        done += len(batch)
        say(f"{done} of {len(files)} files are there")
    return address


def _commit(api: Any, repo: str, batch: list[tuple[Path, str]]) -> None:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    operations = [CommitOperationAdd(name, path) for path, name in batch]
    title = batch[0][1] if len(batch) == 1 else f"{len(batch)} files"
    disable_progress_bars()
    try:
        api.create_commit(repo, operations, commit_message=f"Upload {title} with mlx-linearard")
    finally:
        enable_progress_bars()


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of an export and their names in the repository, without what only this tool uses."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in (MARKER, LOCK) and not name.startswith(".cache/"):
            yield path, name


def _remote(api: Any, repo: str) -> dict[str, Any]:
    """The files of a repository by name."""
    return {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True) if hasattr(entry, "blob_id")}


def _is_there(path: Path, entry: Any) -> bool:
    """Whether the repository has a file with this content, by git's hash or that of large files."""
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return bool(_hash(path, hashlib.sha256()) == entry.lfs.sha256)
    blob = hashlib.sha1(f"blob {entry.size}\0".encode(), usedforsecurity=False)
    return bool(_hash(path, blob) == entry.blob_id)


def _hash(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return str(digest.hexdigest())


@contextmanager
def _hub_errors(repo: str, token: str | None, subject: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line, in which the token is not shown."""
    try:
        yield
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # each version of the client has its own errors for a connection
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = one_line(getattr(error, "server_message", None) or error)[:200]
        text = text.replace(token, "***") if token else text
        if status in (401, 403):
            raise UserError(f"{repo}: the hub refuses the token (HTTP {status}): it must be allowed to write") from None
        again = "type the same command again: files that are there are not sent twice"
        raise UserError(f"{repo}: {subject} ({type(error).__name__}: {text}); {again}") from None
