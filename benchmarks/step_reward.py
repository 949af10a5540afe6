"""The reward of benchmarks/step.py: cheap, and not the same for all of a group."""


def grade(response: str, answer: str) -> float:
    """1 where an even number of different words came, else 0."""
    return float(len(set(response.split())) % 2 == 0)
