"""griffe: each section of a docstring as its parser needs it, with what this project leaves out.

A blank line goes before each section, and the examples at the end of a docstring, which doctest runs, become a section.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Sections(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"\n(Args|Returns|Raises|Yields):\n", r"\n\n\1:\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"\n\n(>>> .*)\Z", _as_section, text, flags=re.DOTALL)


def _as_section(match: re.Match[str]) -> str:
    return "\n\nExamples:\n" + textwrap.indent(match[1], "    ")
