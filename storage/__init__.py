"""The content-addressed store: keys, code fingerprints, artifacts on Zarr v3, deletion."""
