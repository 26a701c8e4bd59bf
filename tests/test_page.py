"""The page of a report shows its numbers, loads nothing, and is readable in the light and in the dark."""

import os
import re
import shutil
import subprocess
from html import escape, unescape
from xml.etree import ElementTree

import numpy as np
import pytest

import fastce

matplotlib = pytest.importorskip("matplotlib")
page = pytest.importorskip("fastce._page").page
_plots = pytest.importorskip("fastce._plots")

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$x_2$ & co.", "é" * 300, "a\nb", "&amp;"]


def make_report(n_rows=400, names=None, n_classes=6, **options):
    rng = np.random.default_rng(3)
    logits, targets = 3 * rng.standard_normal((n_rows, n_classes)), rng.integers(0, n_classes, n_rows)
    logits[np.arange(n_rows), targets] += 3
    return fastce.report(logits, targets, class_names=names, **options)


@pytest.fixture(scope="module")
def report():
    return make_report(names=HOSTILE)


@pytest.fixture(scope="module")
def text(report):
    return page(report, "run <1>.npz")


STRANGE = {
    "no row counts": (np.zeros((4, 3)), [-100] * 4, "nan"),
    "nothing but nan": (np.full((4, 3), np.nan), [0] * 4, "nan"),
    "an infinite loss": (np.array([[0.0, -np.inf]]), [1], "inf"),
    "one class, no loss": (np.zeros((4, 1)), [0] * 4, "0.0000"),
}


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_the_plot_shows_the_numbers_of_the_report(report):
    figure = report.plot()
    calibration, confidence, losses, classes = figure.axes
    bins = [part for part in report.calibration_bins if part.n_rows]
    np.testing.assert_allclose(
        calibration.collections[0].get_offsets(), [(part.confidence, part.accuracy) for part in bins]
    )
    for panel, count in ((confidence, len(report.calibration_bins) - 1), (losses, None)):
        (steps,) = (patch for patch in panel.patches if isinstance(patch, matplotlib.patches.StepPatch))
        assert steps.get_data().values.sum() == pytest.approx(100)
        assert count in (None, len(steps.get_data().values))
    assert [line.get_xdata()[0] for line in losses.lines] == [report.loss, report.uniform_loss]
    assert [line.get_xdata()[0] for line in confidence.lines] == [report.mean_confidence, report.accuracy]
    worst_first = sorted(report.per_class, key=lambda part: -part.loss)
    assert [bar.get_width() for bar in classes.patches] == [part.loss for part in worst_first]
    assert [label.get_text() for label in classes.texts] == [f"{100 * part.recall:.0f} %" for part in worst_first]


def test_the_histogram_of_losses_lies_where_the_losses_are():
    losses = np.array([1e-4, 0.01, 0.5, 0.5, 3.0])
    logits = np.stack([np.zeros(5), np.log(np.expm1(losses))], axis=1)  # log(1 + e^z) is the loss of class 0
    (steps,) = fastce.report(logits, np.zeros(5, int)).plot().axes[2].patches
    shares, edges, _ = steps.get_data()
    expected, _ = np.histogram(losses, edges)
    np.testing.assert_allclose(shares, 20 * expected)


def test_equal_reports_are_equal_files(report):
    assert _plots.picture(report, "a.svg") == _plots.picture(make_report(names=HOSTILE), "a.svg")


# ---- the page ------------------------------------------------------------------------------------------------------


def read(text):
    """The letters that markup stands for; a space that must not break is a space."""
    return unescape(text).replace("\xa0", " ")


def shown_numbers(report):
    """The texts of a page that a reader looks for first."""
    yield f"{report.loss:.4f}"
    yield f"{report.uniform_loss:.4f}"
    yield f"{100 * report.accuracy:.1f} %"
    yield f"{100 * report.calibration_error:.1f} %"
    for finding in report.findings:
        yield from finding
    for row in report.worst_rows:
        yield f"{row.loss:.4f}"
    for part in report.per_class:
        yield f"{part.loss:.4f}"


def test_the_page_holds_the_report(report, text):
    assert report.findings
    for shown in shown_numbers(report):
        assert shown in read(text)


def test_names_are_text_whatever_they_hold(report, text):
    for name in HOSTILE:
        assert escape(name) in text
    tags = set(re.findall(r"<(\w+)", text))
    assert not tags & {"script", "img", "iframe", "link", "object", "b:", "image"}
    assert " onerror" not in re.sub(r">[^<]*<", "><", text)


def test_the_page_refers_to_nothing_outside(text):
    assert set(re.findall(r'(?:src|href|action|data)="([^"]*)"', re.sub(r"xlink:href", "href", text))) <= set(
        f"#{name}" for name in re.findall(r'id="([^"]*)"', text)
    )
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"<]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_pictures_take_the_colours_of_the_page(text):
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "var(--ink)" in svg and "var(--main)" in svg
        assert not set(re.findall(r"#[0-9a-f]{6}\b", svg)) & set(_plots.COLOURS.values())
    assert text.count("<svg") == 4


def test_of_thousands_of_classes_the_worst_are_shown():
    text = page(make_report(9000, n_classes=3000), "run.npz")
    assert re.search(r"the 20 largest of 2,\d\d\d", text) and re.search(r"the 10 with the largest loss", text)
    assert len(text) < 300_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", STRANGE)
def test_any_report_makes_a_page(case):
    logits, targets, loss = STRANGE[case]
    assert f"Cross-entropy<b>{loss}</b>" in page(fastce.report(logits, targets), "run.npz")


# ---- in a browser --------------------------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


def browse(path, folder, *options):
    """Open a file in a headless browser; return what it wrote: to standard output, and the lines about the page."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1400",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        *options, path.as_uri(),
    ]  # fmt: skip
    # A sanitizer that is preloaded into this process is no business of the browser's: it would not start with it.
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONMALLOC")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_a_browser_shows_the_numbers_and_has_nothing_to_complain_of(report, text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(text, "utf-8")
    document, complaints = browse(path, tmp_path, "--dump-dom")
    assert complaints == []
    shown = read(re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", document, flags=re.DOTALL)))
    for number in shown_numbers(report):
        assert number in shown
    assert "<script" not in document and document.count("<svg") == 4
    # What the page does not do would be heard of:
    path.write_text(text.replace("<h1>", '<img src="http://example.org/a.png"><script>alert(1)</script><h1>'), "utf-8")
    _, complaints = browse(path, tmp_path, "--dump-dom")
    assert any("example.org" in line for line in complaints) and len(complaints) >= 2


@needs_browser
@pytest.mark.parametrize(("scheme", "low", "high"), [("1", 0.85, 1.0), ("0", 0.05, 0.3)], ids=["light", "dark"])
def test_the_page_is_as_light_or_dark_as_the_system(scheme, low, high, text, tmp_path):
    from matplotlib.image import imread

    path, picture = tmp_path / "report.html", tmp_path / "page.png"
    path.write_text(text, "utf-8")
    browse(path, tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}")
    pixels = imread(picture)[..., :3].mean(axis=2)
    assert low < np.median(pixels) < high
    # Letters and lines stand out from the paper, and there are enough of them.
    assert np.mean(np.abs(pixels - np.median(pixels)) > 0.35) > 0.02
