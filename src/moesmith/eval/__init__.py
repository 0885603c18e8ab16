"""Floor 4: measure what a model can do."""
