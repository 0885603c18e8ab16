"""What leaves the toolkit: merged checkpoints, adapters and GGUF files that other programs read."""
