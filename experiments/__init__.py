"""Experiments: python -m experiments.NAME; --help lists the flags."""
