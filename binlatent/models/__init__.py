"""Flax Linen modules only."""
