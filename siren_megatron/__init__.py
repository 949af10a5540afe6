"""SIREN (arXiv 2509.25133) on Megatron: selective entropy regularisation for RL with verifiable rewards."""

__version__ = "0.1.0"
