"""Images and their sets: named ones, a caller's, stored and streamed ones, and the split of a run."""
