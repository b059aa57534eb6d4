"""Folders of compressed models: written, loaded, exported; none of it asks for a kind of part."""
