"""Units, keys and runs of them: what decides whether something has to be computed."""
