"""Foley: a seeded generator of small videos whose audio belongs to their frames."""
