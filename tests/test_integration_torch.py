"""PyTorch's cross-entropy and fastce's in its place are one function: values, gradients, dtypes, shapes, errors."""

import copy
import gc
import importlib.util
import operator
import sys
import types
import unittest
import weakref

import numpy as np
import pytest

import fastce

torch = pytest.importorskip("torch", reason="torch, one of fastce's extras, is not installed")
functional = torch.nn.functional
ours = importlib.import_module("fastce.integrations.torch")

# PyTorch's own compiler and forward mode call what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "sum", "mean"]
# PyTorch computes in the dtype of the logits where fastce computes exactly: these are PyTorch's errors.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 4e-6},
    torch.float16: {"rtol": 8e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 3e-2},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240229)


def results(function, input, target, options, factor=None):
    """The loss and the gradients of all tensors that have one; `factor` is what comes into backward."""
    leaves = [input.detach().clone(memory_format=torch.preserve_format).requires_grad_()]
    if target.requires_grad:
        target = target.detach().clone().requires_grad_()
        leaves.append(target)
    loss = function(leaves[0], target, **options)
    loss.backward(torch.ones_like(loss) if factor is None else factor.to(loss.dtype))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(input, target, options, factor=None, function=ours.cross_entropy):
    mine = results(function, input, target, options, factor)
    theirs = results(functional.cross_entropy, input, target, options, factor)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, **CLOSE[input.dtype])


@pytest.fixture
def samples(monkeypatch):
    """The module of PyTorch's own sample inputs; it imports a test framework's helper that it does not bring along."""
    if importlib.util.find_spec("expecttest") is None:
        monkeypatch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    pytest.importorskip("torch.testing._internal.common_modules")
    return sys.modules["torch.testing._internal.common_modules"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sample_inputs_of_pytorch_give_pytorch_s_results(samples, dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    entry = next(entry for entry in op_db if entry.name == "nn.functional.cross_entropy")
    count = 0
    for sample in entry.sample_inputs("cpu", dtype, requires_grad=True):
        assert_same(sample.input, sample.args[0], sample.kwargs)
        count += 1
    assert count > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_module_takes_the_inputs_of_pytorch_s(samples, dtype):
    entry = next(entry for entry in samples.module_db if entry.module_cls is torch.nn.CrossEntropyLoss)
    count = 0
    for sample in entry.module_inputs_func(entry, "cpu", dtype, False, True):
        arguments = sample.constructor_input.kwargs
        for module in (
            ours.CrossEntropyLoss(**arguments),
            ours.replace_cross_entropy(torch.nn.CrossEntropyLoss(**arguments)),
        ):
            assert_same(*sample.forward_input.args, arguments, function=lambda i, t, module=module, **_: module(i, t))
        count += 1
    assert count > 50


def a_batch(shape, dtype, kind):
    """Logits, and ids of which some are ignored, or a distribution a row."""
    input = (3 * torch.randn(shape)).to(dtype)
    axis = min(1, len(shape) - 1)
    if kind == "distributions":
        return input, torch.softmax(torch.randn(shape), axis).to(dtype)
    target = torch.randint(0, shape[axis], shape[:axis] + shape[axis + 1 :])
    if target.dim():
        target.view(-1)[::3] = 1
    return input, target


@pytest.mark.parametrize("kind", ["ids", "distributions"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_gives_pytorch_s_results(dtype, reduction, kind):
    for shape in [(7,), (5, 7), (5, 7, 3), (2, 7, 3, 4), (3, 300)]:
        input, target = a_batch(shape, dtype, kind)
        classes = shape[min(1, len(shape) - 1)]
        for weight in (None, torch.rand(classes).to(dtype), torch.linspace(-0.3, 1, classes).to(dtype)):
            for smoothing in (0.0, 0.2):
                options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
                if kind == "ids" and len(shape) > 1:
                    options["ignore_index"] = 1
                factor = torch.randn(target.shape if kind == "ids" else shape[:1] + shape[2:] if shape[1:] else ())
                assert_same(input, target, options, factor if reduction == "none" else torch.tensor(0.7))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layouts_of_logits_and_of_incoming_gradients_do_not_matter(reduction):
    target = torch.randint(0, 6, (4, 5, 3))
    plain = torch.randn(4, 6, 5, 3)
    layouts = [
        plain.to(memory_format=torch.channels_last),
        torch.randn(4, 5, 3, 6).permute(0, 3, 1, 2),
        torch.randn(8, 6, 10, 3)[::2, :, ::2],
        torch.randn(4, 6, 1, 1).expand(4, 6, 5, 3),
        plain.flip(1),
    ]
    factors = [torch.randn(3, 5, 4).permute(2, 1, 0), torch.randn(1).expand(4, 5, 3), torch.randn(8, 5, 6)[::2, :, ::2]]
    for input in layouts:
        for factor in factors if reduction == "none" else [torch.randn(5)[2], torch.ones(1).expand(1)[0]]:
            assert_same(input, target, {"reduction": reduction}, factor)
    # The classes of each row are 18 numbers apart; the gradient lies as the logits do.
    leaf = layouts[0].requires_grad_()
    ours.cross_entropy(leaf, target).backward()
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_logits_are_not_copied(dtype, monkeypatch):
    seen = []

    def spy(logits, *arguments, **options):
        seen.append((logits, options["out"]))
        return original(logits, *arguments, **options)

    original = fastce.cross_entropy_with_grad
    monkeypatch.setattr(fastce, "cross_entropy_with_grad", spy)
    leaf = torch.randn(4, 6).to(dtype).requires_grad_()
    middle = leaf * 1
    middle.retain_grad()
    ours.cross_entropy(middle, torch.tensor([0, 1, 2, 3])).backward()
    ((logits, gradient),) = seen
    assert logits.ctypes.data == middle.data_ptr() and logits.itemsize == middle.element_size()
    assert gradient.shape == (4, 6)


def test_without_a_gradient_to_come_the_loss_alone_is_computed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(fastce, "cross_entropy_with_grad", refuse)
    leaf, target = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        losses = [ours.cross_entropy(leaf, target)]
    with torch.inference_mode():
        losses.append(ours.cross_entropy(leaf, target))
    losses.append(ours.cross_entropy(leaf.detach(), target))
    for loss in losses:
        assert not loss.requires_grad
        torch.testing.assert_close(loss, functional.cross_entropy(leaf.detach(), target))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["ids", "distributions"])
def test_first_and_second_derivatives_are_those_of_the_loss(kind, reduction):
    input, target = a_batch((4, 5), torch.float64, kind)
    weight = torch.rand(5, dtype=torch.float64)
    tensors = [input.requires_grad_()]
    if kind == "distributions":
        tensors.append(target.requires_grad_())

    def loss(input, target=target):
        return ours.cross_entropy(input, target, weight, reduction=reduction, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


def test_weights_of_both_signs_that_add_up_to_0_have_no_gradient():
    input = torch.zeros((2, 3), requires_grad=True)
    for weight in ([1.0, 0, -1], [0.0, 0, 0]):
        loss = ours.cross_entropy(input, torch.tensor([0, 2]), weight=torch.tensor(weight))
        (gradient,) = torch.autograd.grad(loss, input)
        assert not loss.isfinite() and not gradient.any()


def test_weights_of_distributions_have_pytorch_s_gradient_and_those_of_class_ids_its_error():
    input, target = a_batch((4, 5), torch.float32, "distributions")
    gradients = []
    for function in (ours.cross_entropy, functional.cross_entropy):
        weight = torch.rand(5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        function(input, target, weight).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="weight"):
        ours.cross_entropy(input, torch.tensor([0, 1, 2, 3]), weight).backward()


@pytest.mark.parametrize("kind", ["ids", "distributions"])
def test_forward_mode_derivatives_are_not_lost(kind):
    input, target = a_batch((4, 5), torch.float64, kind)
    direction = torch.randn(4, 5, dtype=torch.float64)

    def derivatives(function):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, direction)
            tangent = torch.autograd.forward_ad.unpack_dual(function(dual, target, label_smoothing=0.1)).tangent
        return tangent, torch.func.jvp(lambda input: function(input, target), (input,), (direction,))[1]

    for got, expected in zip(derivatives(ours.cross_entropy), derivatives(functional.cross_entropy), strict=True):
        assert expected
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("kind", ["ids", "distributions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_is_registered_as_pytorch_wants_it(dtype, kind, with_grad):
    input, target = a_batch((4, 5, 2), dtype, kind)
    for reduction in REDUCTIONS:
        arguments = (input.requires_grad_(with_grad), target, torch.rand(5), -100, reduction, 0.1, with_grad)
        torch.library.opcheck(torch.ops.fastce.cross_entropy.default, arguments)


def compiled(backend):
    @torch.compile(fullgraph=True, backend=backend)
    def loss(input, target, **options):
        return 2 * ours.cross_entropy(input, target, **options)

    return loss


def eager(input, target, **options):
    return 2 * functional.cross_entropy(input, target, **options)


def test_compiled_it_gives_the_same():
    torch.compiler.reset()
    loss, (input, target) = compiled("aot_eager"), a_batch((16, 40), torch.float32, "ids")
    for options in ({}, {"reduction": "none", "label_smoothing": 0.1}):
        for one, other in zip(*(results(f, input, target, options) for f in (loss, eager)), strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            torch.testing.assert_close(loss(input, target, **options), eager(input, target, **options))
    with pytest.raises(IndexError, match="Target 40 is out of bounds"):
        loss(input, target + 40 - target)


def test_compiled_by_pytorch_s_own_backend_it_gives_the_same():
    # Without a gradient there is nothing but the operator, and so no C++ to compile, which would take a minute.
    torch.compiler.reset()
    loss = torch.compile(ours.cross_entropy, fullgraph=True, backend="inductor")
    input, target = a_batch((16, 40), torch.float32, "ids")
    with torch.no_grad():
        torch.testing.assert_close(loss(input, target), functional.cross_entropy(input, target))


def test_a_graph_may_be_gone_through_again_and_gradients_add_up():
    input, target = a_batch((4, 5), torch.float32, "ids")
    gradients = []
    for function in (ours.cross_entropy, functional.cross_entropy):
        leaf = input.clone().requires_grad_()
        loss = function(leaf, target)
        loss.backward(retain_graph=True)
        leaf.grad *= 3  # what optimizers may do to it must not reach the graph
        loss.backward(retain_graph=True)
        loss.backward(torch.tensor(0.5))
        gradients.append(leaf.grad)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    torch.testing.assert_close(*gradients)


def test_logits_of_two_losses_get_both_gradients():
    input, target = a_batch((4, 5), torch.float32, "ids")
    gradients = []
    for function in (ours.cross_entropy, functional.cross_entropy):
        leaf = input.clone().requires_grad_()
        logits = leaf * 1
        (function(logits, target) + function(logits, target.flip(0)) + logits.square().sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_checkpointed_and_hooked_graphs_give_the_same():
    from torch.utils.checkpoint import checkpoint

    input, target = a_batch((4, 5), torch.float32, "ids")
    assert_same(input, target, {}, function=lambda i, t: checkpoint(ours.cross_entropy, i, t, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        assert_same(input, target, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_gives_the_dtypes_of_pytorch(dtype):
    input, target = a_batch((4, 5), dtype, "ids")
    found = []
    for function in (ours.cross_entropy, functional.cross_entropy):
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradient = results(function, input, target, {})
        found.append((loss.dtype, gradient.dtype))
    assert found[0] == found[1]


def test_half_types_are_rounded_once():
    input, target = a_batch((50, 30), torch.bfloat16, "ids")
    loss, gradient = results(ours.cross_entropy, input, target, {"reduction": "sum"})
    wide_loss, wide_gradient = results(ours.cross_entropy, input.float(), target, {"reduction": "sum"})
    assert loss == wide_loss.bfloat16()
    assert torch.equal(gradient, wide_gradient.bfloat16())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_class_ids_may_be_of_any_integer_dtype(dtype):
    input, target = a_batch((4, 5), torch.float32, "ids")
    torch.testing.assert_close(ours.cross_entropy(input, target.to(dtype)), functional.cross_entropy(input, target))


@pytest.mark.parametrize("flags", [(None, False), (False, None), (True, None), (None, True), (False, False)], ids=str)
def test_the_old_flags_of_reduction_mean_what_they_mean_to_pytorch(flags):
    input, target = a_batch((4, 5), torch.float32, "ids")
    options = dict(zip(("size_average", "reduce"), flags, strict=True))
    with pytest.warns(UserWarning, match="please use reduction"):
        assert_same(input, target, options)


def test_nothing_to_learn_from_is_nan_and_has_the_gradient_0():
    for input, target in [(torch.randn(4, 5), torch.full((4,), -100)), (torch.empty(0, 5), torch.empty(0).long())]:
        loss, gradient = results(ours.cross_entropy, input, target, {})
        assert loss.isnan() and not gradient.any()


def test_the_threads_are_at_most_pytorch_s(monkeypatch):
    seen = []
    original = fastce.cross_entropy
    monkeypatch.setattr(
        fastce, "cross_entropy", lambda *a, **options: seen.append(options["num_threads"]) or original(*a, **options)
    )
    before = torch.get_num_threads()
    large, small = torch.zeros(400, 1000), torch.zeros(4, 10)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for input in (large, small):
                ours.cross_entropy(input, torch.zeros(len(input), dtype=torch.long))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, min(3, fastce.build_info()["num_threads"]), 1]


def test_a_training_ends_with_the_same_weights():
    x, y = torch.randn(200, 8), torch.randint(0, 30, (200,))
    weights = []
    for function in (ours.cross_entropy, functional.cross_entropy):
        torch.manual_seed(1)
        model = torch.nn.Linear(8, 30)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(50):
            optimizer.zero_grad()
            function(model(x), y).backward()
            optimizer.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_no_tensor_outlives_its_graph():
    gc.disable()  # a cycle would only be found by it
    try:
        for end in (lambda loss: loss.backward(), lambda loss: None):
            logits = torch.randn(4, 5, requires_grad=True) * 1
            loss = ours.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
            gone = weakref.ref(logits)
            end(loss)
            del logits, loss
            assert gone() is None
    finally:
        gc.enable()


# Modules and models


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(3, 5)
        self.criteria = torch.nn.ModuleList(
            [torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(torch.arange(1.0, 6), label_smoothing=0.1)]
        )

    def forward(self, x, target):
        return sum(criterion(self.body(x), target) for criterion in self.criteria)


def test_a_model_s_losses_are_replaced_where_they_are(monkeypatch):
    model, x, target = Model(), torch.randn(4, 3), torch.tensor([0, 1, 2, 4])
    state, before, modules = copy.deepcopy(model.state_dict()), model(x, target), [*model.modules()]
    assert ours.replace_cross_entropy(model) is model
    assert all(map(operator.is_, model.modules(), modules))
    assert [type(criterion) for criterion in model.criteria] == [ours.CrossEntropyLoss] * 2
    ours.replace_cross_entropy(model)  # once more does no harm
    model.load_state_dict(state)
    monkeypatch.setattr(functional, "cross_entropy", None)
    torch.testing.assert_close(model(x, target), before)
    torch.testing.assert_close(copy.deepcopy(model)(x, target), before)


def test_a_model_without_a_loss_is_an_error_that_says_what_to_do():
    class Own(torch.nn.CrossEntropyLoss):
        pass

    for model in (torch.nn.Linear(3, 5), Own()):
        with pytest.raises(ValueError, match=r"fastce\.integrations\.torch\.cross_entropy where"):
            ours.replace_cross_entropy(model)


# Bad input


def test_a_class_id_out_of_range_is_pytorch_s_error_and_says_where():
    with pytest.raises(IndexError, match=r"^Target 7 is out of bounds\. targets\[2\] = 7 is out of range"):
        ours.cross_entropy(torch.randn(4, 5), torch.tensor([0, 1, 7, 9]))
    with pytest.raises(IndexError, match=r"^Target -1 is out of bounds\. .*ignore_index=-1"):
        ours.cross_entropy(torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, -1, 4]))


def test_tensors_on_another_device_are_refused_with_the_remedy():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        input, target = torch.empty(4, 5, device="cuda"), torch.empty(4, dtype=torch.long)
        with pytest.raises(RuntimeError, match=r"^input: expected a tensor on the CPU, got one on cuda:0; use torch\."):
            ours.cross_entropy(input, target)
        with pytest.raises(RuntimeError, match=r"^target: expected a tensor on the CPU"):
            ours.cross_entropy(torch.empty(4, 5), torch.empty(4, dtype=torch.long, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
def test_logits_that_are_not_floating_are_refused_with_the_remedy(dtype):
    with pytest.raises(RuntimeError, match=rf"^input: expected a floating point dtype .*got {dtype}; .*\.float\(\)"):
        ours.cross_entropy(torch.zeros(4, 5).to(dtype), torch.tensor([0, 1, 2, 3]))


def test_errors_that_pytorch_and_fastce_share():
    input, ids = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    distributions = torch.softmax(input, 1)
    for function in (ours.cross_entropy, functional.cross_entropy):
        with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
            function(input, distributions, ignore_index=1)
        with pytest.raises(ValueError, match="foo"):
            function(input, ids, reduction="foo")
        with pytest.raises(ValueError, match="None"):
            function(input, ids, reduction=None)
        with pytest.raises(TypeError):
            function(input, ids, ignore_index=1.5)
        with pytest.raises((ValueError, RuntimeError)):
            function(input, ids[:3])
        with pytest.raises((ValueError, RuntimeError)):
            function(input, ids, label_smoothing=1.5)
        with pytest.raises((ValueError, RuntimeError)):
            function(input, ids, weight=torch.ones(4))
        with pytest.raises(TypeError):
            function(input.numpy(), ids)
        with pytest.raises((TypeError, RuntimeError)):
            function(input, ids.float())


def test_what_fastce_alone_refuses():
    input = torch.randn(4, 5)
    with pytest.raises(ValueError, match="targets must be finite and >= 0"):
        ours.cross_entropy(input, -torch.ones(4, 5))
    with pytest.raises(ValueError, match="weight must be finite"):
        ours.cross_entropy(input, torch.tensor([0, 1, 2, 3]), weight=torch.full((5,), torch.nan))


def test_without_the_library_the_error_names_the_extra(run_python):
    program = "import sys; sys.modules['torch'] = None; import fastce; import fastce.integrations.torch"
    done = run_python("-c", program, check=False)
    assert "ImportError: fastce.integrations.torch needs torch>=2.4" in done.stderr
    assert 'pip install "fastce[torch]"' in done.stderr


def test_bfloat16_without_ml_dtypes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"bfloat16 tensors need the package ml_dtypes: pip install .fastce\[torch\]"):
        ours.cross_entropy(torch.zeros(4, 5, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 3]))


def test_the_gradient_of_a_confident_row_is_exact_where_pytorch_s_is_0():
    input = torch.tensor([[20.0, 0.0]], requires_grad=True)
    loss = ours.cross_entropy(input, torch.tensor([0]))
    loss.backward()
    np.testing.assert_allclose([loss.item(), -input.grad[0, 0].item()], 2.0611536e-09, rtol=1e-6)
    assert functional.cross_entropy(input, torch.tensor([0])).item() == 0
