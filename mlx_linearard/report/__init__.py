"""The report of a run: its content, its charts, and the files that are written."""
