"""The content-addressed store: keys, code fingerprints, artifacts on Zarr v3 and their garbage collection."""
