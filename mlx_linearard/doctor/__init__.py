"""What this machine is, whether the loss is exact on it, and how fast training is: `python -m mlx_linearard.doctor`."""
