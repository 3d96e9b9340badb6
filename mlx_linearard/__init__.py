"""mlx-linearard: longer context windows for RoPE language models on Apple Silicon, restored by distillation."""

__version__ = "0.1.0"
