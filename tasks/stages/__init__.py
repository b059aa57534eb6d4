"""The stages: each reads arrays, calls the core and puts arrays."""
