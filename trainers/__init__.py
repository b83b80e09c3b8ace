"""Training: losses, metrics, and the stage trainers of DALI and VIP-ANT."""
