"""The command line: ``python -m fastce report``, ``bench`` and ``info``; ``--help`` says what each of them takes."""

import argparse
import io
import json
import signal
import sys
from pathlib import Path

from fastce import build_info
from fastce._files import FileError
from fastce._problem import IGNORE_INDEX

DONE, REFUSED, MISUSED, INTERRUPTED = 0, 1, 2, 130
EXIT_STATUS = """\
exit status:
  0  done
  1  a file cannot be used (missing, cut short, of another kind, shape or dtype, class ids out of range) or written
  2  the command line is wrong, or needs a package that is not installed
"""
ABOUT = """\
Cross-entropy on the CPU, and what it says about a model.

  python -m fastce report logits.npy targets.npy     what does my loss mean, and what is wrong?
  python -m fastce bench                             how fast is it here?
  python -m fastce COMMAND --help                    more about each command
"""
REPORT = """\
Say what the cross-entropy of saved logits means: the loss beside that of guessing, accuracy, calibration, what is wrong
and what would help, per class and per row.

  LOGITS   floats of shape (rows, classes), or with more axes of rows; the scores before any softmax
  TARGETS  the right classes: integers of shape (rows,), or floats of the logits' shape, a distribution for each row

Files end in .npy, .npz or .safetensors. Of a file with several arrays, LOGITS is the one called "logits" and TARGETS
the one called "targets", unless you name another: run.npz:val_logits. TARGETS may be left out if it is in the file of
the logits. Files may be larger than memory; those that are not compressed are read fastest.
"""
EXAMPLES = """\
examples:
  python -m fastce report logits.npy targets.npy
  python -m fastce report run.npz --html report.html
  python -m fastce report run.npz:val_logits run.npz:val_targets --class-names names.txt --plot report.png
  python -m fastce report logits.npy targets.npy --json | jq .calibration_error

to save the files:
  NumPy    np.save("logits.npy", logits); np.save("targets.npy", targets)
  PyTorch  np.save("logits.npy", logits.float().numpy(force=True))

"""


def main(arguments=None):
    """Do what the command line asks for; return the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return MISUSED
    try:
        options.run(options)
    except (FileError, MemoryError) as error:
        print(f"fastce: {str(error) or 'not enough memory'}", file=sys.stderr)
        return REFUSED
    except ImportError as error:
        print(f"fastce: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def make_parser():
    """Return the parser of the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m fastce", description=ABOUT, epilog=EXIT_STATUS, formatter_class=as_written
    )
    parser.add_argument("--version", action="version", version=f"fastce {build_info()['version']}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")

    report = commands.add_parser(
        "report", help="what the loss of saved logits means", description=REPORT, epilog=EXAMPLES + EXIT_STATUS,
        formatter_class=as_written,
    )  # fmt: skip
    report.add_argument("logits", metavar="LOGITS")
    report.add_argument("targets", metavar="TARGETS", nargs="?", help="default: the array called targets in LOGITS")
    report.add_argument("--weight", metavar="FILE", help="class weights, shape (classes,)")
    report.add_argument("--sample-weight", metavar="FILE", help="weights of the rows, in the rows' shape")
    report.add_argument(
        "--ignore-index", metavar="ID", type=int, default=IGNORE_INDEX,
        help="leave out the rows with this target (default: %(default)s)",
    )
    report.add_argument("--class-names", metavar="FILE", help="a text file with the name of a class on every line")
    report.add_argument("--json", action="store_true", help="print JSON instead of text; null where there is no number")
    report.add_argument("--html", metavar="FILE", type=new_file, help="also write a page with pictures, one file")
    report.add_argument("--plot", metavar="FILE", type=new_picture, help="also draw the pictures: .png, .svg or .pdf")
    report.set_defaults(run=run_report)

    bench = commands.add_parser(
        "bench", help="how fast fastce is on this machine", epilog=EXIT_STATUS, formatter_class=as_written,
        description="Time the loss and its gradient: fastce, NumPy, and what is installed of SciPy, scikit-learn,\n"
        "PyTorch and JAX. They must agree before they are timed, and take turns.",
    )  # fmt: skip
    bench.add_argument("--seconds", type=positive, default=20.0, help="about how long it takes (default: 20)")
    bench.set_defaults(run=run_bench)

    info = commands.add_parser(
        "info", help="the build and how it runs here", epilog=EXIT_STATUS, formatter_class=as_written,
        description="Print fastce.build_info(): version, CPU target in use and those available, threads.",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run_info)
    return parser


def positive(text):
    """Return the positive number that a text says; argparse turns the error into one about the option."""
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"must be positive and below a million, got {text}")
    return number


def new_file(text):
    """Return a path whose folder is there, so that it can be written when the work is done."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}")
    return text


def new_picture(text):
    """Return a path that ends like a picture."""
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"a picture ends in .png, .svg or .pdf, got {text}")
    return new_file(text)


def run_report(options):
    """Read the files, print the report, write the page and the picture."""
    from fastce._files import write_whole
    from fastce._reading import report_on_files

    if options.plot or options.html:  # what is not installed is better known before the files are read
        from fastce import _page, _plots
    report = report_on_files(
        options.logits, options.targets, weight=options.weight, sample_weight=options.sample_weight,
        ignore_index=options.ignore_index, class_names=options.class_names, progress=True,
    )
    if options.plot:
        write_whole(options.plot, _plots.picture(report, options.plot))
    if options.html:
        write_whole(options.html, _page.page(report, options.logits).encode())
    print(report.to_json(indent=2) if options.json else report)


def run_bench(options):
    """Print the table, a line at a time."""
    from fastce._bench import bench

    for line in bench(options.seconds):
        print(line, flush=True)


def run_info(options):
    """Print what build_info() says."""
    info = build_info()
    if options.json:
        print(json.dumps(info, indent=2))
        return
    for name, value in info.items():
        print(f"{name + ':':<20}{', '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that goes (head, less) ends this quietly
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of classes that a terminal cannot show
    sys.exit(main())
