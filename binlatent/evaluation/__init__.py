"""Metrics as pure functions, feature networks and evaluators."""
