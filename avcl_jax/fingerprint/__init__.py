"""Finding the source of a transformed clip: an index of media, and a search in it."""
