"""Ranges that a function and the command in front of it share; light, since `ioubal --help` reads them."""

SYNTHETIC_EDGE = (32, 2048)
"""Pixels of a synthetic image."""
