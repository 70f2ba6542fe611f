"""Weights: what a parameter is, where it comes from, how it is split, and how it is written."""
