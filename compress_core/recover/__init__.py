"""Training of what a compressed model stores, whichever method compressed it."""
