"""Pages and pictures that a command makes (`make docs`), so that they cannot be wrong for long."""
