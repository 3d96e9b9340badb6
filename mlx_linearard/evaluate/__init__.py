"""Measurements of a model on text and tasks; one file a suite."""
