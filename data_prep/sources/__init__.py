"""Where clips come from: each module gives the frames and the sound of one kind of source."""
