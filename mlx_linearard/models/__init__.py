"""Model directories: found, checked, loaded and written; their layers and adapters; the pair of teacher and student."""
