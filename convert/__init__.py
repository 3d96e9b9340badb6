"""Converters of models and adapters between Hugging Face, PEFT, GGUF and mlx-lm; installs as mlx_linearard.convert."""
