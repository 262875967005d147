"""Other projects' weights into ours, and back."""
