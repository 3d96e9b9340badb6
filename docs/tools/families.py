"""The page of model families, from the table that the program reads.

    python docs/tools/families.py            # after a change of the table: write docs/families.md
    python docs/tools/families.py --check    # exit with 1 if it would change

tests/families/test_architectures.py checks that every architecture of the installed mlx-lm is on the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_linearard.models.directory import in_mlx_lm
from mlx_linearard.rope import FAMILIES, METHODS, REFUSED, WRAPPERS, Family

PAGE = Path(__file__).parents[1] / "families.md"
TOP = """# Model families

The first word of each line is the `model_type` of a model's config.json. Every architecture of mlx-lm is on this page:
it is supported, or it is refused before weights are loaded, with the reason given here. `docs/tools/families.py` writes
this page from the table that the program reads.
"""
SUPPORTED = """
## Supported

A method is listed if stock mlx-lm and transformers compute the same rotation under it. A model that already carries a
linear, yarn or llama3 scaling takes `ntk` only, which keeps that scaling; one that carries another scaling is refused.
A config with a key that mlx-lm ignores is refused by the name of the key.
"""
INSIDE = "\n## Supported inside a multimodal config\n\nOnly the text model is read, as mlx-lm does.\n\n"
OUT = "\n## Refused\n"


def line(name: str, row: Family) -> str:
    """One family: its methods, and what is unusual about it."""
    notes = [] if in_mlx_lm(name) else ["inside a multimodal config only"]
    if row.rotated != "all":
        notes.append(f"layers with RoPE: {row.rotated}")
    if row.local is not None:
        notes.append("sliding layers keep their own theta")
    elif row.nested:
        notes.append("only layers with full attention are scaled")
    if row.experts:
        notes.append("mixture of experts: attention is trained")
    if row.longrope:
        notes.append("written as longrope")
    if not row.architecture:
        notes.append("transformers has no such model")
    if row.differs:
        notes.append(row.differs)
    methods = "all methods" if row.methods == METHODS else ", ".join(row.methods)
    return f"- `{name}`: {'; '.join([methods, *notes])}"


def page() -> str:
    """The whole page."""
    parts = [TOP, SUPPORTED, "\n", *(f"{line(name, row)}\n" for name, row in sorted(FAMILIES.items())), INSIDE]
    parts += [f"- `{name}`: {' or '.join(f'`{text}`' for text in texts)}\n" for name, texts in sorted(WRAPPERS.items())]
    parts.append(OUT)
    for reason in dict.fromkeys(REFUSED.values()):
        names = ", ".join(f"`{name}`" for name in sorted(REFUSED) if REFUSED[name] == reason)
        said = reason if reason.startswith("mlx-lm") else reason[0].upper() + reason[1:]
        parts.append(f"\n{said}:\n{names}\n")
    return "".join(parts)


def main() -> int:
    """Write the page, or with --check compare it."""
    if sys.argv[1:] == ["--check"]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
