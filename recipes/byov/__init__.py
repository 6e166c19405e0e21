"""BYOV, self-supervised learning with a Bayesian student: the recipe is not in this release yet."""
