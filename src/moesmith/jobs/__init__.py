"""One file per command, each reading like a recipe: the steps in order, each a call into the floors below."""
