"""Text and conversations in any supported form -> documents -> a token stream -> blocks that a cursor can resume.

- `read_documents` and `read_pieces` read a source: files, folders, hub data sets, in the forms that mlx-lm reads too;
- `read_stream` and `tokenize` make tokens of documents, the same as mlx-lm's own data set classes do;
- `Blocks`, `windows` and `split` cut a stream for training and for measuring.

Text is read and tokenized in pieces, so memory does not grow with the length of a file, compressed or not.
"""

from __future__ import annotations

from .blocks import Blocks, block_at, hash_of, split, windows
from .chat import has_template
from .forms import FORMS, open_text, read_lines
from .hub import HUB_PREFIX
from .rows import COMPLETIONS, CONVERSATIONS, PROSE, TEXT, Conversation, Document, TextRow, kind_of, text_of, texts_of
from .sources import EVALUATED, TRAINED, VALIDATED, has_split, python_prose, read_documents, read_pieces
from .stream import Stream, read_stream, tokenize
from .tokens import Tokenizer, check_ids, encode, first_token, tokenizer_errors

__all__ = [
    "COMPLETIONS",
    "CONVERSATIONS",
    "EVALUATED",
    "FORMS",
    "HUB_PREFIX",
    "PROSE",
    "TEXT",
    "TRAINED",
    "VALIDATED",
    "Blocks",
    "Conversation",
    "Document",
    "Stream",
    "TextRow",
    "Tokenizer",
    "block_at",
    "check_ids",
    "encode",
    "first_token",
    "has_split",
    "has_template",
    "hash_of",
    "kind_of",
    "open_text",
    "python_prose",
    "read_documents",
    "read_lines",
    "read_pieces",
    "read_stream",
    "split",
    "text_of",
    "texts_of",
    "tokenize",
    "tokenizer_errors",
    "windows",
]
