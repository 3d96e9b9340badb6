"""Options in a YAML file: read with checked names and types, and written so that reading gives the same options."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..errors import UserError
from .checks import is_finite, quoted
from .mlx_lm_names import from_mlx_lm
from .option import type_of
from .options import ALSO, DistillConfig


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked by name and type; see `read_yaml_and_notes`."""
    return read_yaml_and_notes(path)[0]


def read_yaml_and_notes(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The options in a YAML file, checked by name and type, and a note for each option of mlx_lm.lora without an equal.

    Raises:
        UserError: the file cannot be read, or an option is unknown (the message names the nearest one) or has a
            value of another type.
    """
    value = files.read_yaml(path)
    if value is None:
        return {}, []
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold `option: value` lines, not a {type(value).__name__}")
    named = {str(key).replace("-", "_"): value for key, value in value.items()}
    options, notes = from_mlx_lm(path, {ALSO.get(name, name): value for name, value in named.items()})
    return {name: _checked(path, name, value) for name, value in options.items()}, notes


def _checked(path: str | Path, key: str, value: Any) -> Any:
    """The value of an option in a YAML file, in the option's type; UserError if it has another type."""
    options = {item.name: item for item in dataclasses.fields(DistillConfig)}
    name = key.replace("-", "_")
    if name not in options:
        near = difflib.get_close_matches(name[:100], options, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see mlx_linearard.distill --help"
        raise UserError(f"{path}: there is no option {quoted(key)}{hint}")
    kind = type_of(options[name])
    if value is None and options[name].default is None:
        return None
    if kind is str and name in ("layers", "eval_lengths", "compare", "report_to") and isinstance(value, int | list):
        value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = _number(value)  # YAML 1.1 reads 3e-4 as a word
    if type(value) is not kind or (kind is float and not is_finite(value)):
        raise UserError(f"{path}: {name} must be a {kind.__name__}, not {quoted(value)}")
    return value


def _number(value: int | str) -> Any:
    """A number that YAML read as an integer or a word, as a float; other values as they are."""
    try:
        return float(value) if isinstance(value, int) or value.isascii() else value
    except (ValueError, OverflowError):
        return value


def to_yaml(config: DistillConfig) -> str:
    """The configuration as a YAML file from which `--config` reads the same options."""
    body = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    for passing in ("resume", "overwrite", "dry_run", "force"):
        body.pop(passing)
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
