"""Systems for diffusion models and other generators."""
