"""Experiments: run one with `python -m experiments.NAME`; --help lists flags."""
