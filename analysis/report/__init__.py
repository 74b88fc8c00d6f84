"""An evaluation as an HTML report, pictures and tables."""
