"""The activation cache: extraction, the format on disk, and reading without the model."""
