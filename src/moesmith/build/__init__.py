"""Floor 4: make a Mixture-of-Experts model out of dense ones."""
