"""avg@k, maj@k, pass@k of checkpoints, servers, samples, and during training."""
