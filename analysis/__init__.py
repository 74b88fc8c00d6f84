"""What the probes say: metrics, evaluation, pictures and reports."""
