"""Commands for the figures and tables of the paper, and for ablations."""
