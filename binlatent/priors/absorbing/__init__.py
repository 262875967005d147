"""The absorbing diffusion: a prior that reveals hidden bits over several network calls."""
