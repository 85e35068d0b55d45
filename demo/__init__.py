"""How the tiny world in data/ was made: images, captions, a small SDXL, two small CLIPs. Not needed to run srpo."""
