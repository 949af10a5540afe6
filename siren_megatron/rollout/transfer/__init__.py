"""How new weights reach vLLM's workers: chunks of packed tensors, a transport for each way to move them."""
