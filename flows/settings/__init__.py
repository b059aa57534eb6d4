"""What can be asked for: the configuration, its flags, and what is refused."""
