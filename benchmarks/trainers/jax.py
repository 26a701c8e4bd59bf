"""JAX: a compiled step of a linear classifier, by optax's loss and by a call back to fastce."""

from .case import FASTCE, Case

NAME = "JAX"
PACKAGES = ("jax", "optax")
BUILT_IN = "optax"
LINEAR = ((512, 64, 32000), (4096, 64, 1000), (32, 64, 10))
QUICK_LINEAR = ((16, 8, 300),)


def cases(quick, threads):
    for shape in QUICK_LINEAR if quick else LINEAR:
        for task, prepare in (("SGD step", step), ("evaluation", evaluation)):
            rows, features, classes = shape
            yield Case(
                f"jit, {task}, {rows} rows of {features} features, {classes:,} classes",
                {name: prepare(loss, *shape) for name, loss in losses().items()},
                relative=1e-4,
            )


def losses():
    import optax

    from fastce.integrations.jax import cross_entropy

    return {BUILT_IN: optax.softmax_cross_entropy_with_integer_labels, FASTCE: cross_entropy}


def batch(rows, features, classes):
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, features), "float32")
    w = 0.1 * jax.random.normal(keys[1], (features, classes), "float32")
    return x, jax.random.randint(keys[2], (rows,), 0, classes), w


def step(loss, *shape):
    import jax

    x, labels, w = batch(*shape)

    @jax.jit
    def updated(w):
        value, gradient = jax.value_and_grad(lambda w: loss(x @ w, labels).mean())(w)
        return value, w - 0.1 * gradient

    return lambda: jax.block_until_ready(updated(w))


def evaluation(loss, *shape):
    import jax

    x, labels, w = batch(*shape)
    mean = jax.jit(lambda w: loss(x @ w, labels).mean())
    return lambda: jax.block_until_ready(mean(w))
