"""A run's own checkpoints: saving, choosing, checking, resuming."""
