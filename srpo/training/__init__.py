"""The training loop: dataset, losses, checkpoints, divergence."""
