"""Baselines: code that users would write without this project, tuned as by an expert."""
