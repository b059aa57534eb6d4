"""What the mathematics guarantees, on made-up layers."""
