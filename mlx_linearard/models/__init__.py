"""Model directories: found, checked, loaded and written; their layers, adapters, and the pair of both models."""
