"""Vectors of media files and records: the command `avcl-embed`."""
