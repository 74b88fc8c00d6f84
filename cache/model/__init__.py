"""The model: its files, its tokenizer, its loading, its decoder blocks."""
