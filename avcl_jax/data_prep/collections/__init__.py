"""Collections: each module reads one kind of list into a manifest."""
