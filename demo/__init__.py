"""How the tiny world in data/ was made: pictures, captions, a small SDXL, two small CLIPs. Not needed to run srpo."""
