"""The engine, against runners that need no model."""
