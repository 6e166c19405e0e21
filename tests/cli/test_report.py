"""report/ and `bayesify report`: its numbers, and the page that shows them."""

from __future__ import annotations

import base64
import importlib.util
import io
import itertools
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import bayesify
from bayesify.cli.app import app
from bayesify.data import ImageData, prepare
from bayesify.errors import ArgumentError
from bayesify.metrics import Interval
from bayesify.models import InputConfig
from bayesify.report import Report, gather, render
from bayesify.report.page import findings

pytest.importorskip("matplotlib")

CLASSES = ("<script>alert(1)</script>", 'a "quoted" & $\\frac{1}{2}$ class', "plain")
CONFIG = InputConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


class Pictures:
    """Images whose class is their brightest colour, more or less."""

    def __init__(self, count: int, noise: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        pixels = 90 + noise * torch.randn(count, 3, 8, 8, generator=generator)
        shift = noise * torch.randn(count, 3, generator=generator)
        pixels += 40 * nn.functional.one_hot(self.labels, 3)[..., None, None]
        self.images = (pixels + shift[..., None, None]).clamp(0, 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def pictures(count: int = 120, noise: float = 30.0, seed: int = 1) -> ImageData:
    return ImageData("folder/of/pictures", "test", CLASSES, Pictures(count, noise, seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.stem(x)).relu().mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    converted = bayesify.to_bbb(Net(), skip="BatchNorm*", initial_std=math.exp(-1.5))
    bayesify.fit(
        converted, pictures(240, seed=0).dataset(CONFIG), epochs=4, batch_size=24, lr=3e-2,
        logvar_lr=1e-3, kl_weight=0.1,
    )  # fmt: skip
    return converted


@pytest.fixture(scope="module")
def report(model: nn.Module) -> Report:
    others = ImageData("others", "all", CLASSES, Pictures(60, 90.0, 2))
    facts = [("file", "<i>net</i>")]
    return gather(
        model, pictures(), ood=others, num_samples=5, seed=3, batch_size=50, resamples=400,
        model_config=CONFIG, facts=facts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render(report)


def inputs(data: ImageData) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(data.read(i) for i in range(len(data))), strict=True)
    return prepare(torch.stack(images), CONFIG), torch.tensor(labels)


# -- numbers ---------------------------------------------------------------------------------


def test_the_table_is_that_of_evaluate(model: nn.Module, report: Report) -> None:
    rows = bayesify.evaluate(
        model, pictures(), num_samples=5, seed=3, batch_size=50, model_config=CONFIG,
        control=True, resamples=400,
    )  # fmt: skip
    assert [row.prediction for row in report.rows] == [row.prediction for row in rows]
    for found, expected in zip(report.rows, rows, strict=True):
        assert found.draws == expected.num_samples
        assert found.temperature == expected.temperature
        assert (found.intervals is None) == (expected.intervals is None)
        for name, interval in (expected.intervals or {}).items():
            assert (found.intervals or {})[name] == pytest.approx(interval, rel=1e-6)
        for name, value in found.values.items():  # draws run one by one or together: rounding
            assert value == pytest.approx(getattr(expected, name), rel=1e-6)
    assert float(report.information.mean()) == pytest.approx(rows[-1].mutual_information)
    assert 0.4 < report.rows[-1].values["accuracy"] < 0.99, "the cases below need mistakes"


def test_bins_and_their_intervals(model: nn.Module, report: Report) -> None:
    x, labels = inputs(pictures())
    summary = bayesify.predict(model, x, num_samples=5, seed=3, reduce="probabilities")
    confidence, predicted = (v.double().numpy() for v in summary.mean.max(1))
    hits = predicted == labels.numpy()
    index = np.ceil(confidence * 15).astype(int)
    bins = report.rows[-1].bins
    assert [round(b.upper * 15) for b in bins] == sorted(set(index))
    for found in bins:
        inside = hits[index == round(found.upper * 15)]
        assert found.size == len(inside)
        assert found.accuracy == pytest.approx(inside.mean())
        # the bootstrap of a share is a binomial, up to 400 resamples: two counts to either side
        ends = stats.binom(len(inside), inside.mean()).ppf([0.025, 0.975]) / len(inside)
        assert found.interval == pytest.approx(tuple(ends), abs=2.01 / len(inside))


def test_the_difference_to_the_control_is_paired(report: Report) -> None:
    average, control = report.rows[-1], report.rows[1]
    gaps = (average.examples.nll - control.examples.nll).numpy()
    ends = average.difference
    assert ends is not None
    half = 1.96 * gaps.std() / np.sqrt(len(gaps))
    assert (ends.low, ends.high) == pytest.approx(
        (gaps.mean() - half, gaps.mean() + half), abs=0.25 * half
    )
    assert report.rows[0].difference is None
    excess = (average.examples.confidence - average.examples.hit).numpy()
    half = 1.96 * excess.std() / np.sqrt(len(excess))
    assert tuple(average.excess) == pytest.approx(
        (excess.mean() - half, excess.mean() + half), abs=0.25 * half
    )


def test_ood_images(model: nn.Module, report: Report) -> None:
    assert report.ood is not None
    x, _ = inputs(ImageData("others", "all", CLASSES, Pictures(60, 90.0, 2)))
    known, _ = inputs(pictures())
    inside, outside = (
        bayesify.predict(model, v, num_samples=5, seed=3, reduce="probabilities")
        for v in (known, x)
    )
    torch.testing.assert_close(report.ood.entropy, outside.predictive_entropy)
    expected = {
        "entropy, MC average": (inside.predictive_entropy, outside.predictive_entropy),
        "mutual information": (inside.mutual_information, outside.mutual_information),
        "1 - largest probability, MC average": (
            -inside.mean.max(1).values, -outside.mean.max(1).values
        ),
    }  # fmt: skip
    found = {d.score: d.auroc for d in report.ood.scores}
    for score, (low, high) in expected.items():
        u = stats.mannwhitneyu(high.numpy(), low.numpy()).statistic
        assert found[score] == pytest.approx(u / (len(x) * len(known)), abs=1e-3)


def test_layers(model: nn.Module, report: Report) -> None:
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    assert [layer.name for layer in report.layers] == [
        "stem.weight", "stem.bias", "head.weight", "head.bias"
    ]  # fmt: skip
    for layer in report.layers:
        sigma = np.exp(0.5 * state[f"{layer.name}_logvar"])
        ratio = np.abs(state[layer.name]) / sigma
        assert layer.sigma == pytest.approx(sigma.mean(), rel=1e-5)
        assert layer.snr == pytest.approx(np.sort(ratio.flat)[(ratio.size - 1) // 2], rel=1e-5)
        assert layer.below_one == pytest.approx((ratio < 1).mean())
        assert layer.rms == pytest.approx(np.sqrt((state[layer.name] ** 2).mean()), rel=1e-5)
        assert float(layer.sigma_counts.sum()) == pytest.approx(1.0)
        centre = np.log10(np.median(sigma))
        top = int(layer.sigma_counts.argmax())
        assert abs(-6.0 + 8.0 * (top + 0.5) / 64 - centre) < 0.3
        assert layer.pruned == 0.0
    assert [layer.owner for layer in report.layers] == ["Conv2d", "Conv2d", "Linear", "Linear"]
    assert report.left_out == (("skipped: BatchNorm*", 2, 12),)


def test_pruned_weights_are_left_out_of_sigma_and_snr(model: nn.Module) -> None:
    pruned = bayesify.prune_(bayesify.to_bbb(bayesify.to_deterministic(model)), 0.5)
    found = gather(
        pruned, pictures(12), num_samples=2, resamples=2, model_config=CONFIG, pruning=False
    )
    layer = found.layers[0]
    assert layer.pruned == 0.5
    assert layer.sigma > 0
    assert np.isfinite(layer.snr)
    assert "50.0%" in render(found)


def test_examples(model: nn.Module, report: Report) -> None:
    x, labels = inputs(pictures())
    summary = bayesify.predict(model, x, num_samples=5, seed=3, reduce="probabilities")
    entropy, predicted = summary.predictive_entropy, summary.mean.argmax(1)
    assert report.surest[0].index == int(entropy.argmin())
    assert report.least_sure[0].index == int(entropy.argmax())
    for chosen, sign in ((report.surest, 1), (report.least_sure, -1)):
        assert len(chosen) == len({example.index for example in chosen}) == 6
        values = [sign * example.entropy for example in chosen]
        assert values == sorted(values)
        assert {e.predicted for e in chosen} == {CLASSES[c] for c in set(predicted.tolist())}
    wrong = (predicted != labels).nonzero()[:, 0]
    assert report.sure_and_wrong[0].index == int(wrong[entropy[wrong].argmin()])
    for example in (*report.surest, *report.least_sure, *report.sure_and_wrong):
        i = example.index
        assert example.label == CLASSES[labels[i]]
        assert example.right == bool(predicted[i] == labels[i])
        assert example.entropy == pytest.approx(float(entropy[i]), abs=1e-5)
        assert dict((n, p) for n, p, _ in example.bars) == pytest.approx(
            dict(zip(CLASSES, summary.mean[i].tolist(), strict=True)), abs=1e-5
        )
        assert torch.equal(example.image, pictures().read(i)[0])
    assert not any(example.right for example in report.sure_and_wrong)


def test_the_pruning_curve(model: nn.Module, report: Report) -> None:
    assert len(report.curve) == 3 * 6 * 2
    found = [r for r in report.curve if (r["score"], r["sparsity"]) == ("magnitude", 0.5)]
    pruned = bayesify.to_bbb(bayesify.to_deterministic(model), skip="BatchNorm*")
    pruned.load_state_dict(model.state_dict())
    bayesify.prune_(pruned, 0.5, score="magnitude")
    expected = bayesify.evaluate(
        pruned, pictures().dataset(CONFIG), num_samples=5, seed=3, batch_size=50
    )
    for row, other in zip(found, expected, strict=True):
        assert (row["prediction"], row["accuracy"]) == (other.prediction, other.accuracy)
        assert row["nll"] == pytest.approx(other.nll, rel=1e-6)


def test_pictures(report: Report) -> None:
    """Small images are kept to the pixel, large ones made small."""
    cases = [
        ((1, 28, 28), (28, 28), "png"),
        ((3, 30, 60), (60, 30), "png"),
        ((3, 600, 300), (112, 224), "jpeg"),
        ((1, 500, 500), (224, 224), "jpeg"),
    ]
    pixels = [torch.randint(256, shape, dtype=torch.uint8) for shape, _, _ in cases]
    shown = tuple(
        replace(report.surest[0], index=1000 + i, image=image) for i, image in enumerate(pixels)
    )
    found = list(Reader(render(replace(report, surest=shown, curve=()))).named("img"))
    for i, ((_, size, kind), stored) in enumerate(zip(cases, pixels, strict=True)):
        source = next(image["src"] for image in found if f"Image {1000 + i}," in image["alt"])
        head, _, content = source.partition(",")
        assert head == f"data:image/{kind};base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == size
            if kind == "png":
                read = torch.from_numpy(np.array(image)).reshape(*stored.shape[1:], -1)
                assert torch.equal(read.movedim(-1, 0), stored)


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        (Interval(-0.2, -0.1), "The draws beat temperature scaling"),
        (Interval(0.1, 0.2), "Temperature scaling, one number, beats the draws"),
        (Interval(-0.1, 0.2), "no clear difference"),
    ],
)
def test_findings_follow_the_interval(report: Report, ends: Interval, verdict: str) -> None:
    changed = replace(report, rows=(*report.rows[:-1], replace(report.rows[-1], difference=ends)))
    line = next(line for line in findings(changed) if verdict in line)
    # whichever won, each number says whose it is
    draws, scalar = (report.rows[i].values["nll"] for i in (-1, 1))
    assert f"{draws:.3f} nats with the draws, {scalar:.3f} with the scalar" in line


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        (Interval(0.01, 0.2), "it says more than it knows"),
        (Interval(-0.2, -0.1), "it says less than it knows"),
        (Interval(-0.1, 0.2), "no more and no less than it knows"),
    ],
)
def test_calibration_follows_the_interval(report: Report, ends: Interval, verdict: str) -> None:
    changed = replace(report, rows=(*report.rows[:-1], replace(report.rows[-1], excess=ends)))
    assert verdict in findings(changed)[0]


@pytest.mark.parametrize("resamples", [0, 1, 1.5])
def test_bad_arguments(model: nn.Module, resamples: Any) -> None:
    with pytest.raises(ArgumentError, match="resamples must be a whole number of at least 2"):
        gather(model, pictures(), resamples=resamples, model_config=CONFIG)


# -- the page --------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Gathers the tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, *names: str) -> Iterator[dict[str, str]]:
        return (attributes for tag, attributes in self.tags if tag in names)


def test_the_page_is_one_file(page: str) -> None:
    read = Reader(page)
    assert len(page.encode()) < 2e6
    assert not list(read.named("script", "iframe", "object", "link")) or all(
        link["href"] == "data:," for link in read.named("link")
    )
    for _, attributes in read.tags:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), attributes
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_the_page_can_be_read_aloud(page: str) -> None:
    read = Reader(page)
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids)), "an id twice"
    for _, attributes in read.tags:
        for key in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(key, ids[0]) in ids
        for key in ("href", "xlink:href"):
            target = attributes.get(key, "")
            assert not target.startswith("#") or target[1:] in ids
    assert all(image["alt"] for image in read.named("img"))
    assert all(s["role"] == "img" and s["aria-labelledby"] for s in read.named("svg"))
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert next(iter(read.named("html")))["lang"] == "en"
    assert next(iter(read.named("a")))["class"] == "skip"
    assert all("scope" in cell for cell in read.named("th"))


def test_the_page_shows_what_was_measured(report: Report, page: str) -> None:
    text = Reader(page).text
    for row in report.rows:
        assert f"{row.values['nll']:.4f}" in text
        assert f"{row.values['accuracy']:.2%}" in text
    assert all(layer.name in text for layer in report.layers)
    assert "skipped: BatchNorm* (12 weights in 2 tensors)" in text
    assert "pictures" in text
    assert "K = 5, seed 3, batches of 50" in text
    assert sum(tag == "svg" for tag, _ in Reader(page).tags) == 6


def test_names_from_outside_are_escaped(page: str) -> None:
    assert "<script" not in page
    assert "<i>net</i>" not in page
    text = Reader(page).text
    assert CLASSES[0] in text
    assert CLASSES[1] in text


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "DejaVu" not in svg
        colours = set(re.findall(r"(?:fill|stroke): (#\w+)", svg))
        assert colours == set(), "a colour that does not follow the page"
    used = set(re.findall(r"var\((--\w+)\)", page))
    defined = set(re.findall(r"(--\w+):", page))
    assert used <= defined


def test_the_same_report_is_the_same_page(report: Report, page: str) -> None:
    assert render(report) == page


def test_less_is_shown_where_less_was_measured(model: nn.Module) -> None:
    """One image, of another size, in grey: no control, no OOD images, no curve, no tenth."""
    small = gather(
        model, pictures(1), num_samples=1, resamples=2, model_config=CONFIG, pruning=False
    )
    assert [row.prediction for row in small.rows] == ["at the means", "MC average"]
    read = Reader(render(small))
    assert sum(tag == "svg" for tag, _ in read.tags) == 4
    assert "was not measured" in read.text
    assert "What can be pruned" not in read.text


def test_no_mistakes(model: nn.Module) -> None:
    x, _ = inputs(pictures(30, 0.0))
    source = Pictures(30, 0.0, 1)
    with torch.no_grad():
        source.labels = bayesify.predict(
            model, x, num_samples=3, seed=0, reduce="probabilities"
        ).mean.argmax(1)  # fmt: skip
    data = ImageData("right", "test", CLASSES, source)
    found = gather(
        model, data, num_samples=3, resamples=2, model_config=CONFIG, pruning=False
    )  # fmt: skip
    assert found.rows[-1].values["accuracy"] == 1.0
    assert found.sure_and_wrong == ()
    assert "Sure and wrong" not in render(found)


# -- the command -----------------------------------------------------------------------------


def run(*arguments: object, code: int = 0) -> Result:
    environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=environment)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted model and two data sets, one of colour and one of grey images of another size."""
    monkeypatch.chdir(tmp_path)
    run("convert", "test_efficientnet_gn", "--num-classes", 3, "--img-size", 32, "--quiet")
    source = Pictures(24, 30.0, 0)
    save_file({"images": source.images.movedim(1, -1).contiguous(), "labels": source.labels},
              "data.safetensors")  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        Image.new("L", (40, 20), 100).save(tmp_path / "grey" / name / "0.png")
    return tmp_path


def test_the_command(folder: Path) -> None:
    command = ("report", "test_efficientnet_gn.bbb.safetensors", "data.safetensors", "-k", 2)
    options = ("--ood", "grey", "--no-pruning", "--resamples", 2)
    result = run(*command, *options)
    assert re.fullmatch(r"Wrote report\.html \(\d+ KiB\): open it in a browser\.\n", result.stdout)
    assert "was the model trained on these images?" in result.stderr
    text = Reader(Path("report.html").read_text("utf-8")).text
    for words in ("How far can the uncertainty of test_efficientnet_gn be trusted?",
                  "data.safetensors",
                  "1 - largest probability, at the means", "N(0, 1", "torch"):  # fmt: skip
        assert words in text
    run(*command, *options, code=1)  # it exists
    assert run(*command, *options, "--force", "--quiet", "--out", "report.html").stdout == ""


def test_the_command_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("report", "test_efficientnet_gn.bbb.safetensors")
    assert "There is no data set" in run(*command, "nowhere", code=2).stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = run(*command, "data.safetensors", code=2).stderr
    assert "jinja2 and matplotlib: pip install 'bayesify[report]'" in message
    assert not Path("report.html").exists()


# -- in a browser ----------------------------------------------------------------------------


def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("BAYESIFY_BROWSER") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; a network that it could reach is not needed and not used."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: run `make browser`")
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(
                executable_path=browser_path(), args=["--no-sandbox"]
            )  # fmt: skip
        except api.Error as error:
            pytest.skip(f"no Chromium ({str(error).splitlines()[0]}): run `make browser`")
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (375, "dark"), (1200, "light")])
def test_in_a_browser(browser: Any, page: str, tmp_path: Path, width: int, scheme: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme
    )  # fmt: skip
    shown = context.new_page()
    heard: list[str] = []
    shown.on("console", lambda message: heard.append(message.text))
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("request", lambda request: heard.append(request.url[:60])
             if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
    shown.goto(file.as_uri())
    shown.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert heard == []

    # nothing is wider than the screen but what scrolls by itself
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    outside = shown.evaluate(
        """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroller, .track')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []

    # the keyboard: the skip link first, then the sections; what scrolls can be reached
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    assert shown.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    outline = shown.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "main"
    assert shown.evaluate(
        "[...document.querySelectorAll('.scroller')].every(e => e.tabIndex === 0 &&"
        " (e.ariaLabel || e.getAttribute('aria-labelledby')))"
    )

    # text against its ground: 4.5 to 1 (WCAG 2.2, 1.4.3)
    for selector in ("body", ".note", ".tile dt", "figcaption p", ".is-right", ".is-wrong",
                     "a[href]", "svg text"):  # fmt: skip
        assert contrast(shown, selector) >= 4.5, selector

    image = tmp_path / "page.png"
    shown.screenshot(path=image, full_page=True)
    with Image.open(image) as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    ground = int(np.bincount(pixels.ravel()).argmax())
    assert (ground > 200) == (scheme == "light")
    inked = (np.abs(pixels - ground) > 60).mean(1) > 0
    assert inked.mean() > 0.4, "the page is nearly blank"
    context.close()


def contrast(shown: Any, selector: str) -> float:
    """The ratio of luminances between an element's text and what it stands on."""
    colours = shown.eval_on_selector(
        selector,
        """e => { const ink = getComputedStyle(e); let at = e, ground = '';
        while (at && (!ground || ground === 'rgba(0, 0, 0, 0)')) {
            ground = getComputedStyle(at).backgroundColor; at = at.parentElement; }
        return [e.closest('svg') ? ink.fill : ink.color, ground]; }""",
    )

    def luminance(colour: str) -> float:
        values = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)
