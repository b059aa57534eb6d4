"""Ways to better a truncated layer with more than its own decomposition knows."""
