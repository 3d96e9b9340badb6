"""Exact losses and attention in linear memory. No file here knows a model."""
