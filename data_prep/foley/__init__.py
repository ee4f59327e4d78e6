"""Foley: a seeded generator of small videos whose sounds and pictures belong together."""

from data_prep.foley.command import FoleyError, add_arguments, run

__all__ = ["FoleyError", "add_arguments", "run"]
