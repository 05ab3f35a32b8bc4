"""A method, a format and a family for lora_diffusion, found through entry points."""
