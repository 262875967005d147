"""Converts weights of other projects to ours, and ours to the authors' format."""
