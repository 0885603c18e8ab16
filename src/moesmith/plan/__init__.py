"""Will it fit, and how: memory and time of every way to run a model, from its config alone."""
