"""What the documentation shows is what happens, and every public function is documented in full."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import fastce

README = Path(__file__).parents[1] / "README.md"
MODULES = ["fastce"] + [
    module.name for module in pkgutil.iter_modules(fastce.__path__, "fastce.") if not module.name.endswith("._kernels")
]
FUNCTIONS = [getattr(fastce, name) for name in fastce.__all__ if inspect.isfunction(getattr(fastce, name))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(text):
    """The ```python blocks of a Markdown text, each with its line number."""
    for block in re.finditer(r"^```(?:python|pycon|py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start()) + 2, block.group(1)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=FLAGS).failed == 0


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
    if name != "build_info":
        ours, reference = (inspect.signature(getattr(module, name)) for module in (fastce, fastce.reference))
        assert [*ours.parameters] == [*reference.parameters]


def test_every_public_name_exists():
    assert set(fastce.__all__) >= {"cross_entropy", "cross_entropy_with_grad", "build_info", "__version__"}
    for name in fastce.__all__:
        assert hasattr(fastce, name)
    assert inspect.ismodule(fastce.reference)


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = list(python_blocks(README.read_text()))
    assert blocks
    names = {"__name__": "readme"}
    for line, source in blocks:
        if ">>>" in source:
            test = doctest.DocTestParser().get_doctest(source, names, "README.md", str(README), line)
            assert doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False).failed == 0
            names = test.globs
        else:
            exec(compile("\n" * (line - 1) + source, str(README), "exec"), names)


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.read_text().splitlines()) <= 150
