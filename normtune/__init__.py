"""normtune: find your own max_norm for gradient clipping."""
