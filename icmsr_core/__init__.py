"""ICM-SR: one-step diffusion super-resolution. The mathematics, without ComfyUI and without training."""

__version__ = "0.1.0"
