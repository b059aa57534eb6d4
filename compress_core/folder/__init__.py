"""Folders of compressed models: written, loaded, exported; kinds of parts speak for themselves."""
