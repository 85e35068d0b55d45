"""Loading base models, adapters and files of the Hub."""
