"""Training, shared by both stages: loop, state, optimiser, checkpoints, log."""
