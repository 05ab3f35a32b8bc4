"""Training: configuration, objective, batches, loop, checkpoints."""
