"""Training: losses, the stage trainers, metrics, and the demonstrations."""
