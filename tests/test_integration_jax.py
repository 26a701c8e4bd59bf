"""optax's losses and fastce's in their place are one function of JAX: values, gradients, jit, vmap, errors."""

import importlib

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax, one of fastce's extras, is not installed")
optax = pytest.importorskip("optax", reason="optax, with which JAX is compared, is not installed")
ours = importlib.import_module("fastce.integrations.jax")
jnp = jax.numpy

CLOSE = {"float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}


def by_optax(logits, labels, axis=-1, where=None):
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis, where)
    return optax.softmax_cross_entropy(logits, labels, axis, where)


def a_batch(rng, shape, axis=-1, kind="ids", dtype="float32"):
    logits = jnp.asarray(rng.normal(0, 3, shape), dtype)
    if kind == "ids":
        return logits, jnp.asarray(rng.integers(0, shape[axis], tuple(np.delete(shape, axis))))
    return logits, jax.nn.softmax(jnp.asarray(rng.normal(0, 1, shape), dtype), axis)


def assert_same(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    close = CLOSE[one.dtype.name]
    np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["ids", "distributions"])
@pytest.mark.parametrize("dtype", CLOSE)
def test_losses_and_gradients_are_optax_s(dtype, kind, rng):
    for shape, axis in [((8, 10), -1), ((6,), 0), ((4, 7, 3), 1)]:
        logits, labels = a_batch(rng, shape, axis, kind, dtype)
        factors = jnp.asarray(rng.normal(size=tuple(np.delete(shape, axis))), dtype)
        found = []
        for function in (ours.cross_entropy, by_optax):

            def loss(z, f=function, y=labels, axis=axis, g=factors):
                losses = f(z, y, axis=axis)
                return (g * losses).sum(), losses

            found.append(jax.jit(jax.grad(loss, has_aux=True))(logits))
            found[-1] += (jax.jit(loss)(logits)[1],)
        for one, other in zip(*found, strict=True):
            assert_same(one, other)


def test_it_works_without_jit(rng):
    logits, labels = a_batch(rng, (8, 10))
    assert_same(ours.cross_entropy(logits, labels), by_optax(logits, labels))
    gradients = (jax.grad(lambda z, f=f: f(z, labels).mean())(logits) for f in (ours.cross_entropy, by_optax))
    assert_same(*gradients)


def test_rows_and_classes_are_left_out_as_in_optax(rng):
    logits, labels = a_batch(rng, (9, 6))
    rows = jnp.arange(9) % 3 > 0
    classes = jnp.asarray(rng.random((9, 6)) < 0.7).at[jnp.arange(9), labels].set(True).at[4].set(False)
    for where in (rows, classes):
        for loss in (lambda z, f, w=where: f(z, labels, where=w).sum(), lambda z, f, w=where: f(z, labels, where=w)[0]):
            mine = jax.value_and_grad(loss)(logits, ours.cross_entropy)
            theirs = jax.value_and_grad(loss)(logits, by_optax)
            for one, other in zip(mine, theirs, strict=True):
                assert_same(one, other)
    assert ours.cross_entropy(logits.at[0].set(jnp.nan), labels, where=rows)[0] == 0
    padded = jax.value_and_grad(lambda z, ids: ours.cross_entropy(z, ids, where=rows).sum())
    for one, other in zip(padded(logits, labels.at[0].set(-1)), padded(logits, labels), strict=True):
        assert_same(one, other)
    with pytest.raises(TypeError, match="integer"):
        ours.cross_entropy(logits, labels, ignore_index=1.5)


def test_ignored_ids_and_smoothing(rng):
    logits, labels = a_batch(rng, (9, 6))
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 6), 0.2)
    assert_same(ours.cross_entropy(logits, labels, label_smoothing=0.2), by_optax(logits, smooth))
    mine = ours.cross_entropy(logits, labels.at[::2].set(-100))
    assert_same(mine[1::2], by_optax(logits, labels)[1::2])
    assert not mine[::2].any()
    assert not ours.cross_entropy(logits, jnp.full(9, 255), ignore_index=255).any()


def test_vmap_gives_what_optax_s_does(rng):
    logits, labels = a_batch(rng, (3, 8, 10))

    def mapped(function, shared):
        loss = jax.value_and_grad(lambda z, y: function(z, y, axis=0).mean())
        if shared:
            return jax.jit(jax.vmap(lambda z: loss(z, labels[0, :, 0])))(logits.swapaxes(1, 2))
        return jax.vmap(jax.vmap(loss, in_axes=(1, 0)))(logits.swapaxes(1, 2)[:, :, :, None], labels[:, :, None])

    labels = labels[:, :, None]
    for one, other in zip(*(mapped(f, True) for f in (ours.cross_entropy, by_optax)), strict=True):
        assert_same(one, other)
    labels = labels[:, :, 0]
    for one, other in zip(*(mapped(f, False) for f in (ours.cross_entropy, by_optax)), strict=True):
        assert_same(one, other)


def test_a_training_by_optax_ends_with_the_same_weights(rng):
    x, y = jnp.asarray(rng.normal(size=(200, 8)), "float32"), jnp.asarray(rng.integers(0, 30, 200))
    ends = []
    for function in (ours.cross_entropy, by_optax):
        optimizer = optax.sgd(0.5, momentum=0.9)

        @jax.jit
        def step(w, state, function=function, optimizer=optimizer):
            gradient = jax.grad(lambda w: function(x @ w, y).mean())(w)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(w, updates), state

        w = jnp.zeros((8, 30))
        state = optimizer.init(w)
        for _ in range(30):
            w, state = step(w, state)
        ends.append(w)
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-5)


def test_large_batches_on_one_cpu_do_not_wait_for_themselves(run_python):
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import jax, jax.numpy as jnp; from fastce.integrations.jax import cross_entropy\n"
        "z, y = jnp.zeros((2048, 1000)), jnp.zeros(2048, int)\n"
        "f = jax.jit(jax.value_and_grad(lambda z: cross_entropy(jnp.sin(z), y).mean()))\n"
        "for _ in range(3): print(round(float(f(f(z)[1])[0]), 3))\n"
    )
    assert run_python("-c", program, timeout=100, JAX_PLATFORMS="cpu").stdout.split() == ["6.908"] * 3


# Bad input


def test_a_class_id_out_of_range_is_an_error_that_says_where(rng):
    logits, _ = a_batch(rng, (4, 5))
    for transform in (lambda f: f, jax.jit, lambda f: jax.jit(jax.grad(lambda *a: f(*a).sum()))):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"targets\[2\] = 7 is out of range for 5 classes"):
            jax.block_until_ready(transform(ours.cross_entropy)(logits, jnp.array([0, 1, 7, 4])))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_devices_are_refused(platform, rng):
    logits, labels = a_batch(rng, (4, 5))
    with pytest.raises(NotImplementedError, match=platform):
        jax.jit(ours.cross_entropy).trace(logits, labels).lower(lowering_platforms=(platform,))


def test_what_is_wrong_with_dtypes_shapes_and_options_is_said_when_the_program_is_traced(rng):
    logits, labels = a_batch(rng, (4, 5))
    for arguments, options, error, match in [
        ((labels, labels), {}, TypeError, r"logits must be floating, got int32; convert with .astype\(jnp.float32\)"),
        ((logits, labels[:3]), {}, ValueError, r"integers of shape \(4,\) or floats of shape \(4, 5\), got int32 of"),
        ((logits, labels.astype(float)), {}, ValueError, r"got float32 of shape \(4,\)"),
        ((logits, labels), {"axis": 2}, ValueError, "axis must be one of the 2 axes of logits, got 2"),
        ((logits, labels), {"label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
    ]:
        with pytest.raises(error, match=match):
            jax.eval_shape(lambda *a, o=options: ours.cross_entropy(*a, **o), *arguments)


def test_labels_have_no_derivative_and_gradients_none_of_their_own(rng):
    logits, labels = a_batch(rng, (4, 5), kind="distributions")
    with pytest.raises(TypeError, match="labels have no derivative here; use optax"):
        jax.grad(lambda y: ours.cross_entropy(logits, y).sum())(labels)
    stopped = jax.grad(lambda y: ours.cross_entropy(logits, jax.lax.stop_gradient(y)).sum())(labels)
    assert not stopped.any()
    with pytest.raises((ValueError, TypeError)):
        jax.hessian(lambda z: ours.cross_entropy(z, labels).sum())(logits)


def test_without_the_library_the_error_names_the_extra(run_python):
    program = "import sys; sys.modules['jax'] = None; import fastce; import fastce.integrations.jax"
    done = run_python("-c", program, check=False)
    assert "ImportError: fastce.integrations.jax needs jax>=" in done.stderr
    assert 'pip install "fastce[jax]"' in done.stderr
