"""Measures the speed, FLOPs and memory of the programs."""
