"""The token stream that the model reads: sequences, documents, splits, kept positions."""
