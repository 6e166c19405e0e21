"""``python -m bayesify.recipes.byov``, which torchrun can start."""

from .cli import app

app(prog_name="bayesify recipe byov")
