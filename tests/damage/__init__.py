"""Damage and nonsense by the hundred, from fixed seeds: a clear line or the right result."""
