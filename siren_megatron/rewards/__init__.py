"""(response, answer) -> reward, in worker processes with limits; the toy tasks' verifiers."""
