"""From labels to checkpoints: chips, losses, metrics, the loop."""
