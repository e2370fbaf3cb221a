"""Tasks, one file each: what is fitted, what is scored, what the scores mean."""
