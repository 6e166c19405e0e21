"""The command line: one file a command; ``render`` is the only one that imports rich."""
