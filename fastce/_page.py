"""The page of a loss report: one file with its style and pictures inside, light or dark like the reader's system."""

from html import escape

from fastce._plots import COLOURS, PANELS, svg_of
from fastce._version import __version__
from fastce.loss_report import nats, number, percent

__all__ = ["page"]

# Nothing may be loaded: the page shows what is in it, and nobody learns that it was opened.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
DARK = {"ink": "#e6edf3", "faint": "#3d444d", "main": "#6cb0f2", "contrast": "#f0a35e"}
STYLE = """
:root { color-scheme: light dark; LIGHT --paper: #ffffff; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { DARK --paper: #12161b; --card: #1c2229; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.3; }
h2 { margin: 1.6rem 0 0.6rem; font-size: 1.2rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
small, footer { font-size: 0.875rem; opacity: 0.8; }
.tiles, .pictures, .tables { display: grid; gap: 0.8rem; margin: 1.2rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); }
.pictures, .tables { grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); }
.tile, .finding, figure { margin: 0; padding: 0.8rem 1rem; border-radius: 0.5rem; background: var(--card); }
.tile b { display: block; font-size: 1.7rem; line-height: 1.3; }
.finding { margin: 0.6rem 0; border-left: 0.3rem solid var(--contrast); }
figure svg { display: block; width: 100%; height: auto; }
figure text { font-family: system-ui, sans-serif !important; }
figcaption { font-size: 0.875rem; }
section { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 1.2rem 0.25rem 0; border-bottom: 1px solid var(--faint); text-align: right; }
th { font-weight: 600; }
th:first-child, td:first-child, .notes td:last-child { text-align: left; }
td { max-width: 9rem; overflow-wrap: break-word; }
.notes td { max-width: 16rem; }
.notes td:nth-child(2) { white-space: nowrap; }
footer { margin-top: 2.5rem; }
"""
CAPTIONS = (
    "Predictions by the confidence that the model has in them, and how many of those are right. Below the dotted line "
    "it is surer than it should be.",
    "A model that knows how good it is has a mean confidence as large as its accuracy.",
    "Rows to the right of equal chances are wrong with confidence; a few of them may make most of the mean.",
    "Where the loss comes from. A class that is not found at all is one that the model does not know.",
)


def page(report, source):
    """Return the page about a LossReport as text; `source` says what it is a report on."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Loss report: {escape(source)}</title>",
            f"<style>{style()}</style>",
            "<h1>What the loss means</h1>",
            f"<p>{escape(source)}: {escape(report.summary())}</p>",
            f'<div class="tiles">{"".join(tiles(report))}</div>',
            *findings(report),
            "<h2>Pictures</h2>",
            f'<div class="pictures">{"".join(pictures(report))}</div>',
            f'<div class="tables">{"".join(map(table, report.sections()))}</div>',
            f"<footer>fastce {__version__}. Losses are in nats.</footer>",
            "</html>",
            "",
        ]
    )


def style():
    """Return the style sheet with both sets of colours."""

    def variables(colours):
        return " ".join(f"--{name}: {value};" for name, value in colours.items())

    return STYLE.replace("LIGHT", variables(COLOURS)).replace("DARK", variables(DARK))


def tiles(report):
    """Yield the four numbers to look at first, each beside what it is compared with."""
    for label, value, beside in (
        ("Cross-entropy", nats(report.loss), f"equal chances: {nats(report.uniform_loss)}"),
        ("Perplexity", number(report.perplexity), f"classes: {report.n_classes:,}"),
        ("Accuracy", percent(report.accuracy), f"most frequent class: {percent(report.majority_accuracy)}"),
        ("Calibration error", percent(report.calibration_error), f"mean confidence: {percent(report.mean_confidence)}"),
    ):
        yield f'<div class="tile">{label}<b>{value}</b><small>{together(beside)}</small></div>'


def findings(report):
    """Yield the findings, or that there are none."""
    yield "<h2>Findings</h2>"
    for found in report.findings:
        what, remedy = escape(found.message), escape(found.fix)
        yield f'<div class="finding"><p><b>{escape(found.code)}</b></p><p>{what}</p><p>{remedy}</p></div>'
    if not report.findings:
        yield "<p>Nothing looks wrong.</p>"


def pictures(report):
    """Yield the pictures with their captions, in colours that follow the style sheet."""
    for draw, caption in zip(PANELS, CAPTIONS, strict=True):
        svg = svg_of(draw, report)
        for name, colour in COLOURS.items():
            svg = svg.replace(colour, f"var(--{name})")
        yield f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(section):
    """Return a section of the report as a table."""
    heads = f"<tr>{cells(section.heads, 'th')}</tr>" if section.heads else ""
    lines = "\n".join(f"<tr>{cells(line, 'td')}</tr>" for line in section.lines)
    kind = "" if section.heads else ' class="notes"'
    return f"<section><h2>{escape(section.title)}</h2><table{kind}>{heads}\n{lines}\n</table></section>"


def cells(texts, tag):
    """Return a line of a table without its ends."""
    return "".join(f"<{tag}>{together(escape(text))}</{tag}>" for text in texts)


def together(text):
    """Return a text whose numbers are not parted from their per cent signs at the end of a line."""
    return text.replace(" %", "&nbsp;%")
