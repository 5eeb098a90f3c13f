"""What a CUDA graph makes of a training step, found out on a CPU by a stand-in that replays its calls.

A Python number or branch on a tensor, which a graph would freeze, then makes other weights than the step
itself; calls that wait for the GPU, which cannot be captured, are named. It knows no streams and no memory.
"""

import contextlib
import functools

import pytest
import torch
from conftest import SCRIPTS, flags, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dcgan

WAITING = "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "aten::equal"


class Recorder(TorchDispatchMode):
    """Writes down each call below autograd; at the end it puts everything back as it was before."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.waiting = []
        self.before = {}
        self.made = set()
        self.random = torch.get_rng_state()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema
        if any(name in schema.name for name in WAITING):
            self.waiting.append(schema.name)
        for argument, value in zip(schema.arguments, args):
            if argument.alias_info and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    key = tensor.untyped_storage().data_ptr()
                    if key not in self.made and key not in self.before:
                        self.before[key] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        if not any(returned.alias_info for returned in schema.returns):
            for tensor in tree_leaves(result):
                if torch.is_tensor(tensor):
                    self.made.add(tensor.untyped_storage().data_ptr())
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)
        torch.set_rng_state(self.random)


class Graph:
    """In the place of torch.cuda.CUDAGraph: replay() makes the recorded calls again on the same memory."""

    waiting = []  # of the last one

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.recorder.calls:
                schema = function._schema
                is_view = any(returned.alias_info for returned in schema.returns) and not schema.is_mutable
                if is_view or schema.name in ("aten::detach", "aten::alias", "aten::_unsafe_view"):
                    continue  # it is of memory that has the new content by now
                again = function(*args, **kwargs)
                if any(returned.alias_info for returned in schema.returns):
                    continue  # in place
                for old, new in zip(tree_leaves(result), tree_leaves(again)):
                    if (
                        torch.is_tensor(old)
                        and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                    ):
                        old.copy_(new)


@contextlib.contextmanager
def graph(into, stream):
    """In the place of torch.cuda.graph."""
    into.recorder = Recorder()
    with into.recorder:
        yield
    Graph.waiting = into.recorder.waiting


@pytest.fixture
def captured(monkeypatch):
    """Function that has a script capture its steps."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def capture(script):
        step = script.iterate
        works = {}

        def iterate(nets, args, *inputs):
            if id(nets) not in works:
                works[id(nets)] = script.Captured(functools.partial(step, nets, args))
            return works[id(nets)](*inputs)

        monkeypatch.setattr(script, "iterate", iterate)

    return capture


@pytest.fixture(autouse=True)
def capturable(monkeypatch):
    """Optimisers keep their numbers in tensors, as on CUDA."""

    def make_training(plain, *given):
        nets = plain(*given)
        for optimiser in nets.opt_g, nets.opt_d:
            optimiser.param_groups[0]["capturable"] = True
        return nets

    for script in SCRIPTS:
        plain = script.make_training
        monkeypatch.setattr(script, "make_training", functools.partial(make_training, plain))


def trained(script, root, out, *argv):
    """What the checkpoint of a short run has: three steps to warm up, one captured, two more replayed."""
    script.main(flags(script, root, out, *argv, "--steps", 6, "--save-every", 0))
    return load(out / "checkpoint.pt")


def same(a, b):
    """Whether two checkpoints have the same weights, averages, optimisers and metrics, bit for bit."""
    for name in "G", "D", "ema", "scaler":
        if not all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(b[name][key]))
            for key, value in a[name].items()
        ):
            return False
    for name in "opt_g", "opt_d":
        for number, state in a[name]["state"].items():
            if not all(torch.equal(value, b[name]["state"][number][key]) for key, value in state.items()):
                return False
    return all({**x, "seconds": 0} == {**y, "seconds": 0} for x, y in zip(a["rows"], b["rows"], strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_step_is_the_step(kind, precision, root, tmp_path, monkeypatch, captured):
    """With saves and samples in between, and without a call that waits for the GPU."""
    script, argv = kind
    monkeypatch.setattr(script, "LOG_EVERY", 5)
    monkeypatch.setattr(script, "SAMPLE_EVERY", 5)
    monkeypatch.setattr(script, "EMA_IMAGES", 16)
    monkeypatch.setattr(script, "GRID", 2)
    argv = [*argv.split(), "--precision", precision, "--lr-decay-from", "2"]
    step = trained(script, root, tmp_path / "step", *argv)
    captured(script)
    assert same(step, trained(script, root, tmp_path / "graph", *argv))
    assert Graph.waiting == []


@pytest.mark.parametrize("mistake", ["counter", "learning rate", "branch"])
def test_what_a_graph_would_freeze_is_found(mistake, root, tmp_path, monkeypatch, captured):
    plain_step = dcgan.train_step
    calls = []

    def train_step(nets, args, real, z):
        calls.append(1)
        if mistake == "counter":
            real = real * (1 + len(calls) / 10)
        elif mistake == "learning rate":
            nets.opt_g.param_groups[0]["lr"] = 0.001 * len(calls)
        elif z.mean() > 0:
            real = -real
        return plain_step(nets, args, real, z)

    monkeypatch.setattr(dcgan, "train_step", train_step)
    step = trained(dcgan, root, tmp_path / "step")
    calls.clear()
    captured(dcgan)
    assert not same(step, trained(dcgan, root, tmp_path / "graph"))
    assert bool(Graph.waiting) == (mistake == "branch")


def test_an_error_in_a_capture_is_the_one_that_is_reported(root, tmp_path, monkeypatch, captured, fails):
    """Not that the capture cannot be ended after it."""

    @contextlib.contextmanager
    def ending_fails(into, stream):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def too_much(*given):
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        calls.append(1)
        return plain_step(*given)

    calls = []
    plain_step = dcgan.train_step
    monkeypatch.setattr(dcgan, "train_step", too_much)
    captured(dcgan)
    monkeypatch.setattr(torch.cuda, "graph", ending_fails)
    assert "CUDA out of memory" in fails(dcgan, *flags(dcgan, root, tmp_path, "--steps", 6))
