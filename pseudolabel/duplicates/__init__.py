"""Which images are the same: what is kept of an image, how its like is searched for, and the file of what was found."""
