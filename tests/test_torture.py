"""The long tests can be run: their faults fit the sources, their calls the package, their results find their place."""

import pytest
from torture import planted_faults, run, shared_inputs


@pytest.mark.parametrize("fault", planted_faults.FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_a_planted_fault_stands_once_in_its_file(fault):
    assert planted_faults.occurrences(fault) == 1
    assert fault.new != fault.old


@pytest.mark.parametrize("fault", planted_faults.FAULTS, ids=lambda fault: fault.name)
def test_the_tests_that_should_notice_a_fault_exist(fault):
    for test in fault.tests.split():
        name, _, function = test.partition("::")
        text = (planted_faults.ROOT / "tests" / name).read_text()
        assert not function or f"def {function}(" in text


def test_threads_that_share_inputs_call_every_function():
    shared_inputs.check_that_nothing_is_left_out()


def test_no_two_faults_have_one_name():
    assert len({fault.name for fault in planted_faults.FAULTS}) == len(planted_faults.FAULTS) >= 18


def test_every_long_test_is_run():
    helpers = {"run.py", "every_kernel.py", "shared_inputs.py", "free_threaded_python.sh", "free_threaded_fastce.sh"}
    scripts = {path.name for pattern in ("*.py", "*.sh") for path in run.HERE.glob(pattern)}
    assert scripts - helpers == set(run.SCRIPTS) and helpers < scripts


def test_a_result_takes_its_place_among_the_others(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{run.BEGIN}\nanything\n{run.END}\nafter\n")
    monkeypatch.setattr(run, "README", readme)
    run.keep("soak.py", 1, "1 leak", 2.3)
    run.keep("fuzz.py", 0, "a | b", 60)
    run.keep("soak.py", 0, "no leak", 59.6)
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", run.BEGIN] and lines[-2:] == [run.END, "after"]
    assert lines[2:4] == run.HEAD
    assert [line.split("`")[1] for line in lines[4:-2]] == ["fuzz.py", "soak.py"]
    assert lines[4].endswith("| 60 | 0 | a \\| b |") and lines[5].endswith("| 60 | 0 | no leak |")


def test_a_script_that_fails_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    tmp_path.joinpath("good.py").write_text("import sys\nprint('some')\nprint('result: 3 cases', *sys.argv[1:])\n")
    tmp_path.joinpath("bad.sh").write_text("echo halfway\nexit 7\n")
    assert run.run_script("good.py", True)[:2] == (0, "3 cases --quick")
    assert run.run_script("bad.sh", False)[:2] == (7, "no result; halfway")
    assert run.run_script("missing.py", False)[0] != 0
