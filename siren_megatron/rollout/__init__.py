"""vLLM for the rollouts: the server, its client, its health, and its weights after each update."""
