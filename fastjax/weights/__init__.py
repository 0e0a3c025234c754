"""Weights in from and out to Hugging Face checkpoints. Knows nothing of training."""
