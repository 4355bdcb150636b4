__version__ = "0.1.0"
"""str: the version of this package, as in its metadata."""
