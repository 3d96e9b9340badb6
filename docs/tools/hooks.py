"""mkdocs: what the site takes from the repository.

Pictures that lie beside the benchmarks are part of the site, under the links that also work in the repository. The
list of all options on the page options.md comes from their one definition.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from mlx_linearard.config import DistillConfig, flag

PICTURES = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"
LINK = "../examples/benchmarks/results/"
OPTIONS = "<!-- options -->"


def on_files(files: Files, *, config: Any) -> Files:
    for picture in sorted(PICTURES.glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(LINK, "benchmarks/").replace(OPTIONS, options() if OPTIONS in markdown else "")


def options() -> str:
    """Every option of distill, by group, with its help and default."""
    lines: list[str] = []
    fields = dataclasses.fields(DistillConfig)
    for group in dict.fromkeys(item.metadata["group"] for item in fields):
        lines += [f"\n## {group.capitalize()}\n"]
        for item in fields:
            if item.metadata["group"] == group:
                value = f" {item.metadata['metavar']}" if item.metadata["metavar"] else ""
                default = "" if item.default is None or item.default is False else f" Default: `{item.default}`."
                text = item.metadata["help"].replace("*", "\\*").replace("[", "\\[").replace("<", "&lt;")
                lines.append(f"- `--{flag(item.name)}{value}`: {text}.{default}")
    return "\n".join(lines)
