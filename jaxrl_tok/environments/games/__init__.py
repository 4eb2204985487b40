"""Games: one file each, pure Python, with an optimum or a scripted player."""
