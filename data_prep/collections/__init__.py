"""How collections are listed: each module reads one kind of list into a manifest."""
