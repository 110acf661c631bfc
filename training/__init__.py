"""Losses, response log-probabilities, batches, and the Ray Train worker around DeepSpeed."""
