"""Whether the bayesify that is installed here works: it imports, draws and has its C library.

    python -I installed.py                      fails without the C library
    python -I installed.py --without-library    fails unless plain torch draws, with one warning

It needs nothing of a checkout: `benchmarks/distribution.py` and cibuildwheel run it in environments
of their own. `-I` keeps the folder it lies in, and where it is started, out of the search path.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path


def main() -> None:
    import bayesify

    if "torch" in sys.modules:
        sys.exit("import bayesify has imported torch.")
    place = Path(bayesify.__file__)
    if "site-packages" not in place.parts:
        sys.exit(f"bayesify comes from {place}, not from an installation.")
    import torch

    from bayesify.kernels import native

    wanted = "--without-library" not in sys.argv
    torch.manual_seed(0)
    model = bayesify.to_bbb(torch.nn.Linear(300, 200), initial_std=math.exp(-2.0))
    x = torch.ones(2, 300)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = model(x), model(x)
        loss = bayesify.elbo_loss(first.square().mean(), model, num_data=10)
        loss.backward()
    said = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
    if torch.equal(first, second):
        sys.exit("Two draws are equal.")
    if any(p.grad is None for p in model.parameters()):
        sys.exit("A parameter has no gradient.")
    if native.there() is not wanted or len(said) != (not wanted):
        sys.exit(f"C library: {native.there()}, wanted: {wanted}; warnings: {said}")
    kind = f"its C library {native.FILE}" if wanted else "plain torch, and said so once"
    print(f"bayesify {bayesify.__version__} on Python {sys.version.split()[0]}, "
          f"torch {torch.__version__}: draws by {kind}")  # fmt: skip


if __name__ == "__main__":
    main()
