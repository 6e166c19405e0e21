"""What the numbers of an evaluation depend on, beside the run; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bayesify.settings import Shown, Within
from bayesify.settings.fields import Count, NotNegative, Positive, Seed, Whole, checked, refuse

_TWO = Within(least=2)


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """The linear classifier on frozen features.

    Args:
        seed: Seed of draws, of the classifiers' batches, and of what is held out.
        epochs: Passes of the linear classifier over the features.
        learning_rates: Of the linear classifier, to choose among.
    """

    seed: Seed = 0
    epochs: Count = 80
    learning_rates: tuple[Positive, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        refuse("This evaluation cannot work", checked(self))


@dataclass(frozen=True, kw_only=True)
class EvalSettings(HeadSettings):
    """An evaluation.

    Args:
        num_samples: Draws K of the MC average; 0 leaves it out.
        finetune_epochs: Passes over the images when all is trained.
        finetune_lr: Highest learning rate then.
    """

    num_samples: Annotated[Whole, Shown(letter="-k")] = 30
    finetune_epochs: Count = 10
    finetune_lr: Positive = 1e-3


@dataclass(frozen=True, kw_only=True)
class UncertaintySettings:
    """How much is drawn for figures 1b, 4, 5 and 7; the defaults are the paper's where it says one.

    Args:
        spread_draws: Draws K of figure 1b. Paper: 1000
        pool: Draws that figure 5 takes its samples from. Assumed
        most: Largest K of figure 5. Paper: 50
        bootstraps: Samples of each K in figure 5. Paper: 50
        latent_draws: Draws M of figure 7. Paper: 50
        corrupted_draws: Draws K of figure 4, centre and right; 0 measures at the means alone.
            Assumed
        images: Test images of figures 4 (centre, right), 5 and 7; 0 is all. Paper: all
        pruned_images: Test images of figure 4, left; 0 is all. Paper: all
        noises: Standard deviations of figure 7's noise, of pixels in [0, 1]. Assumed
        shifted: Augmentations of figure 5 beside none, at severity 3. Paper names none
        seed: Seed of all of it.
    """

    spread_draws: Annotated[int, _TWO] = 1000
    pool: Annotated[int, _TWO] = 1000
    most: Annotated[int, _TWO] = 50
    bootstraps: Count = 50
    latent_draws: Annotated[int, _TWO] = 50
    corrupted_draws: Whole = 0
    images: Whole = 0
    pruned_images: Whole = 0
    noises: tuple[NotNegative, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    shifted: tuple[str, ...] = ("shear", "gaussian noise", "salt and pepper", "blur", "contrast")
    seed: Seed = 0

    def __post_init__(self) -> None:
        refuse("These figures cannot work", checked(self))
