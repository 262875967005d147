"""The training loop that both stages share: state, optimiser, checkpoints, log."""
