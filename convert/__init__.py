"""Converters between Hugging Face, PEFT, GGUF and mlx-lm directories; installs as mlx_linearard.convert."""
