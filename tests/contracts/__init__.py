"""What every method, family, command and page promises."""
