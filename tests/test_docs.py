"""What the documentation shows is what happens, and every public function is documented in full."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import fastce
from fastce import integrations

README = Path(__file__).parents[1] / "README.md"
TRAINERS = README.parent / "docs" / "trainers.md"  # needs other libraries, and has a test of its own
PAGES = [README, *sorted(page for page in TRAINERS.parent.glob("*.md") if page != TRAINERS)]
MODULES = ["fastce"] + [
    module.name for module in pkgutil.iter_modules(fastce.__path__, "fastce.") if not module.name.endswith("._kernels")
]
INTEGRATIONS = [module.name for module in pkgutil.iter_modules(integrations.__path__, "fastce.integrations.")]
FUNCTIONS = [getattr(fastce, name) for name in fastce.__all__ if inspect.isfunction(getattr(fastce, name))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(text):
    """The ```python blocks of a Markdown text, each with its line number."""
    for block in re.finditer(r"^```(?:python|pycon|py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start()) + 2, block.group(1)


@pytest.mark.thread_unsafe(reason="doctest replaces sys.stdout and linecache")
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=FLAGS).failed == 0


@pytest.mark.thread_unsafe(reason="doctest replaces sys.stdout and linecache")
@pytest.mark.parametrize("name", INTEGRATIONS)
def test_examples_of_integrations_hold(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    assert doctest.testmod(module).failed == 0


def section_of(documentation, name):
    """The text of one section of a numpydoc docstring, without its heading."""
    found = re.search(rf"^{name}\n-+\n(.*?)(?=^\w+\n-+$|\Z)", documentation, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_are_documented_with_examples(function):
    documentation = inspect.getdoc(function)
    signature = inspect.signature(function)
    sections = ["Returns", "Examples"] + (["Parameters", "Raises"] if signature.parameters else [])
    for section in sections:
        assert section_of(documentation, section).strip(), f"no section {section}"
    described = re.findall(r"^(\w[\w, ]*?)(?: : .*)?$", section_of(documentation, "Parameters"), re.MULTILINE)
    assert ", ".join(described).split(", ") == [*signature.parameters] or not signature.parameters
    finder = doctest.DocTestFinder(recurse=False)
    assert any(test.examples for test in finder.find(function)), "no example that can be run"


# What is made of losses, and is compared with other libraries instead.
NOT_LOSSES = {"build_info", "init_bias", "report"}
SOFTMAX_OPTIONS = (
    "axis=-1, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0, logit_scale=1.0, softcap=None, "
    "z_loss=0.0, class_mask=None, reduction='mean', denominator=None, num_threads=None"
)
BINARY_OPTIONS = (
    "pos_weight=None, sample_weight=None, label_smoothing=0.0, reduction='mean', denominator=None, num_threads=None"
)
GRADIENT = "grad_output=None, out=None"
SIGNATURES = {
    "cross_entropy": f"logits, targets, *, {SOFTMAX_OPTIONS}",
    "cross_entropy_with_grad": f"logits, targets, *, {SOFTMAX_OPTIONS}, {GRADIENT}",
    "cross_entropy_with_grad_hess": f"logits, targets, *, {SOFTMAX_OPTIONS}, {GRADIENT}, hess_out=None",
    "binary_cross_entropy": f"logits, targets, *, {BINARY_OPTIONS}",
    "binary_cross_entropy_with_grad": f"logits, targets, *, {BINARY_OPTIONS}, {GRADIENT}",
    "cross_entropy_from_probs": "probs, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, "
    "reduction='mean', denominator=None, num_threads=None",
    "binary_cross_entropy_from_probs": "probs, targets, *, sample_weight=None, reduction='mean', denominator=None, "
    "num_threads=None",
    "softmax": "logits, axis=-1, *, out=None, num_threads=None",
    "log_softmax": "logits, axis=-1, *, out=None, num_threads=None",
    "logsumexp": "logits, axis=-1, *, keepdims=False, num_threads=None",
    "build_info": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_documented_ones(name):
    modules = [fastce] if name == "build_info" else [fastce, fastce.reference]
    for module in modules:
        signature = inspect.signature(getattr(module, name))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert str(signature) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", [name for name in fastce.__all__ if inspect.isfunction(getattr(fastce, name))])
def test_the_reference_defines_every_function(name):
    if name not in NOT_LOSSES:
        ours, reference = (inspect.signature(getattr(module, name)) for module in (fastce, fastce.reference))
        assert [*ours.parameters] == [*reference.parameters]


def test_every_public_name_exists():
    assert set(fastce.__all__) >= {"cross_entropy", "cross_entropy_with_grad", "build_info", "__version__"}
    for name in fastce.__all__:
        assert hasattr(fastce, name)
    assert inspect.ismodule(fastce.reference)


@pytest.mark.thread_unsafe(reason="doctest replaces sys.stdout and linecache")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documentation_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = list(python_blocks(page.read_text()))
    assert blocks
    names = {"__name__": "page"}
    for line, source in blocks:
        if ">>>" in source:
            test = doctest.DocTestParser().get_doctest(source, names, page.name, str(page), line)
            assert doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False).failed == 0
            names = test.globs
        else:
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), names)


def test_the_sample_report_in_the_readme_has_the_lines_of_a_report():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 4, (2000, 10)), rng.integers(0, 10, 2000)
    sample = re.search(r"^```text\n(2,000 rows, 10 classes\n.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    shown = {line.strip().split("  ")[0] for line in str(fastce.report(logits, ids)).splitlines()}
    labels = [line.strip().split("  ")[0] for line in sample.splitlines() if "overconfident" not in line]
    assert set(labels) - shown == {"divide the logits by 1.691: the loss falls from 1.0460 to about 0.9172"}


@pytest.mark.parametrize("source", [source for _, source in python_blocks(TRAINERS.read_text())])
def test_python_in_the_page_of_trainers_runs(source):
    for package in re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE):
        pytest.importorskip(package, reason=f"{package}, which this block needs, is not installed")
    exec(compile(source, str(TRAINERS), "exec"), {"__name__": "trainers"})


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.read_text().splitlines()) <= 150


CATALOGUE = {"S": 14, "T": 17, "L": 12, "V": 24, "G": 11, "O": 10, "B": 15, "H": 14, "P": 19, "I": 19}
TESTS = Path(__file__).parent


def catalogue_of_faults():
    """Yield (fault, what its tests are) of every row of the table in the tests' README."""
    section = (TESTS / "README.md").read_text().split("## The catalogue of faults\n")[1].split("\n## ")[0]
    for row in re.findall(r"^\|(.*)\|$", section, re.MULTILINE)[2:]:
        fault, _, tests = (cell.strip() for cell in row.split("|"))
        yield fault, tests


def test_every_fault_of_the_catalogue_is_listed_once():
    expected = [f"{kind}{number}" for kind, count in CATALOGUE.items() for number in range(1, count + 1)]
    assert [fault for fault, _ in catalogue_of_faults()] == expected


@pytest.mark.parametrize(("fault", "tests"), list(catalogue_of_faults()))
def test_the_tests_of_every_fault_exist(fault, tests):
    if tests.startswith("Not "):  # a sentence that says why there is none
        assert tests.endswith(".") and len(tests.split()) >= 8 and "`test_" not in tests
        return
    for test in tests.split(", "):
        if re.fullmatch(r"`torture/\w+\.(py|sh)`", test):
            assert (TESTS / test.strip("`")).is_file()
            continue
        named = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", test)
        assert named, f"{test} names no test"
        module = ast.parse((TESTS / named[1]).read_text())
        assert named[2] in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}, test
