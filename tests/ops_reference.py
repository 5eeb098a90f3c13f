"""What tests/test_gan_ops.py compares gan_ops with: the same operations composed of PyTorch's, and inputs.

A Sample is one call: its tensors, in some layout and type, and its numbers.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

SINGLE = "batch_norm_leaky_relu", "leaky_relu_batch_norm"
SEAMS = "split_add_batch_norm_leaky_relu", "split_add"
NORMS = *SINGLE, SEAMS[0]
ALL = *SINGLE, *SEAMS
LAYOUTS = "contiguous", "channels_last", "unaligned", "strided", "transposed", "expanded"
TYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def parameter_type(dtype):
    """The type of weights and statistics that stand beside x of a type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def composed(
    name, inputs, weight, bias, mean, var, *, training, momentum, eps, slope, biased=False, split=False
):
    """An operation's outputs by PyTorch, in the types given, and what the activation acts on (or None)."""
    x = inputs[0] + inputs[1] if name in SEAMS else inputs[0]
    if name == "split_add":
        return list(x.chunk(2, 1)) if split else [x], None
    before = None
    if name == "leaky_relu_batch_norm":
        x = F.leaky_relu(x, slope)
    keras = biased and training and var is not None
    y = F.batch_norm(x, mean, var.clone() if keras else var, weight, bias, training, momentum, eps)
    if keras and x.numel():
        dims = [d for d in range(x.dim()) if d != 1]
        var.copy_(var + momentum * (x.detach().var(dims, unbiased=False) - var))
    if name != "leaky_relu_batch_norm":
        before, y = y, F.leaky_relu(y, slope)
    return list(y.chunk(2, 1)) if split else [y], before


@dataclass
class Sample:
    """One call of an operation."""

    name: str
    inputs: tuple  # x, or left and right
    weight: torch.Tensor = None
    bias: torch.Tensor = None
    mean: torch.Tensor = None
    var: torch.Tensor = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    slope: float = 0.2
    biased: bool = False  # single operations only
    split: bool = False  # seams only

    @property
    def numbers(self):
        return {
            key: getattr(self, key) for key in ("training", "momentum", "eps", "slope", "biased", "split")
        }

    @property
    def op(self):
        return getattr(torch.ops.gan_ops, self.name)

    @property
    def arguments(self):
        """The arguments of the call, in order."""
        if self.name == "split_add":
            return *self.inputs, self.split
        last = self.split if self.name in SEAMS else self.biased
        return (
            *self.inputs,
            self.weight,
            self.bias,
            self.mean,
            self.var,
            self.training,
            self.momentum,
            self.eps,
            self.slope,
            last,
        )

    def call(self):
        """The outputs of gan_ops, always as a list."""
        y = self.op(*self.arguments)
        assert isinstance(y, list) == (self.name in SEAMS)
        return y if isinstance(y, list) else [y]

    def eager(self):
        """The outputs of PyTorch in the types given, as a list."""
        return composed(self.name, self.inputs, self.weight, self.bias, self.mean, self.var, **self.numbers)[
            0
        ]

    def sources(self):
        """The tensors that can have a gradient."""
        return [t for t in (*self.inputs, self.weight, self.bias) if t is not None]

    def with_sources(self, tensors):
        """The same call on other tensors in place of sources(), with running statistics of its own."""
        left = iter(tensors)
        inputs = tuple(next(left) for _ in self.inputs)
        weight, bias = (None if t is None else next(left) for t in (self.weight, self.bias))
        mean, var = (None if t is None else t.clone() for t in (self.mean, self.var))
        return replace(self, inputs=inputs, weight=weight, bias=bias, mean=mean, var=var)

    def mapped(self, function):
        """The same call on what the function makes of each tensor."""
        tensors = {key: getattr(self, key) for key in ("weight", "bias", "mean", "var")}
        return replace(
            self,
            inputs=tuple(map(function, self.inputs)),
            **{key: None if t is None else function(t) for key, t in tensors.items()},
        )

    def fresh(self, grad=True):
        """The same call on leaves that are new, in the same layout, with running statistics of its own."""
        return self.with_sources([t.detach().requires_grad_(grad) for t in self.sources()])


def laid(x, layout):
    """The values of x (for `expanded`: of its first row) in a layout of memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
    if layout == "unaligned":  # one element past where an allocator puts things
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, 99)], 2).flatten(1, 2)[:, ::2]
    if layout == "transposed":
        a, b = (0, 1) if x.dim() == 2 else (2, x.dim() - 1)
        return x.transpose(a, b).contiguous().transpose(a, b)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)
    assert layout == "contiguous"
    return x.contiguous()


def draw(shape, dtype, device="cpu"):
    """Random numbers whose channels differ, each spread widely enough to have a variance worth its name."""
    n, c, *rest = shape
    count = n * torch.Size(rest).numel()
    spread = torch.linspace(-1.5, 1.5, max(count, 1), dtype=torch.float64)[torch.rand(c, count).argsort(1)]
    spread = spread + 0.1 * torch.randn(c, count, dtype=torch.float64)
    values = spread * (0.5 + torch.rand(c, 1)) + 0.5 * torch.randn(c, 1)
    return values.view(c, n, *rest).transpose(0, 1).contiguous().to(device, dtype)


def sample(
    name,
    shape,
    dtype=torch.float32,
    layout="contiguous",
    device="cpu",
    affine="both",
    statistics=True,
    **numbers,
):
    """A Sample with random tensors; affine: both, weight, bias or none of them."""
    x = draw(shape, torch.float64)
    if name in SEAMS:
        right = torch.randn(shape, dtype=torch.float64)
        inputs = x - right, right
    else:
        inputs = (x,)
    c = shape[1]
    kind = {"dtype": parameter_type(dtype), "device": device}
    made = Sample(name, tuple(laid(t.to(device, dtype), layout) for t in inputs), **numbers)
    if name == "split_add":
        return made
    if affine in ("both", "weight"):
        made.weight = (torch.randn(c).sign() * (0.5 + torch.rand(c))).to(**kind)
    if affine in ("both", "bias"):
        made.bias = torch.randn(c).to(**kind)
    if statistics:
        made.mean, made.var = (0.5 * torch.randn(c)).to(**kind), (0.5 + torch.rand(c)).to(**kind)
    return made


def widened(t):
    """float64 on the CPU, contiguous, apart from the original."""
    return None if t is None else t.detach().cpu().double().contiguous().clone()


class Expected:
    """A sample's results in float64 from the inputs as they are, and how far one in its type may be away.

    A seam's sum is rounded to its type, as PyTorch's is; all else is in float32 or better, rounded once at
    the end.
    """

    def __init__(self, given):
        self.sample = given
        self.type = torch.promote_types(given.inputs[0].dtype, given.inputs[-1].dtype)
        x = given.inputs[0].detach()
        x = widened(x + given.inputs[1].detach() if given.name in SEAMS else x).requires_grad_()
        self.x = x
        self.weight, self.bias, self.mean, self.var = map(
            widened, (given.weight, given.bias, given.mean, given.var)
        )
        self.sources = [x] + [t.requires_grad_() for t in (self.weight, self.bias) if t is not None]
        inputs = (x, torch.zeros_like(x)) if given.name in SEAMS else (x,)
        self.old_mean, self.old_var = widened(self.mean), widened(self.var)
        self.outputs, self.before = composed(
            given.name, inputs, self.weight, self.bias, self.mean, self.var, **given.numbers
        )
        self.tiny = 128 * torch.finfo(parameter_type(self.type)).eps
        if given.name != "split_add" and x.numel():
            into = F.leaky_relu(x, given.slope) if given.name == "leaky_relu_batch_norm" else x
            into = into.detach().transpose(0, 1).flatten(1)
            moments = (
                (into.mean(1), into.var(1, unbiased=False))
                if given.training
                else (self.old_mean, self.old_var)
            )
            self.rstd = (moments[1] + given.eps).rsqrt()
            self.centre, self.size = moments[0], into.abs().amax(1) + moments[0].abs()
            self.gain = self.rstd * (1 if self.weight is None else self.weight.detach().abs())
            self.size_out = self.size * self.gain + (0 if self.bias is None else self.bias.detach().abs())

    def gradients_out(self, layout="contiguous"):
        """Random gradients of the outputs, 0 where float32 could be on the other side of the kink."""
        y = torch.cat(self.outputs, 1).detach()
        g = torch.randn(y.shape, dtype=torch.float64)
        if self.before is not None and g.numel():
            near = self.tiny * 8 * per_channel(self.size_out, y)
            g = g * (self.before.detach().abs() > near)
        g = g.to(self.type)
        if layout == "expanded":  # the first row's zeros hold for all rows
            g = g * (g != 0).all(0, keepdim=True)
        parts = g.chunk(2, 1) if self.sample.split else [g]
        device = self.sample.inputs[0].device
        parts = [p if layout == "contiguous" and self.sample.split else laid(p, layout) for p in parts]
        return [p.to(device) for p in parts]

    def check_outputs(self, outputs):
        given = self.sample
        assert len(outputs) == len(self.outputs)
        for y, wanted in zip(outputs, self.outputs, strict=True):
            assert y.shape == wanted.shape and y.dtype == self.type and y.device == given.inputs[0].device
        y, wanted = torch.cat(list(outputs), 1).detach(), torch.cat(self.outputs, 1).detach()
        if given.name == "split_add":
            assert torch.equal(y.cpu().double(), wanted)
        elif y.numel():
            near(y, wanted, self.tiny * per_channel(self.size_out, wanted), "output")

    def check_statistics(self, mean, var):
        """Running statistics are what they should be by now, in evaluation and for no values to the bit."""
        if self.mean is None:
            return
        if not self.sample.training or not self.x.numel():
            assert torch.equal(widened(mean), self.old_mean) and torch.equal(widened(var), self.old_var)
            return
        near(mean, self.mean, self.tiny * (self.size + self.old_mean.abs()), "running_mean")
        near(var, self.var, self.tiny * (self.size**2 + self.old_var), "running_var")

    def check_gradients(self, gradients, gradients_out):
        """That the gradients of sources() are what they should be for gradients_out of the outputs."""
        given = self.sample
        wanted = torch.autograd.grad(
            self.outputs, self.sources, [widened(g) for g in gradients_out], retain_graph=True
        )
        dx, rest = wanted[0], wanted[1:]
        ours, ours_rest = gradients[: len(given.inputs)], gradients[len(given.inputs) :]
        for got, x in zip((*ours, *ours_rest), given.sources(), strict=True):
            assert got.shape == x.shape and got.dtype == x.dtype and got.device == x.device
        if given.name == "split_add":
            for got, x in zip(ours, given.inputs, strict=True):
                assert torch.equal(got.cpu(), dx.to(self.type).to(x.dtype))
            return
        if not dx.numel():
            assert all(not g.any() for g in ours_rest)
            return
        g = torch.cat([widened(g) for g in gradients_out], 1).transpose(0, 1).flatten(1).abs()
        scale = g.amax(1) * self.gain
        if given.training:  # mean(g * xhat) * xhat is a difference that may leave little
            xhat = (self.size + self.centre.abs()) * self.rstd
            scale = scale * (1 + torch.minimum(xhat, torch.tensor(float(g.size(1)))))
        for got in ours:
            near(got, dx, self.tiny * per_channel(scale, dx), "dx")
        for got, expected, x in zip(ours_rest, rest, given.sources()[len(given.inputs) :], strict=True):
            total = g.sum(1)
            near(
                got,
                expected,
                self.tiny * (total * self.size * self.rstd if x is given.weight else total),
                "dweight" if x is given.weight else "dbias",
            )


def per_channel(values, like):
    """One value per channel in a shape that broadcasts."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def near(actual, wanted, slack, what):
    """Equal to within one rounding to actual's type and the slack."""
    eps = torch.finfo(actual.dtype).eps
    smallest = torch.finfo(actual.dtype).smallest_normal * eps
    error = (actual.detach().cpu().double() - wanted).abs()
    over = error - (eps * wanted.abs() + slack + smallest)
    assert not (over > 0).any() and not over.isnan().any(), (
        f"{what}: error {error.max().item():.3g}, over the bound by {over.max().item():.3g}"
    )


def is_dense(y, like):
    """Whether y has a layout that its input wants: the input's where that is one of the two, else either."""
    last = torch.channels_last
    if like.dim() != 4 or like.is_contiguous():
        return y.is_contiguous()
    return (
        y.is_contiguous(memory_format=last)
        or not like.is_contiguous(memory_format=last)
        and y.is_contiguous()
    )
