"""What architectures and checkpoints look like. Imports from ops and experts only."""
