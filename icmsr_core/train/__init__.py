"""Training: data, losses, loop and checkpoints. Imported by the scripts in `train/` only."""
