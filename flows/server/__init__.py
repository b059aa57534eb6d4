"""Prefect for one command, without a server of the user's."""
