"""Adaptation to one task whose examples lie in files: `metaloom adapt`."""
