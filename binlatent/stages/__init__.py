"""The two stages: their state and their pure steps."""
