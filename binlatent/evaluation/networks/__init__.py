"""The networks whose features judge images."""
