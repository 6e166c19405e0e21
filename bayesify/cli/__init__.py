"""The command line: one file a command; ``render`` is the only one that imports rich."""

from .. import requirements

requirements.check("typer", "rich")  # an old typer fails over a type of an option
