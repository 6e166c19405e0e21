"""Appendix B: how much the gradient varies with the draw, by estimator and batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesify import ArgumentError, one_draw, posteriors

from ..data.batches import Views, train_views
from ..data.training import configs_of
from ..data.views import TwoViews
from ..evaluation.monte_carlo import moments
from ..evaluation.runs import Run, stored
from ..model import Student, build_student, convert_
from ..objective import byol_loss
from ..runtime.seeds import Stream, seed_of

ESTIMATORS = ("weight", "local", "flipout")


def gradient_noise(
    run: Run,
    *,
    batch_sizes: Sequence[int] = (16, 64, 256),
    draws: int = 16,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    r"""Variance of the loss's gradient over draws, at one batch of each size, by estimator.

    .. math:: \sum_i \mathrm{Var}(g_i) \; / \; \sum_i \mathrm{E}(g_i)^2

    summed over the means of the posterior, the square of the mean gradient being freed of the
    variance that is left in it. Images and views are the same for all draws and estimators, so
    that nothing but the draw of the weights varies. Writes ``results/gradients.json``.

    Args:
        run: A run of BYOV.
        batch_sizes: Images.
        draws: Of each.
        seed: Of draws and views.
        on_progress: Gets a line now and then.

    Reference:
        Turishcheva et al., 2023, arXiv:2312.03213, appendix B; Wen et al., 2018, arXiv:1803.04386.
    """
    if not isinstance(run.model, Student) or not run.config.bayesian or run.teacher is None:
        raise ArgumentError(f"{run.folder} is no run of BYOV, whose gradient this measures.")
    kept = [b for b in batch_sizes if b <= run.source.num_images]

    def measure() -> dict[str, Any]:
        rows = []
        for estimator in ESTIMATORS:
            model = _rebuilt(run, estimator)
            for size in kept:
                on_progress(f"gradients by {estimator}, {size} images")
                views = _views(run, size, seed)
                found = moments(
                    _gradient(run, model, views, seed_of(Stream.MEASURED, seed, draw))
                    for draw in range(draws)
                )
                variance = float(found.std(1).square().sum())
                signal = float(found.mean.square().sum()) - variance / draws
                rows.append({"estimator": estimator, "batch": size, "variance": variance,
                             "relative": variance / signal if signal > 0 else None})  # fmt: skip
        return {"rows": rows}

    settings = {"batch_sizes": kept, "draws": draws, "seed": seed}
    return stored(run, "gradients", settings, measure)


def _rebuilt(run: Run, estimator: str) -> nn.Module:
    """The student with the same posterior and another estimator, in training mode."""
    with torch.random.fork_rng(devices=[]):
        plain = build_student(run.config, run.source.num_classes)
    model = convert_(plain, replace(run.config, estimator=estimator))
    model.load_state_dict(run.model.state_dict())
    return model.to(run.device).train()


def _views(run: Run, size: int, seed: int) -> Views:
    """The first batch of an epoch, as training sees it."""
    views = TwoViews(*configs_of(run.config, run.source))
    return next(
        train_views(
            run.source,
            batch_size=size,
            seed=seed,
            epoch=0,
            views=views,
            device=run.device,
            workers=run.workers,
        )
    )


def _gradient(run: Run, model: nn.Module, views: Views, seed: int) -> Tensor:
    """The gradient of BYOL's loss by all posterior means, as one vector on the CPU."""
    teacher: Any = run.teacher
    with torch.no_grad():
        targets = [teacher.projector(teacher.encoder(v)) for v in (views.first, views.second)]
    means = [p.mean for p in posteriors(model) if p.mean.requires_grad]
    with torch.enable_grad(), one_draw(model, seed):
        first, second = model(views.first, views.second)
        loss = byol_loss(first.prediction, second.prediction, *targets)
        found = torch.autograd.grad(loss, means, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(m).flatten() if g is None else g.flatten()
         for g, m in zip(found, means, strict=True)]
    ).cpu()  # fmt: skip
