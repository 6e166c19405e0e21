"""Training recipes built on the public names of bayesify, imported as ``bayesify.recipes``."""
