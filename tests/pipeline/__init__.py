"""What people get, from a command to a folder that loads."""
