"""griffe: a blank line before each section of a docstring, which its parser needs and this project leaves out."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\n(Args|Returns|Raises|Yields):\n", r"\n\n\1:\n", obj.docstring.value)
