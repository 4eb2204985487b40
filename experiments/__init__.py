"""Experiments, run by python -m experiments.NAME; --help lists the flags."""
