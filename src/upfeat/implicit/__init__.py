"""Features of one image as a function of the place: what they are, and how they are fitted."""
