"""Make the report that the README shows: docs/report.html and docs/images/report.png.

python benchmarks/record_report.py

The network of the demo is fitted with the demo's settings (about a minute). The OOD images are the
test images turned by a quarter. The picture needs what `make browser` installs.
"""

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import bayesify
from bayesify.data import load_dataset
from bayesify.report import gather, render
from bayesify.storage import describe, read_header

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "report.html", ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1120, 1480  # of each half of the picture


def main() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    torch.set_num_threads(1)
    data = demo.load(False)
    model = bayesify.to_bbb(
        demo.new_network(0),
        prior=demo.PRIOR,
        initial_std=bayesify.RelativeStd(demo.RELATIVE_STD),
    )
    demo.fit("Bayesian network", model, data.train, demo.EPOCHS, 0, demo.BAYESIAN)
    test = load_dataset("fashion-sample", split="test")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.bbb.safetensors"
        bayesify.save(model, file, spec=demo.SPEC)
        turned = Path(folder) / "turned"
        images = torch.rot90(data.images, 1, (2, 3)).movedim(1, -1).contiguous()
        save_file({"images": images, "labels": data.labels}, f"{turned}.safetensors")
        config = bayesify.models.input_config(
            model, img_size=demo.SPEC.img_size, in_chans=demo.SPEC.in_chans
        )
        os.chdir(folder)  # so that the page names files and not this machine's folders
        report = gather(
            model, test, ood=load_dataset("turned.safetensors", split="test"),
            num_samples=demo.NUM_SAMPLES, model_config=config, title=demo.SPEC.name,
            facts=[("fitted by", "examples/demo.py"), *describe(read_header(file))],
        )  # fmt: skip
    PAGE.write_text(render(report), encoding="utf-8")
    picture()


def picture() -> None:
    """Take the picture: the head of the page in light, further down in dark."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    path = os.environ.get("BAYESIFY_BROWSER") or next(found, None)
    both = Image.new("RGB", (2 * WIDTH, HEIGHT))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for column, (scheme, place) in enumerate((("light", ""), ("dark", "#uncertainty"))):
            shown = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme
            )  # fmt: skip
            shown.emulate_media(reduced_motion="reduce")
            shown.goto(PAGE.as_uri() + place)
            with Image.open(io.BytesIO(shown.screenshot())) as half:
                both.paste(half, (column * WIDTH, 0))
        browser.close()
    both = both.resize((1600, 1600 * HEIGHT // (2 * WIDTH)), Image.Resampling.LANCZOS)
    few = both.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
