"""Registry, restore, export, model card."""
