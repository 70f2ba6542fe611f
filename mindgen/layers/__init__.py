"""Layers: modules built from a row and a tensor-parallel group."""
