"""Floor 4: fine-tuning."""
