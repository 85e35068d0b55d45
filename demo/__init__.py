"""How the tiny world in data/ was made: pictures, captions, a small SDXL and two small CLIPs. Not needed to run srpo."""
