"""fastce's loss for thinc gives, over logits, the gradients of thinc's own over probabilities, and the true loss."""

import importlib

import numpy as np
import pytest
from scipy.special import log_softmax

thinc = pytest.importorskip("thinc.api", reason="thinc, one of fastce's extras, is not installed")
ours = importlib.import_module("fastce.integrations.thinc")

NAMES = ["cat", "dog", "owl", "pig", "rat"]


def a_batch(rng, rows=12):
    logits = rng.normal(0, 2, (rows, 5)).astype(np.float32)
    return logits, np.array(rng.integers(0, 5, rows))


@pytest.mark.parametrize("options", [
    {}, {"normalize": False}, {"label_smoothing": 0.2}, {"missing_value": 3}, {"missing_value": "owl", "names": NAMES},
    {"names": NAMES, "label_smoothing": 0.1, "normalize": False}, {"missing_value": 0, "label_smoothing": 0.3},
], ids=str)  # fmt: skip
def test_gradients_are_thinc_s_own_behind_a_softmax(options, rng):
    logits, ids = a_batch(rng)
    probabilities = np.exp(log_softmax(logits, 1)).astype(np.float32)
    kinds = [[NAMES[i] for i in ids]] if "names" in options else [ids, ids.tolist(), ids.astype(np.int32)]
    if not options.get("label_smoothing") and "names" not in options:
        kinds += [np.eye(5, dtype=np.float32)[ids], np.eye(5, dtype=int)[ids]]
        kinds += [rng.dirichlet(np.ones(5), 12).astype(np.float32)]
    for truths in kinds:
        mine, loss = ours.CrossEntropy(**options)(logits, truths)
        theirs = thinc.CategoricalCrossentropy(**options).get_grad(probabilities, truths)
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-7)
        assert mine.dtype == logits.dtype and type(loss) is float
        assert ours.CrossEntropy(**options).get_loss(logits, truths) == loss
        np.testing.assert_array_equal(ours.CrossEntropy(**options).get_grad(logits, truths), mine)


def test_the_loss_is_the_cross_entropy(rng):
    logits, ids = a_batch(rng)
    expected = -log_softmax(logits.astype(float), 1)[np.arange(12), ids]
    assert ours.CrossEntropy()(logits, ids)[1] == pytest.approx(expected.mean(), rel=1e-6)
    assert ours.CrossEntropy(normalize=False)(logits, ids)[1] == pytest.approx(expected.sum(), rel=1e-6)
    missing = ours.CrossEntropy(missing_value=int(ids[0]))
    assert missing(logits, ids)[1] == pytest.approx(expected[ids != ids[0]].sum() / 12, rel=1e-6)
    assert ours.CrossEntropy()(logits[:0], ids[:0])[1] == 0.0


def test_a_model_that_ends_in_linear_learns_as_one_that_ends_in_softmax(rng):
    x, ids = rng.normal(size=(60, 4)).astype(np.float32), np.array(rng.integers(0, 5, 60))
    ends = []
    softmax = thinc.CategoricalCrossentropy(), thinc.Softmax(5, 4)
    for loss, model in ((ours.CrossEntropy(), thinc.Linear(5, 4)), softmax):
        model.initialize()
        model.set_param("W", np.zeros((5, 4), np.float32))
        optimizer = thinc.SGD(0.5)
        for _ in range(30):
            guesses, backprop = model.begin_update(x)
            backprop(loss(guesses, ids)[0])
            model.finish_update(optimizer)
        ends.append(model.get_param("W"))
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-5)


def test_configurations_know_it_by_name():
    config = {"loss": {"@losses": "fastce.CrossEntropy.v1", "names": NAMES, "label_smoothing": 0.1}}
    loss = thinc.registry.resolve(config)["loss"]
    assert type(loss) is ours.CrossEntropy and loss.names == NAMES and loss.label_smoothing == 0.1


# Bad input


def test_bad_input_is_refused_by_name(rng):
    logits, ids = a_batch(rng)

    class OnGpu:
        dtype, ndim = np.dtype(np.float32), 2

        def __len__(self):
            return 12

    for loss, guesses, truths, error, match in [
        ({}, OnGpu(), ids, TypeError, "guesses must be a numpy array, got .*OnGpu; on a GPU use thinc.loss"),
        ({}, logits, OnGpu(), TypeError, "truths must be a numpy array"),
        ({}, logits.astype(int), ids, TypeError, "logits must be a float16"),
        ({}, logits, [*ids[:-1].tolist(), 5], IndexError, r"targets\[11\] = 5 is out of range for 5 classes"),
        ({}, logits, ids[:-1], ValueError, "targets must have the shape of logits without the class axis"),
        ({}, logits, ["cat"] * 12, ValueError, r"truths are strings, so the classes are needed: CrossEntropy\(names="),
        ({"names": NAMES}, logits, ["cow"] * 12, KeyError, "cow"),
        ({"label_smoothing": 0.1}, logits, np.eye(5)[ids], ValueError, "label_smoothing goes only with class ids"),
        ({"label_smoothing": 0.8}, logits, ids, ValueError, "label_smoothing must be >= 0 and < 0.8 for 5 classes"),
        ({"label_smoothing": -0.1}, logits, ids, ValueError, "label_smoothing must be >= 0"),
    ]:
        with pytest.raises(error, match=match):
            ours.CrossEntropy(**loss)(guesses, truths)


def test_without_the_library_the_error_names_the_extra(run_python):
    program = "import sys; sys.modules['thinc'] = None; import fastce; import fastce.integrations.thinc"
    done = run_python("-c", program, check=False)
    assert "ImportError: fastce.integrations.thinc needs thinc>=" in done.stderr
    assert 'pip install "fastce[thinc]"' in done.stderr
