"""Ways to divide one budget among the layers."""
