"""A small generated shop to try everything on, without a download."""
