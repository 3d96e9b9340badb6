"""Writes the report of a run: report.html, which needs no other file, and report.md, from the templates."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ..files import RunDir, write_text
from ..results.fields import visible
from ..results.verdict import headline, mood
from .content import heading, next_commands, notes, provenance, samples, settings, tables, training_summary
from .figures import figures
from .load import RunFacts, read_run
from .parts import style_of

HTML, MARKDOWN = "report.html", "report.md"  # the templates


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and report.md into a run directory, finished or under way; returns the HTML file.

    Raises UserError if the directory holds no run or if one of its files is broken; nothing is written then.
    """
    facts = read_run(run_dir)
    run = RunDir(run_dir)
    page, twin = to_html(facts), to_markdown(facts)
    write_text(run.report, page)
    write_text(run.report_markdown, twin)
    return run.report


def to_html(facts: RunFacts) -> str:
    """The report as one HTML page. Everything from the run is escaped by the template engine."""
    charts = [(figure, Markup(figure.svg)) for figure in figures(facts)]
    content = {**_content(facts), "figures": charts, "style": Markup(_resource("style.css"))}
    return templates().get_template(HTML).render(content)


def to_markdown(facts: RunFacts) -> str:
    """The report as Markdown, for a model card. The filters `md` and `code` escape everything from the run."""
    shown = [*tables(facts), *(figure.data for figure in figures(facts) if figure.data)]
    training = [(f"Training, {name}", training_summary(steps)) for name, steps in facts.curves.items()]
    training.append(("Training", training_summary(facts.steps)))
    content = {**_content(facts), "tables": shown, "training": training}
    return templates().get_template(MARKDOWN).render(content).rstrip() + "\n"


def _content(facts: RunFacts) -> dict[str, Any]:
    title, subtitle = heading(facts)
    steps = next_commands(facts)
    said = {command for _, commands in steps for command in commands}
    lists = (("Run", provenance(facts)), ("Configuration", settings(facts)))
    return {
        "title": title,
        "subtitle": subtitle,
        "headline": headline(facts),
        "mood": mood(facts),
        "next": steps,
        "notes": [note for note in notes(facts) if note.command not in said],
        "tables": list(tables(facts)),
        "samples": samples(facts),
        "lists": [(name, pairs) for name, pairs in lists if pairs],
    }


@cache
def templates() -> Environment:
    """The templates of the report and of the model card. Their filters escape everything from a run."""
    environment = Environment(
        loader=FunctionLoader(lambda name: _resource("templates", name)),
        autoescape=select_autoescape(["html"], default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_visible,
    )
    environment.filters |= {
        "md": markdown_text,
        "md_line": markdown_line,
        "code": markdown_code,
        "fenced": markdown_block,
        "style_of": style_of,
    }
    return environment


def _resource(*path: str) -> str:
    return files(__package__).joinpath(*path).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------
# Text from a run


def _visible(value: Any) -> Any:
    """What a template shows of a value: text without characters that hide or reorder other text."""
    if isinstance(value, Markup):
        return Markup(visible(value))
    return visible(value) if isinstance(value, str) else value


def markdown_text(text: str) -> str:
    """Text on one line that Markdown shows as it is: no markup, no HTML, no link, no new cell of a table."""
    escaped = escape(visible(" ".join(text.split())), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escaped)
    escaped = re.sub(
        r"(?i)(?<![a-z0-9])(https?|ftp|mailto|xmpp|www)([:.])", r"\1\\\2", escaped
    )  # links without brackets
    return escaped


def markdown_line(text: str) -> str:
    """The same at the start of a line, where it must not begin a list or underline a heading."""
    line = markdown_text(text)
    return f"&#{ord(line[0])};{line[1:]}" if re.match(r"[-+=]|\d+[.)](\s|$)", line) else line


def markdown_code(text: str) -> str:
    """Text on one line as a code span, fenced by more backticks than it holds in a row."""
    shown = visible(" ".join(text.splitlines()))
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """Text as a code block, fenced by more backticks than it holds in a row."""
    shown = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"
