"""The error kinds of bayesify.

Each message says what failed, where, what was expected and what to do.
"""


class BayesifyError(RuntimeError):
    """Base of every error that bayesify raises on purpose."""


class ArgumentError(BayesifyError, ValueError):
    """An argument has a value that cannot work."""


class NoMatchError(ArgumentError):
    """A ``skip`` or ``only`` pattern matches nothing in the model, under ``strict``."""


class UnsupportedModuleError(BayesifyError, TypeError):
    """A module cannot be converted or exported, or is already converted."""


class ModelError(ArgumentError):
    """A model cannot be found or built by its name, or does not fit the given weights."""


class DataError(ArgumentError):
    """A data set cannot be found, read or used."""


class CheckpointError(BayesifyError):
    """A file cannot be read as, or written as, a bayesify checkpoint."""


class UnsupportedVersionError(BayesifyError):
    """A library is of a version that a feature does not work with."""


class NoMatchWarning(UserWarning):
    """A ``skip`` or ``only`` pattern matches nothing in the model."""


class LostPosteriorWarning(UserWarning):
    """A parameter of a converted model has no posterior, or one that is not stored or trained."""


class SigmaBelowSpacingWarning(UserWarning):
    """A sigma is below the distance of the numbers of its tensor's dtype: draws cannot show it."""


class BiasBeforeNormWarning(UserWarning):
    """A bias gets a posterior and no loss depends on it: a BatchNorm takes it off again."""
