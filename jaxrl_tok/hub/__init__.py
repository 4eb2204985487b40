"""Directories of models: fetched, opened, read, adapted, written, exported."""
