"""Reinforcement learning of language models on tokens."""

__version__ = '0.1.0'
