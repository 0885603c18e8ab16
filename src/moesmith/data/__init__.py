"""Floor 3: rows of text, conversations, token masks."""
