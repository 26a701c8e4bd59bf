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
FUNCTIONS = [fastce.cross_entropy, fastce.cross_entropy_with_grad, fastce.build_info]
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


def test_signatures_are_the_documented_ones():
    options = "axis=-1, ignore_index=-100, reduction='mean', denominator=None, num_threads=None"
    of_gradient = f"{options}, grad_output=None, out=None"
    for function, expected in (
        (fastce.cross_entropy, options),
        (fastce.cross_entropy_with_grad, of_gradient),
        (fastce.reference.cross_entropy, options),
        (fastce.reference.cross_entropy_with_grad, of_gradient),
    ):
        signature = inspect.signature(function)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert str(signature) == f"(logits, targets, *, {expected})"


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
