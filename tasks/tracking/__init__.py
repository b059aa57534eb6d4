"""Runs and versions in MLflow, and the pictures that go there."""
