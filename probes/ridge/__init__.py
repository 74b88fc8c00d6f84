"""Ridge regression from moments."""
