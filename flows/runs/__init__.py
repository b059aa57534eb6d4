"""What a command does: opened once, its pipeline built once, then run."""
