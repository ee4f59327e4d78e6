"""Benchmarks: each prints a table of measured values and writes them as JSON rows."""
