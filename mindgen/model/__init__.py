"""The decoder, and its construction from a spec and rows."""
