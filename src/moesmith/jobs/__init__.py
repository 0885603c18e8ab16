"""One file per command, each reading like a recipe: the steps in order, every step a call into the floors below."""
