"""The local web page: a clip is dropped on it, and its source is shown beside it."""
