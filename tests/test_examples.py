"""The examples run, learn, and leave a picture behind."""

import os
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [
    "train_digits.py",
    "word_lm.py",
    "reinforce_gridworld.py",
    "distill_digits.py",
    "accumulate_gradients.py",
    "segment_shapes.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_and_saves_its_picture(script, run_python, tmp_path):
    done = run_python(str(EXAMPLES / script), "--quick", "--out", str(tmp_path), MPLBACKEND="Agg")
    pictures = list(tmp_path.glob("**/*.png"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
        assert picture.name in done.stdout
    # The loss is compared with that of knowing nothing, log C.
    assert re.search(r"\blog [\d,]+ = [\d.]+ nats", done.stdout)


@pytest.mark.parametrize(
    ("example", "spoiled"),
    {
        "reinforce_gridworld": "QUICK_WANTED = 1.0",  # no walk costs less than that of the best policy
        "distill_digits": "fastce.softmax = lambda logits: 0 * logits + 0.1",  # a teacher without an opinion
        "accumulate_gradients": "accumulated = mean_of_means",
        "segment_shapes": "LEARNING_RATE = 0.0",
    }.items(),
)
def test_an_example_whose_claim_does_not_hold_fails(example, spoiled, run_python, tmp_path):
    program = f"import {example} as example; exec({spoiled!r}, vars(example)); example.main()"
    environment = {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "MPLBACKEND": "Agg"}
    done = run_python("-c", program, "--quick", "--out", str(tmp_path), check=False, **environment)
    # The claim is checked after all has been reported, and says in a sentence what does not hold.
    assert done.returncode == 1 and "Picture:" in done.stdout
    assert re.search(r"\w.*\.$", done.stderr.strip()) and "Traceback" not in done.stderr


def test_every_example_is_listed_here():
    runnable = {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert runnable == {*SCRIPTS, *TENSOR_SCRIPTS, *TREE_SCRIPTS, "softmax_regression.py"}


# Each trains twice, with the library's own loss and with fastce's.
TENSOR_SCRIPTS = {
    "torch_linear.py": ("torch",),
    "jax_digits.py": ("jax", "optax", "sklearn"),
    "autograd_digits.py": ("autograd", "sklearn"),
    "thinc_digits.py": ("thinc.api", "sklearn"),
}


@pytest.mark.parametrize("script", TENSOR_SCRIPTS)
def test_an_example_of_a_library_learns_the_same_with_either_loss(script, run_python):
    for package in TENSOR_SCRIPTS[script]:
        pytest.importorskip(package, reason=f"{package}, which this example needs, is not installed")
    printed = run_python(str(EXAMPLES / script), "--quick").stdout
    first, last = map(float, re.search(r"^fastce +loss ([\d.]+) -> ([\d.]+)", printed, re.MULTILINE).groups())
    assert last < 0.7 * first
    same = re.search(r"at most (\S+) nats apart|read (0) of 450 test digits differently", printed)
    assert float(same[1] or same[2]) < 1e-4


# Each grows trees with the library's own objective and with fastce's, and ends with exit code 1 if they differ.
TREE_SCRIPTS = {"xgboost_digits.py": "xgboost", "lightgbm_digits.py": "lightgbm"}


@pytest.mark.parametrize("script", TREE_SCRIPTS)
def test_an_example_of_boosting_grows_the_same_trees_with_either_loss(script, run_python):
    pytest.importorskip(TREE_SCRIPTS[script])
    printed = run_python(str(EXAMPLES / script), "--quick", OMP_NUM_THREADS="1").stdout
    assert "The trees are the same." in printed
    losses = [float(loss) for loss in re.findall(r"test loss ([\d.]+) nats", printed)]
    assert len(losses) >= 3 and min(losses) < 0.4 * 2.303


def test_softmax_regression_finds_the_coefficients_of_scikit_learn(run_python):
    printed = run_python(str(EXAMPLES / "softmax_regression.py"), "--quick", OMP_NUM_THREADS="1").stdout
    apart = [float(number) for number in re.findall(r"at most (\S+) apart", printed)]
    assert len(apart) == 2 and max(apart) < 1e-5
