"""Binary Latent Diffusion (Wang et al., CVPR 2023) for JAX and Flax."""
