"""The version of the package, which checkpoints record."""

VERSION = "0.2.0"
