"""The absorbing diffusion: a prior that reveals hidden bits, a few at each network call."""
