"""Every architecture of the installed mlx-lm is in the table, or refused by name with what is missing."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import mlx_lm.models
import pytest
from mlx_lm.utils import MODEL_REMAPPING

from mlx_linearard.errors import UserError
from mlx_linearard.models.directory import check_config
from mlx_linearard.rope import FAMILIES, REFUSED, WRAPPERS


def has_model(name: str) -> bool:
    """Whether a file of mlx-lm defines a model; the text is read, because importing some files ends the program."""
    text = (Path(mlx_lm.models.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
    return "class ModelArgs" in text


FILES = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
ARCHITECTURES = sorted({*filter(has_model, FILES), *MODEL_REMAPPING})


def test_the_walk_finds_models() -> None:
    assert len(ARCHITECTURES) > 120
    assert {"llama", "mistral", "smollm3", "gemma4_unified", "lfm2-vl"} <= set(ARCHITECTURES)
    assert {"base", "cache", "switch_layers"}.isdisjoint(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_in_the_table_or_refused(name: str, tmp_path: Path) -> None:
    assert (name in FAMILIES or name in WRAPPERS) != (name in REFUSED)
    if name not in REFUSED:
        return
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"model_type": "{name}", "text_config": {{}}}}')  # no weights to load
    with pytest.raises(UserError, match=f"model_type '{name}' is not supported: [^:]{{20,}}") as error:
        check_config(folder)
    assert str(error.value).endswith(REFUSED[name])


def test_only_what_mlx_lm_has_is_listed() -> None:
    inside = {text for texts in WRAPPERS.values() for text in texts}
    assert {*FAMILIES, *REFUSED, *WRAPPERS} - inside <= set(ARCHITECTURES)


def test_the_page_of_families_is_current() -> None:
    """After a change of the table: python docs/tools/families.py."""
    root = Path(__file__).parents[2] / "docs"
    assert subprocess.run([sys.executable, root / "tools" / "families.py", "--check"], check=False).returncode == 0
    listed = set(re.findall(r"`([^`]+)`", (root / "families.md").read_text(encoding="utf-8")))
    assert set(ARCHITECTURES) <= listed
