"""Files: the names that rooms share, reading with one-line errors, and writing that is complete or absent.

Every failure of reading, parsing or writing a named file becomes a UserError that names the file:

- `read_text`, `read_json`, `read_object`, `read_config`, `read_json_lines` and `read_yaml` read a complete file;
- `parse_json` parses text that was read another way, and `reading` guards any other code that reads a file;
- `locked` keeps other processes out of a file or directory;
- `write_text`, `write_json`, `new_file` and `new_directory` write, and `disk_errors` guards any other code that writes.
"""

from __future__ import annotations

from .locks import locked
from .names import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    LOCK,
    MARKER,
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    RunDir,
)
from .reading import (
    check_file,
    parse_json,
    read_config,
    read_json,
    read_json_lines,
    read_object,
    read_text,
    read_yaml,
    reading,
    without_surrogates,
)
from .writing import (
    add_file,
    check_overwrite,
    disk_errors,
    existing_parent,
    is_as_added,
    new_directory,
    new_file,
    refuse_existing,
    remember,
    remembered,
    sweep,
    write_json,
    write_text,
)

__all__ = [
    "ADAPTERS",
    "ADAPTER_CONFIG",
    "CARD",
    "CONFIG",
    "GENERATION_CONFIG",
    "LOCK",
    "MARKER",
    "TOKENIZER_FILES",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "RunDir",
    "add_file",
    "check_file",
    "check_overwrite",
    "disk_errors",
    "existing_parent",
    "is_as_added",
    "locked",
    "new_directory",
    "new_file",
    "parse_json",
    "read_config",
    "read_json",
    "read_json_lines",
    "read_object",
    "read_text",
    "read_yaml",
    "reading",
    "refuse_existing",
    "remember",
    "remembered",
    "sweep",
    "without_surrogates",
    "write_json",
    "write_text",
]
