"""The model's head (final norm and unembedding): read off the model, kept as data, run by numpy or torch."""
