"""The Python door: an engine as an object. What it promises is in mindgen/llm/llm.py."""
