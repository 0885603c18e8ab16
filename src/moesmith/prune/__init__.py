"""Floor 4: which experts matter, and which to drop."""
