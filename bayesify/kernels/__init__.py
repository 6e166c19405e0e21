"""The draw of weights: noise keyed by seed, parameter and element, and what is made of it."""

from .noise import noise as noise
