"""Training: configuration, optimizers and schedules, averaged weights, checkpoints, and the one trainer of all objectives."""
