"""Convert a timm model and fine-tune its posterior on real images.

    python examples/finetune_timm.py

Published weights need a network: with one, give `pretrained=True` to `create_model`. Without, the
model is first fitted as it is, which takes the place of the published weights here.
"""

from torch.utils.data import Subset

import bayesify
from bayesify.data import load_dataset
from bayesify.models import input_config
from bayesify.training import Evaluation


def main(images: int = 1500, epochs: int = 3) -> list[Evaluation]:
    model = bayesify.create_model("test_resnet", num_classes=10, in_chans=1)
    config = input_config(model, img_size=28, in_chans=1)
    train, test = (
        load_dataset("fashion-sample", split=split).dataset(config) for split in ("train", "test")
    )
    train, test = Subset(train, range(images)), Subset(test, range(images))
    bayesify.fit(model, train, epochs=epochs, batch_size=50, lr=3e-3)
    [before] = bayesify.evaluate(model, test)

    # BatchNorm stays as it is; the prior stands around the weights that we come with.
    prior = bayesify.GaussianPrior(0.3, mean="initial", relative=True)
    share = bayesify.plan(model, skip="BatchNorm*", prior=prior).share
    print(f"{share:.1%} of the parameters get a posterior")
    model = bayesify.to_bbb(model, skip="BatchNorm*", prior=prior)
    bayesify.fit(
        model, train, epochs=epochs, batch_size=50, lr=3e-4, logvar_lr=3e-2, kl_weight=0.02,
        on_start=print,
    )  # fmt: skip

    rows = [before, *bayesify.evaluate(model, test, num_samples=10)]
    for row in rows:
        print(
            f"{row.prediction:15} accuracy {row.accuracy:.1%}  NLL {row.nll:.3f}  ECE {row.ece:.3f}"
        )
    return rows


if __name__ == "__main__":
    main()
