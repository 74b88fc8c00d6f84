"""A cache as a whole: opened, listed, created, extended, verified; without a model."""
