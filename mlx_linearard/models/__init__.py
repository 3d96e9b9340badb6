"""Model directories: read, checked, written; their layers, adapters, and the pair of teacher and student."""
