"""SEAM 3: model families. One file a family: its components, names, prompts, latents and loss."""
