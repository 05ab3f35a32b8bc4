"""`python -m lora_diffusion`: the command line."""

from lora_diffusion.cli import main

if __name__ == "__main__":
    main()
