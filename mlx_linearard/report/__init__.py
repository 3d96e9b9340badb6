"""The report of a run: read a run directory, choose the content, draw the charts, and write HTML, Markdown and
the model card."""
