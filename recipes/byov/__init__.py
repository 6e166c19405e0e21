"""BYOV, self-supervised learning with a Bayesian student; see README.md beside this file."""
