"""What a run needs and takes, before it starts: placement, memory of each GPU, estimated time."""
