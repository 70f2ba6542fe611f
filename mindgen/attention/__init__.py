"""Attention over a paged cache: one backend a file."""
