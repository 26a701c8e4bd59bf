"""autograd's derivative of fastce's cross-entropy is that of the same loss written in autograd's NumPy."""

import importlib

import numpy
import pytest

import fastce

autograd = pytest.importorskip("autograd", reason="autograd, one of fastce's extras, is not installed")
np = importlib.import_module("autograd.numpy")
special = importlib.import_module("autograd.scipy.special")
ours = importlib.import_module("fastce.integrations.autograd")
pytestmark = pytest.mark.thread_unsafe(reason="autograd numbers its traces for all threads at once")


def by_hand(logits, ids, weight, reduction):
    """The loss in autograd's own NumPy, which differentiates it."""
    rows = np.arange(len(ids))
    losses = weight[ids] * (special.logsumexp(logits, axis=1) - logits[rows, ids])
    return {"none": losses, "sum": np.sum(losses), "mean": np.sum(losses) / weight[ids].sum()}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradients_are_those_of_the_loss_written_by_hand(reduction, dtype, rng):
    x, ids = rng.normal(size=(20, 4)).astype(dtype), numpy.array(rng.integers(0, 6, 20))
    w, weight, factor = rng.normal(size=(4, 6)).astype(dtype), rng.random(6), rng.normal(size=20)

    def loss(w, function):
        value = function(np.dot(x, w))
        return np.sum(factor * value) if reduction == "none" else 0.7 * value

    found = [
        autograd.value_and_grad(loss)(w, lambda z: ours.cross_entropy(z, ids, weight=weight, reduction=reduction)),
        autograd.value_and_grad(loss)(w, lambda z: by_hand(z, ids, weight, reduction)),
    ]
    for one, other in zip(*found, strict=True):
        numpy.testing.assert_allclose(one, other, rtol=1e-12 if dtype == numpy.float64 else 2e-5)
    assert found[0][1].dtype == dtype


def test_every_option_of_fastce_goes_through(rng):
    from autograd.test_util import check_grads

    logits = rng.normal(size=(3, 5, 4))
    options = {
        "axis": 1, "ignore_index": [2, -1], "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5, "softcap": 3.0,
        "sample_weight": rng.random((3, 4)), "class_mask": numpy.arange(5)[:, None] != 1,
    }
    ids = numpy.array(rng.choice([0, 2, 3, 4, -1], (3, 4)))
    assert ours.cross_entropy(logits, ids, **options) == fastce.cross_entropy(logits, ids, **options)
    check_grads(lambda z: ours.cross_entropy(z, ids, **options), modes=["rev"], order=1)(logits)
    q = rng.random((3, 5, 4))
    check_grads(lambda z: ours.cross_entropy(z, q, axis=1, reduction="none"), modes=["rev"], order=1)(logits)


def test_a_training_ends_with_the_same_weights(rng):
    x, ids = rng.normal(size=(100, 4)), numpy.array(rng.integers(0, 6, 100))
    ends = []
    for function in (ours.cross_entropy, lambda z, ids: by_hand(z, ids, numpy.ones(6), "mean")):
        gradient = autograd.grad(lambda w, f=function: f(np.dot(np.tanh(x), w), ids))
        w = numpy.zeros((4, 6))
        for _ in range(50):
            w -= gradient(w)
        ends.append(w)
    numpy.testing.assert_allclose(*ends, rtol=1e-10, atol=1e-12)


# Bad input


def test_what_has_no_derivative_says_so_and_what_to_do(rng):
    logits, q, s = rng.normal(size=(4, 5)), rng.random((4, 5)), rng.random(4)
    remedy = r"; write the loss with autograd\.scipy\.special\.logsumexp"
    with pytest.raises(NotImplementedError, match="targets has no derivative here" + remedy):
        autograd.grad(lambda q: ours.cross_entropy(logits, q))(q)
    with pytest.raises(NotImplementedError, match="sample_weight has no derivative here" + remedy):
        autograd.grad(lambda s: ours.cross_entropy(logits, q, sample_weight=s))(s)
    with pytest.raises(NotImplementedError, match="cross-entropy has no derivative here" + remedy):
        autograd.hessian(lambda z: ours.cross_entropy(z, q))(logits)


def test_errors_are_fastce_s_and_come_with_the_call(rng):
    logits = rng.normal(size=(4, 5))
    for targets, error in [([0, 1, 2, 5], IndexError), ([0, 1], ValueError), (numpy.zeros(4), TypeError)]:
        with pytest.raises(error) as expected:
            fastce.cross_entropy(logits, targets)
        for call in (ours.cross_entropy, lambda z, y: autograd.grad(lambda z: ours.cross_entropy(z, y))(z)):
            with pytest.raises(error) as found:
                call(logits, targets)
            assert str(found.value) == str(expected.value)


def test_without_the_library_the_error_names_the_extra(run_python):
    program = "import sys; sys.modules['autograd'] = None; import fastce; import fastce.integrations.autograd"
    done = run_python("-c", program, check=False)
    assert "ImportError: fastce.integrations.autograd needs autograd>=" in done.stderr
    assert 'pip install "fastce[autograd]"' in done.stderr
