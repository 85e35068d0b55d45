"""Release of rounds: model registry, restore, export, model card."""
