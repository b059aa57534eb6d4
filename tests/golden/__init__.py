"""The numbers that methods gave when they were checked against their papers."""
