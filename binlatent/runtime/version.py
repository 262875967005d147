"""The version of the package, which checkpoints name."""

VERSION = "0.2.0"
