"""The head of a model (final norm, unembedding): read off it, kept as data, run without it."""
