"""gan_ops, the operations of csrc, against PyTorch: values, layouts, gradients, compiling, threads."""

import itertools
import random
import threading

import pytest
import torch
from ops_reference import (
    ALL,
    LAYOUTS,
    NORMS,
    SEAMS,
    SINGLE,
    TYPES,
    Expected,
    Sample,
    composed,
    is_dense,
    laid,
    parameter_type,
    sample,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import gan_ops

DEVICES = ["cpu", "cuda"] if "cuda" in gan_ops.devices and torch.cuda.is_available() else ["cpu"]
CORNERS = "contiguous", "channels_last"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


def run(given, gradients_out=None):
    """Outputs, gradients of every source, running statistics of one forward and backward on fresh leaves."""
    given = given.fresh()
    outputs = given.call()
    if gradients_out is None:
        torch.manual_seed(9)
        gradients_out = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, given.sources(), gradients_out)
    return (
        [y.detach() for y in outputs],
        list(gradients),
        [t for t in (given.mean, given.var) if t is not None],
    )


def check(given, gradient_layout="contiguous"):
    """One forward and backward against float64: values, types, layouts, running statistics."""
    expected = Expected(given)
    gradients_out = expected.gradients_out(gradient_layout)
    outputs, gradients, statistics = run(given, gradients_out)
    expected.check_outputs(outputs)
    assert all(is_dense(y, given.inputs[0]) for y in outputs), [y.stride() for y in outputs]
    if statistics:
        expected.check_statistics(*statistics)
    expected.check_gradients(gradients, gradients_out)


def same(a, b):
    """Whether nested lists of tensors are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return len(a) == len(b) and all(map(same, a, b))


def shapes(dims, even):
    """Batch, channels and positions of few values; the batch is 2..5 in turn so that all sizes meet all."""
    batch = itertools.cycle((2, 3, 4, 5))
    for c in (2, 6, 14, 130) if even else (1, 3, 7, 130):
        yield next(batch), c, *[1] * (dims - 2)
        if dims > 2:
            yield next(batch), c, *[7] * (dims - 2)


# Values against float64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dims", (2, 4))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_values_gradients_and_statistics(name, dtype, dims, device):
    turn = itertools.product((0.2, 0.0, 0.01), (1e-5, 1e-2), (0.1, 0.7, 1.0, 0.0))
    turn = itertools.cycle(random.sample(list(turn), 24))
    modes = (True, True), (True, False), (False, True)
    parts = ("both",) if name == "split_add" else ("both", "weight", "bias", "none")
    gradient_layouts = itertools.cycle(LAYOUTS[:5])
    for split in (False, True) if name in SEAMS else (False,):
        for layout, (training, statistics), affine in itertools.product(LAYOUTS, modes, parts):
            for shape in shapes(dims, split):
                slope, eps, momentum = next(turn)
                given = sample(
                    name,
                    shape,
                    dtype,
                    layout,
                    device,
                    affine,
                    statistics,
                    training=training,
                    slope=slope,
                    eps=eps,
                    momentum=momentum,
                    split=split,
                    biased=name in SINGLE and random.random() < 0.5,
                )
                check(given, next(gradient_layouts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_one_row_no_row_and_other_dimensions(name, dtype, device):
    for split, affine, layout in itertools.product(
        (False, True) if name in SEAMS else (False,),
        ("both", "none"),
        ("contiguous", "channels_last", "strided", "transposed"),
    ):
        c = 6 if split else 3
        kind = {"dtype": dtype, "layout": layout, "device": device, "affine": affine, "split": split}
        for shape in (1, c), (1, c, 1, 1), (1, c, 7, 7), (1, c, 5), (4, c, 5), (1, c, 3, 8), (2, c, 2, 3, 4):
            check(sample(name, shape, training=False, **kind))
            if torch.Size(shape).numel() > c:
                check(sample(name, shape, training=True, **kind))
        for shape in (0, c), (0, c, 7, 7), (0, c, 5), (3, c, 0, 4):
            for training in (True, False):
                check(sample(name, shape, training=training, **kind))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", CORNERS)
@pytest.mark.parametrize("name", SINGLE)
def test_slopes_out_of_the_ordinary(name, layout, device):
    """The slope's sign and size change which side of the corner an output tells of."""
    for slope, dtype in itertools.product((1.0, 1.5, -0.5), (torch.float64, torch.bfloat16)):
        check(sample(name, (4, 6, 7, 7), dtype, layout, device, slope=slope))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("types", list(itertools.permutations(TYPES, 2)), ids=str)
def test_seam_of_two_types_promotes(types, device):
    for name, split, layout in itertools.product(SEAMS, (False, True), CORNERS):
        a = sample(name, (4, 6, 7, 7), types[0], layout, device, split=split)
        b = sample(name, (4, 6, 7, 7), types[1], layout, device, split=split)
        a.inputs = a.inputs[0], b.inputs[1]
        wide = parameter_type(torch.promote_types(*types))
        for key in ("weight", "bias", "mean", "var") if name in NORMS else ():
            setattr(a, key, getattr(a, key).to(wide))
        check(a)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_split_add_is_pytorchs_addition_to_the_bit(dtype, device):
    left, right = (torch.randn(5, 6, 7, 7, device=device).to(dtype) for _ in range(2))
    left[0, 0, 0, :5] = torch.tensor(
        [-0.0, float("inf"), float("nan"), float("-inf"), torch.finfo(dtype).max]
    )
    right[0, 0, 0, :5] = torch.tensor([-0.0, float("-inf"), 1, 1, torch.finfo(dtype).max])
    bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    for layout, split in itertools.product(CORNERS, (False, True)):
        outputs = torch.ops.gan_ops.split_add(laid(left, layout), laid(right, layout), split)
        y, wanted = torch.cat(outputs, 1), left + right
        assert torch.equal(y.isnan(), wanted.isnan())
        number = ~wanted.isnan()
        assert torch.equal(y[number].view(bits), wanted[number].view(bits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ALL)
def test_real_sizes_against_eager(name, dtype, device):
    """Sizes at which the work is divided, against PyTorch in the same type; roundings between pass."""
    for shape, layout in itertools.product(
        ((64, 64, 16, 16), (32, 512, 4, 4), (8, 24, 65, 33), (300, 200)), CORNERS
    ):
        given = sample(name, shape, dtype, layout, device, split=name in SEAMS)
        ours, theirs = given.fresh(), given.fresh()
        outputs, wanted = ours.call(), theirs.eager()
        rough = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(outputs, wanted, **rough)
        assert all(is_dense(y, given.inputs[0]) for y in outputs)
        if name in NORMS:
            torch.testing.assert_close([ours.mean, ours.var], [theirs.mean, theirs.var], rtol=1e-4, atol=1e-4)
        gradients_out = [torch.randn_like(y) * (y.abs() > 0.02) for y in wanted]
        if name == "leaky_relu_batch_norm":
            gradients_out = [torch.randn_like(y) for y in wanted]
        gradients = torch.autograd.grad(outputs, ours.sources(), gradients_out)
        wanted = torch.autograd.grad(wanted, theirs.sources(), gradients_out)
        torch.testing.assert_close(gradients[: len(given.inputs)], wanted[: len(given.inputs)], **rough)
        count = shape[0] * torch.Size(shape[2:]).numel()
        for got, want in zip(gradients[len(given.inputs) :], wanted[len(given.inputs) :], strict=True):
            torch.testing.assert_close(got, want, rtol=rough["rtol"], atol=rough["atol"] * count**0.5)
        if layout == "channels_last" and len(shape) == 4:
            assert all(
                g.is_contiguous(memory_format=torch.channels_last) for g in gradients[: len(given.inputs)]
            )


# Gradients of gradients


def away_from_corner(name, shape, layout, training, slope):
    """A float64 sample with nothing within reach of gradcheck's step from the activation's corner."""
    for _ in range(1000):
        given = sample(
            name, shape, torch.float64, layout, training=training, slope=slope, split=name in SEAMS
        )
        if name == "split_add":
            return given
        before = Expected(given).before
        if (given.inputs[0] if before is None else before).abs().min() > 1e-2:
            return given
    raise AssertionError("no such numbers")


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("layout", CORNERS)
@pytest.mark.parametrize("slope", (0.2, 0.0))
@pytest.mark.parametrize("name", ALL)
def test_gradcheck_twice(name, slope, layout, training):
    given = away_from_corner(name, (3, 2, 2, 1), layout, training, slope)
    leaves = given.fresh().sources()

    def function(*tensors):
        return tuple(given.with_sources(tensors).call())

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_first_gradient_is_the_same_when_it_is_differentiable(dtype):
    for name, layout, training in itertools.product(ALL, CORNERS, (True, False)):
        given = sample(name, (4, 6, 5, 5), dtype, layout, training=training, split=name in SEAMS)
        expected = Expected(given)
        gradients_out = expected.gradients_out()
        fresh = given.fresh()
        gradients = torch.autograd.grad(fresh.call(), fresh.sources(), gradients_out, create_graph=True)
        expected.check_gradients(gradients, gradients_out)


@pytest.mark.parametrize("name", NORMS)
def test_second_gradients_of_float32_are_those_of_float64(name):
    """float64 goes through PyTorch's operations alone; gradgradcheck has seen those."""

    def second(given):
        fresh, turn = given.fresh(), torch.linspace(0.5, 1.5, 7, dtype=torch.float64)
        loss = sum((y * turn[: y.shape[-1]].to(y)).sin().sum() for y in fresh.call())
        first = torch.autograd.grad(loss, fresh.sources(), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), fresh.sources())

    for layout, training, affine in itertools.product(CORNERS, (True, False), ("both", "none")):
        given = sample(
            name, (4, 6, 5, 5), torch.float64, layout, training=training, affine=affine, split=name in SEAMS
        )
        torch.testing.assert_close(
            second(given.mapped(torch.Tensor.float)),
            tuple(map(torch.Tensor.float, second(given))),
            rtol=1e-3,
            atol=1e-3,
        )


def test_a_weight_that_depends_on_the_input():
    """Each gradient is of its own source alone, also where one source is computed from another."""
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    weight, bias = x.mean((0, 2, 3)) + 1, torch.zeros(6)
    y = torch.ops.gan_ops.batch_norm_leaky_relu(x, weight, bias, None, None, True, 0.1, 1e-5, 0.2)
    (plain,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    torch.testing.assert_close(again, plain)


# The dispatcher: schemas, fake tensors, torch.compile


def test_schemas():
    """What callers rely on; opcheck cannot know it."""
    tensors = "Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var"
    numbers = "bool training, float momentum, float eps, float slope"
    for name, start, end in (
        (SINGLE[0], f"Tensor x, {tensors}, {numbers}, ", "bool biased=False) -> Tensor"),
        (SINGLE[1], f"Tensor x, {tensors}, {numbers}, ", "bool biased=False) -> Tensor"),
        (SEAMS[0], f"Tensor left, Tensor right, {tensors}, {numbers}, ", "bool split) -> Tensor[]"),
        (SEAMS[1], "Tensor left, Tensor right, ", "bool split) -> Tensor[]"),
    ):
        assert str(getattr(torch.ops.gan_ops, name).default._schema) == f"gan_ops::{name}({start}{end}"
    assert gan_ops.devices in (("cpu",), ("cpu", "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_opcheck(name, device):
    split = name in SEAMS
    for given in (
        sample(name, (3, 4, 3, 2), torch.float32, "contiguous", device, split=split),
        sample(name, (2, 4, 3, 3), torch.bfloat16, "channels_last", device, "none", training=False),
        sample(name, (5, 2), torch.float64, "strided", device, "weight", False, split=split),
    ):
        for call in (given, given.fresh()):
            torch.library.opcheck(call.op.default, call.arguments)


def strides(outputs):
    """What can be seen of each output's memory: a stride of a size of 1, or of nothing, means nothing."""
    return [
        (y.shape, y.dtype, y.device.type, [s for s, n in zip(y.stride(), y.shape) if n > 1 and y.numel()])
        for y in outputs
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_fake_and_meta_tell_the_truth(name, device):
    sizes = (2, 6), (3, 6, 4), (2, 6, 5, 3), (1, 2, 1, 1), (0, 4, 3, 3), (2, 2, 1, 4)
    for shape, layout, dtype, split in itertools.product(
        sizes, LAYOUTS, (torch.float32, torch.float16), (False, True) if name in SEAMS else (False,)
    ):
        if layout == "unaligned":
            continue  # looks contiguous
        given = sample(name, shape, dtype, layout, device, training=shape != sizes[3], split=split)
        if name in SEAMS and dtype == torch.float16:
            given.inputs = given.inputs[0], given.inputs[1].bfloat16()
        real = strides(given.fresh().call())
        with FakeTensorMode() as mode:
            assert strides(given.mapped(mode.from_tensor).call()) == real
        outputs = given.mapped(
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        ).call()
        assert {y.device.type for y in outputs} == {"meta"}
        assert [s[:2] + s[3:] for s in strides(outputs)] == [s[:2] + s[3:] for s in real]


@pytest.fixture()
def compiler():
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    torch.compiler.reset()


def forward_and_backward(function, given):
    """Outputs, gradients and running statistics when the function makes the call."""
    given = given.fresh()
    outputs = function(*given.arguments)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss = sum((y.float() * y.float().cos()).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, given.sources())
    return [y.detach() for y in outputs], gradients, [t for t in (given.mean, given.var) if t is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_compiled(name, device, compiler):
    op = getattr(torch.ops.gan_ops, name)
    compiled = compiler(lambda *a: op(*a), dynamic=False)
    for training, dtype, layout in (
        (True, torch.float32, "contiguous"),
        (False, torch.bfloat16, "channels_last"),
    ):
        given = sample(name, (4, 6, 5, 5), dtype, layout, device, training=training, split=name in SEAMS)
        torch.testing.assert_close(forward_and_backward(compiled, given), forward_and_backward(op, given))


def test_compiled_with_dynamic_sizes(compiler):
    """One graph for all sizes: mark_dynamic raises where an operation fixes a size."""
    op, seam = torch.ops.gan_ops.batch_norm_leaky_relu, torch.ops.gan_ops.split_add_batch_norm_leaky_relu

    def function(x, weight, bias, mean, var, *rest):
        y = op(x, weight, bias, mean, var, *rest)
        return seam(x, y, weight, bias, mean, var, *rest, True)

    compiled = compiler(function, dynamic=True)
    for shape in (4, 6, 5, 5), (3, 6, 7, 4), (9, 6, 2, 3):
        given = sample("batch_norm_leaky_relu", shape)

        def call(f, given=given):
            fresh = given.fresh()
            for dim in (0, 2, 3):
                torch._dynamo.mark_dynamic(fresh.inputs[0], dim)
            outputs = f(*fresh.arguments[:-1])
            gradients = torch.autograd.grad(sum(y.sin().sum() for y in outputs), fresh.sources())
            return [y.detach() for y in outputs], gradients, [fresh.mean, fresh.var]

        torch.testing.assert_close(call(compiled), call(function))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*given.fresh().arguments[:-1])


# Numbers out of the ordinary


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", CORNERS)
@pytest.mark.parametrize("name", NORMS)
def test_mean_far_from_zero(name, layout, device):
    """A sum of squares less the square of the sum would lose a variance of 1 beside a mean of 1000."""
    for shape in (64, 6, 8, 8), (64, 6), (3, 6, 64, 64):
        given = sample(name, shape, torch.float32, layout, device, momentum=1.0)
        x = torch.randn(shape) + 1000
        given.inputs = tuple(
            laid(t.to(device), layout)
            for t in ((x - 400, torch.full(shape, 400.0)) if name in SEAMS else (x,))
        )
        expected = Expected(given)
        gradients_out = [g * (expected.outputs[0].abs() > 0.01) for g in expected.gradients_out()]
        gradients_out = [g.to(device).float() for g in gradients_out]
        outputs, gradients, (mean, var) = run(given, gradients_out)
        torch.testing.assert_close(
            outputs[0].cpu().double(), expected.outputs[0].detach(), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(mean.cpu().double(), expected.mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(var.cpu().double(), expected.var, rtol=1e-3, atol=0)
        wanted = torch.autograd.grad(
            expected.outputs, expected.sources, [g.cpu().double() for g in gradients_out]
        )
        torch.testing.assert_close(gradients[0].cpu().double(), wanted[0], rtol=1e-3, atol=1e-3)
        for got, want in zip(gradients[len(given.inputs) :], wanted[1:], strict=True):
            torch.testing.assert_close(
                got.cpu().double(), want, rtol=1e-3, atol=1e-3 * expected.x.numel() ** 0.5
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_zeros_take_the_slope(name, dtype, device):
    """0 and -0 are on the negative side of the corner, as in PyTorch."""
    for layout, zero, slope in itertools.product(CORNERS, (0.0, -0.0), (0.25, 0.0)):
        shape = 3, 4, 3, 3
        x = torch.full(shape, zero, dtype=dtype, device=device)
        x[:, :, 1] = 2
        x[:, :, 2] = -2
        given = Sample(
            name,
            tuple(laid(t, layout) for t in ((x, x * 0.0) if name in SEAMS else (x,))),
            slope=slope,
            training=False,
            eps=0.25,
        )
        given.mean, given.var = (
            torch.full((4,), v, dtype=parameter_type(dtype), device=device) for v in (0, 3.75)
        )
        ones = torch.ones_like(x)
        (y,), gradients, _ = run(given, [ones])
        below = torch.full_like(x, slope / 2)
        wanted = torch.where(x > 0, 0.5, below)
        assert all(torch.equal(g, wanted) for g in gradients)
        assert torch.equal(y, x * wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_not_numbers_and_infinities_stay_in_their_channel(name, dtype, device):
    for layout, training, value, slope in itertools.product(
        CORNERS, (True, False), (float("nan"), float("inf"), float("-inf")), (0.2, 0.0)
    ):
        given = sample(name, (3, 6, 5, 5), dtype, layout, device, training=training, slope=slope)
        clean = run(given)
        given.inputs[0][1, 2, 3, 1] = value
        (y,), gradients, statistics = run(given)
        others = torch.tensor([0, 1, 3, 4, 5], device=device)
        for got, want in zip((y, *gradients, *statistics), (*clean[0], *clean[1], *clean[2]), strict=True):
            dim = 1 if got.dim() > 1 else 0
            assert torch.equal(got.index_select(dim, others), want.index_select(dim, others))
        theirs = given.fresh()
        wanted = theirs.eager()
        torch.manual_seed(9)
        g = torch.randn_like(y)
        wanted_gradients = torch.autograd.grad(wanted, theirs.sources(), g)
        moved = [theirs.mean, theirs.var] if statistics else []
        for got, want in zip((y, *gradients, *statistics), (*wanted, *wanted_gradients, *moved), strict=True):
            got, want = (t.select(1 if t.dim() > 1 else 0, 2) for t in (got, want))
            assert torch.equal(got.isnan(), want.isnan()), (layout, training, value, slope)
            infinite = want.isinf()
            assert torch.equal(got.isinf(), infinite) and torch.equal(got[infinite], want[infinite])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NORMS)
def test_constant_channel(name, device):
    """A variance of 0: nothing but bias comes out, whatever the constant; no root of a number below 0."""
    for dtype, layout, constant in itertools.product(TYPES, CORNERS, (0.0, 1.0, -2.5, 240.0)):
        given = sample(name, (4, 4, 7, 7), dtype, layout, device, momentum=1.0)
        for t, value in zip(given.inputs, (constant, 0)):
            t[:, 1] = value
        outputs, gradients, (mean, var) = run(given)
        bias = F.leaky_relu(given.bias[1], 0.2) if name != "leaky_relu_batch_norm" else given.bias[1]
        assert torch.equal(outputs[0][:, 1], bias.to(dtype).expand(4, 7, 7))
        assert var[1] == 0 and all(g.isfinite().all() for g in gradients)
        wanted = constant * (0.2 if name == "leaky_relu_batch_norm" and constant < 0 else 1)
        assert mean[1].item() == pytest.approx(wanted, rel=1e-6)
        if dtype == torch.float64:
            check(given)


# The same bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_same_bits_again_and_with_another_number_of_threads(name, device):
    threads = torch.get_num_threads()
    try:
        for shape, dtype, layout in itertools.product(
            ((64, 64, 16, 16), (2, 2, 200, 190), (40, 130, 7, 7), (3000, 70)),
            (torch.float32, torch.bfloat16),
            CORNERS,
        ):
            given = sample(name, shape, dtype, layout, device, split=name in SEAMS)
            torch.set_num_threads(1)
            first = run(given)
            torch.set_num_threads(2)
            assert same(run(given), first) and same(run(given), first)
            if device == "cpu":
                torch.set_num_threads(3)
                assert same(run(given), first)
    finally:
        torch.set_num_threads(threads)


# Wrong arguments


TENSORS = "weight", "bias", "running_mean", "running_var"
WRONG = [  # operations, what is put in the place of what, words of the message
    *((NORMS, {key: lambda t: t[:3]}, (key, "4")) for key in TENSORS),
    *((NORMS, {key: lambda t: t[None]}, (key,)) for key in TENSORS),
    *((NORMS, {key: lambda t: t.half()}, (key, "must be")) for key in TENSORS),
    *((NORMS, {key: lambda t: t.to("meta")}, (key, "cpu")) for key in TENSORS),
    *((NORMS, {key: lambda t: t.clone().requires_grad_()}, (key, "grad")) for key in TENSORS[2:]),
    *((NORMS, {key: lambda t: t.repeat_interleave(2)[::2]}, (key, "contiguous")) for key in TENSORS[2:]),
    *((NORMS, {key: lambda t: None}, TENSORS[2:]) for key in TENSORS[2:]),
    (NORMS, dict.fromkeys(TENSORS[2:], lambda t: None) | {"training": lambda t: False}, TENSORS[2:]),
    (NORMS, {"eps": lambda t: -1.0}, ("eps",)),
    (NORMS, {"eps": lambda t: float("nan")}, ("eps",)),
    (
        NORMS,
        dict.fromkeys(("x", "left", "right"), lambda t: t[:1, :, :1, :1]),
        ("more than 1 value per channel",),
    ),
    (ALL, dict.fromkeys(("x", "left", "right"), lambda t: t[0, 0, 0]), ("dimensions",)),
    (ALL, dict.fromkeys(("x", "left", "right"), lambda t: t.long()), ("float",)),
    (SEAMS, {"right": lambda t: t.long()}, ("right", "float")),
    (SEAMS, {"right": lambda t: t.to("meta")}, ("right", "cpu")),
    (SEAMS, {"right": lambda t: t[:1]}, ("right", "left")),
    (SEAMS, {"left": lambda t: t[:, :, 0]}, ("right", "left")),
    (
        SEAMS,
        dict.fromkeys(("left", "right"), lambda t: t[:, :3]) | dict.fromkeys(TENSORS, lambda t: None),
        ("even",),
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_argument_is_named(number):
    """The message names the argument and says what it should be; statistics are as before."""
    names, changes, words = WRONG[number]
    for name, dtype in itertools.product(names, (torch.float32, torch.float64, torch.bfloat16)):
        given = sample(name, (3, 4, 5, 5), dtype, split=name in SEAMS)
        for fresh in (given.fresh(), given.fresh(grad=False)):
            keys = [a.name for a in given.op.default._schema.arguments]
            arguments = {
                key: changes[key](t) if key in changes else t for key, t in zip(keys, fresh.arguments)
            }
            with pytest.raises((RuntimeError, ValueError)) as raised:
                given.op(**arguments)
            assert all(word in str(raised.value).lower() for word in words), str(raised.value)
            assert (
                given.mean is None
                or torch.equal(fresh.mean, given.mean)
                and torch.equal(fresh.var, given.var)
            )


# Autograd, versions, memory


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_have_versions(name):
    for training, statistics_grad in itertools.product((True, False), (True, False)):
        given = sample(name, (3, 4, 5, 5), training=training).fresh(statistics_grad)
        versions = given.mean._version, given.var._version
        given.call()
        assert (given.mean._version > versions[0]) == training
        assert (given.var._version > versions[1]) == training


@pytest.mark.parametrize("name", SINGLE)
def test_input_changed_before_backward(name):
    for training, key in itertools.product((True, False), ("inputs", "weight")):
        given = sample(name, (3, 4, 5, 5), training=training).fresh()
        x = given.inputs[0] * 1
        given.inputs, weight = (x,), given.weight * 1
        given.weight = weight
        (y,) = given.call()
        with torch.no_grad():
            (x if key == "inputs" else weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_without_gradients(name, device):
    for training, layout in itertools.product((True, False), CORNERS):
        given = sample(
            name, (4, 6, 5, 5), layout=layout, device=device, training=training, split=name in SEAMS
        )
        wanted = run(given)
        for mode in torch.no_grad, torch.inference_mode:
            for grad in (True, False):
                fresh = given.fresh(grad)
                with mode():
                    outputs = fresh.call()
                assert not any(y.requires_grad for y in outputs)
                assert all(y.is_inference() == (mode is torch.inference_mode) for y in outputs)
                assert same(outputs, wanted[0])
                assert same([t for t in (fresh.mean, fresh.var) if t is not None], wanted[2])
        plain = given.fresh(False).call()
        assert same(plain, wanted[0]) and not any(y.requires_grad for y in plain)
        with torch.inference_mode():  # tensors without versions
            inside = given.mapped(torch.clone)
            assert same(inside.call(), wanted[0])
            assert same([t for t in (inside.mean, inside.var) if t is not None], wanted[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ALL)
def test_some_sources_frozen(name, dtype, device):
    """Which gradients are wanted changes none of them."""
    for training, layout in itertools.product((True, False), CORNERS):
        given = sample(name, (4, 6, 5, 5), dtype, layout, device, training=training, split=name in SEAMS)
        torch.manual_seed(9)
        gradients_out = [torch.randn_like(y) for y in given.fresh().call()]
        wanted = run(given, gradients_out)[1]
        for chosen in itertools.product((True, False), repeat=len(wanted)):
            if any(chosen):
                leaves = [t.detach().requires_grad_(c) for t, c in zip(given.sources(), chosen, strict=True)]
                outputs = given.with_sources(leaves).call()
                torch.autograd.backward(outputs, gradients_out)
                for leaf, c, g in zip(leaves, chosen, wanted, strict=True):
                    assert leaf.grad is None if not c else torch.equal(leaf.grad, g)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SEAMS)
def test_one_half_unused(name, dtype, device):
    for training, layout, used in itertools.product((True, False), CORNERS, (0, 1)):
        given = sample(name, (4, 6, 5, 5), dtype, layout, device, training=training, split=True)
        g = torch.randn(4, 3, 5, 5, device=device).to(dtype)
        gradients_out = [g, torch.zeros_like(g)] if used == 0 else [torch.zeros_like(g), g]
        wanted = run(given, gradients_out)[1]
        fresh = given.fresh()
        assert same(list(torch.autograd.grad(fresh.call()[used], fresh.sources(), g)), wanted)
        fresh = given.fresh()  # and through the path that can be differentiated again
        got = torch.autograd.grad(fresh.call()[used], fresh.sources(), g, create_graph=True)
        torch.testing.assert_close(
            list(got), wanted, rtol=0.02, atol=0.05 if dtype == torch.bfloat16 else 1e-7
        )


# Autocast


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_autocast(layout, device):
    """16-bit x beside float32 parameters, whose gradients are float32; a seam of two types widens."""
    x = torch.randn(4, 3, 8, 8, device=device).contiguous(memory_format=layout)
    kernels = [(0.3 * torch.randn(s, device=device)).requires_grad_() for s in ((6, 3, 3, 3), (6, 3, 3, 3))]
    results = []
    for ours in (True, False):
        affine = [torch.full((6,), v, device=device, requires_grad=True) for v in (1.5, 0.1) * 3]
        statistics = [torch.ones(6, device=device) for _ in range(6)]
        numbers = {"training": True, "momentum": 0.1, "eps": 1e-5, "slope": 0.2}

        def apply(name, *inputs, i, split=False):
            tensors = *affine[2 * i : 2 * i + 2], *statistics[2 * i : 2 * i + 2]
            if ours:
                return Sample(name, inputs, *tensors, **numbers, split=split).call()
            return composed(name, inputs, *tensors, **numbers, split=split)[0]

        with torch.autocast(device, dtype=torch.bfloat16):
            one, two = (F.conv2d(x, k, padding=1) for k in kernels)
            assert one.dtype == torch.bfloat16
            (y,) = apply("batch_norm_leaky_relu", one, i=0)
            (z,) = apply("leaky_relu_batch_norm", two, i=1)
            a, b = apply("split_add_batch_norm_leaky_relu", y, z, i=2, split=True)
            (c,) = apply("split_add", a, b.float(), i=0)
            assert [t.dtype for t in (y, z, a, b, c)] == [torch.bfloat16] * 4 + [torch.float32]
            (wide,) = apply("split_add_batch_norm_leaky_relu", y.float(), z, i=2)
            assert wide.dtype == torch.float32
            if ours:
                assert all(t.is_contiguous(memory_format=layout) for t in (y, z, a, b, c, wide))
            loss = (c * c.detach().cos()).sum() + (wide * wide.detach().sin()).sum()
        gradients = torch.autograd.grad(loss, affine + kernels)
        assert {g.dtype for g in gradients} == {torch.float32}
        results.append(([y, z, a, b, c, wide, *statistics], gradients))
    for ours, theirs in zip(*results):  # a bias before a normalisation has a gradient near 0, of differences
        size = max(t.detach().float().norm() for t in theirs)
        for got, want in zip(ours, theirs, strict=True):
            assert (got.float() - want.float()).norm() <= 0.02 * size


# A device


needs_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")


def on_gpu(
    name="batch_norm_leaky_relu", shape=(64, 128, 32, 32), layout="contiguous", device="cuda", **numbers
):
    return sample(name, shape, torch.bfloat16, layout, device, split=name in SEAMS, **numbers)


@needs_gpu
@pytest.mark.parametrize("name", ALL)
def test_captured_and_replayed(name):
    """Twice: counters of the workspace must be as at first."""
    for layout in CORNERS:
        given, other = on_gpu(name, layout=layout), on_gpu(name, layout=layout)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(given)  # first calls load kernels
        torch.cuda.current_stream().wait_stream(side)
        captured, graph = given.fresh(), torch.cuda.CUDAGraph()
        torch.manual_seed(9)
        gradients_out = [torch.randn_like(y) for y in given.call()]
        with torch.cuda.graph(graph):
            outputs = captured.call()
            gradients = torch.autograd.grad(outputs, captured.sources(), gradients_out)
        for now in (other, given):
            with torch.no_grad():
                for to, value in zip(captured.sources(), now.sources()):
                    to.copy_(value)
            graph.replay()
            wanted = run(now, gradients_out)
            assert same([list(outputs), list(gradients)], wanted[:2])


@needs_gpu
def test_side_stream_and_two_threads():
    given = [on_gpu(name) for name in ALL] * 2
    gradients_out = [[torch.randn_like(y) for y in g.fresh().call()] for g in given]
    alone, results = [run(g, go) for g, go in zip(given, gradients_out)], [None] * len(given)
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results[i] = run(given[i], gradients_out[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(results, alone)


@pytest.mark.skipif("cuda" not in DEVICES or torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_second_device():
    """That is not the current one."""
    for name in ALL:
        check(on_gpu(name, device="cuda:1"))


@needs_gpu
@pytest.mark.parametrize("layout", CORNERS)
@pytest.mark.parametrize("name", ALL)
def test_large_on_a_device(name, layout):
    check(on_gpu(name, layout=layout))


@needs_gpu
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_more_than_two_to_the_31_values(layout):
    shape = 513, 4, 1024, 1024  # 2**31 + 2**22
    x = torch.ones((), dtype=torch.bfloat16, device="cuda").expand(shape).contiguous(memory_format=layout)
    x[-1, -1] = 3
    mean, var = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
    y = torch.ops.gan_ops.batch_norm_leaky_relu(x, None, None, mean, var, True, 1.0, 1e-5, 0.2)
    torch.testing.assert_close(mean.cpu(), torch.tensor([1, 1, 1, 1 + 2 / 513]), rtol=1e-5, atol=0)
    assert var[0] == 0 and var[3].item() == pytest.approx(4 / 513 * (1 - 1 / 513), rel=1e-3)
    assert (y[-1, -1].float() - (2 - 2 / 513) / var[3].sqrt()).abs().max() < 0.1 and y[:, :3].abs().max() == 0
    (whole,) = torch.ops.gan_ops.split_add(x, x, False)
    assert (whole[-1, -1] == 6).all() and (whole[0] == 2).all()
