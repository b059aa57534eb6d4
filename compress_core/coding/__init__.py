"""Numbers rounded to codes of few bits: what that costs, and how it costs least."""
