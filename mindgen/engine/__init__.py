"""Continuous batching: requests in, tokens and text out, step by step."""
