"""The README's table and the picture above it, both from docs/result.csv.

    python docs/tools/result.py            # after a change of docs/result.csv: write both
    python docs/tools/result.py --check    # exit with 1 if either would change

The last row is shown in bold. The picture has no text that is not in the table, and two colours for light and dark.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
TABLE, PICTURE, README = ROOT / "docs" / "result.csv", ROOT / "docs" / "result.svg", ROOT / "README.md"
BEGIN, END = "<!-- result.csv -->\n", "<!-- end -->\n"
WIDTH, ROW, TOP, LABELS, GAP = 800, 30, 46, 170, 40
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.head { font-weight: 600; } .native { fill: #8c959f; } .cost { fill: #d1643b; } .won { fill: #2f6f9f; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .won { fill: #5aa2d8; } .cost { fill: #e08a63; } }
"""


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(['', *heads[1:]])} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row[head]} %" if head == "top-1 agreement" else row[head] for head in heads]
        if row is rows[-1]:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, str]]) -> str:
    """Two columns of bars: how often a model agrees with the native one, and its perplexity at the longest length."""
    long = [head for head in rows[0] if head.startswith("perplexity")][-1]
    panel = (WIDTH - LABELS - 2 * GAP) // 2
    height = TOP + ROW * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Agreement with the native model, and perplexity at the longest length, by model</title>",
        f"<style>{STYLE}</style>",
    ]
    for column, (head, unit, title) in enumerate(
        [("top-1 agreement", " %", "top-1 agreement with native"), (long, "", f"{long} (lower is better)")]
    ):
        left = LABELS + column * (panel + GAP)
        most = max(float(row[head]) for row in rows)
        parts.append(f'<text class="head" x="{left}" y="24">{escape(title)}</text>')
        for number, row in enumerate(rows):
            y, long_as = TOP + number * ROW, (panel - 60) * float(row[head]) / most
            kind = "native" if row["model"] == "native" else "cost" if "untrained" in row["model"] else "won"
            parts.append(f'<rect class="{kind}" x="{left}" y="{y}" width="{long_as:.1f}" height="{ROW - 10}" rx="3"/>')
            parts.append(f'<text x="{left + long_as + 6:.1f}" y="{y + 15}">{row[head]}{unit}</text>')
            if column == 0:
                parts.append(f'<text x="0" y="{y + 15}">{escape(row["model"])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def readme(text: str, table: str) -> str:
    """The README with this table between its two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


def main() -> None:
    found = rows()
    new = {PICTURE: picture(found), README: readme(README.read_text(encoding="utf-8"), table(found))}
    changed = [path for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"docs/result.csv has changed: run {Path(__file__).relative_to(ROOT)}" if changed else 0)
    for path in changed:
        path.write_text(new[path], encoding="utf-8")


if __name__ == "__main__":
    main()
