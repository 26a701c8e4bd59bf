"""The examples run, learn, and leave a picture behind."""

import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ["train_digits.py", "word_lm.py"]


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
