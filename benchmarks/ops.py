"""python benchmarks/ops.py: gan_ops against eager PyTorch, torch.compile and Triton.

At every place between convolutions the sides take turns, round by round, and a figure is the median of its
rounds. Forward runs without gradients; "both" is forward, then torch.autograd.grad for inputs, weight and
bias; ratios and the last column belong to it. The floor is what it needs at the speed of dst.copy_(src) on
tensors of the row's size and type: 8 passes over such a tensor, 11 at a seam. Where tensors are small, all
figures are mostly the cost of calls, on CUDA of launches.

On the CPU --keep-memory has the C library keep what is freed, for all sides alike: fresh pages, which the
system clears, cost as much as a pass or two. --threads 1 counts the process's own time, which other work on
the machine leaves alone.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import gan_ops  # after torch, whose libraries it needs

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch for CUDA
    triton = None

BN_ACT = "batch norm, LeakyReLU"
SEAM = "split-add"
SUM = "split-add, unsplit"
ACT_BN = "LeakyReLU, batch norm"
PLACES = {  # channels and height; of 2-D inputs, channels
    BN_ACT: "50x1 1024x4 512x8 256x16 128x32 64x64 512x4 256x8 128x16 64x32 128x7 128x14 64x28",
    SEAM: "1024x4 512x8 256x16 128x32",
    SUM: "64x64",
    ACT_BN: "256 512 1024",
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SLOPE = 0.2
MOMENTUM = 0.1
EPS = 1e-5
SIDES = "ours", "eager", "compiled", "triton"
OTHERS = SIDES[1:]
KINDS = "forward", "both"
LEAST = 20  # milliseconds of a measurement, at least
COPY = "copy", "copy"  # its place among the (kind, side)
KEEP_MEMORY = {  # for glibc, which reads it as a process starts
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}

if triton:

    @triton.jit
    def one_pass(
        x,
        dy,
        out,
        norm,  # 5,c: mean, scale, bias, level, tilt of each channel
        rows,
        c,
        tiles,
        slope,
        HW: tl.constexpr,
        R: tl.constexpr,
        K: tl.constexpr,
        FIRST: tl.constexpr,
        BACK: tl.constexpr,
        REDUCE: tl.constexpr,
    ):
        """Over tiles of R values of K channels: two sums of each channel, or y or dx.

        FIRST: LeakyReLU comes first.
        """
        channel = tl.program_id(0) * K + tl.arange(0, K)
        part = tl.program_id(1)
        known = channel < c
        mean = tl.load(norm + channel, known, 0)[None, :]
        scale = tl.load(norm + c + channel, known, 0)[None, :]
        bias = tl.load(norm + 2 * c + channel, known, 0)[None, :]
        level = tl.load(norm + 3 * c + channel, known, 0)[None, :]
        tilt = tl.load(norm + 4 * c + channel, known, 0)[None, :]
        one = tl.zeros((K,), tl.float32)
        two = tl.zeros((K,), tl.float32)
        for tile in range(part * tiles, (part + 1) * tiles):
            row = tile * R + tl.arange(0, R)[:, None]
            place = (row // HW * c + channel[None, :]) * HW + row % HW
            inside = (row < rows) & known[None, :]
            v = tl.load(x + place, inside, 0).to(tl.float32)
            y = v
            if FIRST:
                y = tl.where(v > 0, v, v * slope)
            y = tl.where(inside, y - mean, 0)
            g = y
            if BACK:
                g = tl.load(dy + place, inside, 0).to(tl.float32)
                if not FIRST:
                    g = tl.where(y * scale + bias > 0, g, g * slope)
            if REDUCE:
                one += tl.sum(g, 0)
                two += tl.sum(g * y, 0)
            else:
                if BACK:
                    result = g * scale - level - y * tilt
                    if FIRST:
                        result = tl.where(v > 0, result, result * slope)
                else:
                    result = y * scale + bias
                    if not FIRST:
                        result = tl.where(result > 0, result, result * slope)
                tl.store(out + place, result.to(out.dtype.element_ty), inside)
        if REDUCE:
            tl.store(out + 2 * part * c + channel, one, known)
            tl.store(out + (2 * part + 1) * c + channel, two, known)


class Triton(torch.autograd.Function):
    """As one would write it there: two launches each way, PyTorch's for the channels' numbers; no seams."""

    @staticmethod
    def run(x, dy, norm, slope, first, back, reduces):
        """A launch: two sums of each channel (2,c), or y or dx."""
        c = x.shape[1]
        rows = x.numel() // c
        hw = x[0, 0].numel() if x.is_contiguous() else 1
        r, k = (64, 32) if hw == 1 else (2048, 1)
        tiles = triton.cdiv(triton.cdiv(rows, r), 128)  # of one program: 128 parts at most
        parts = triton.cdiv(rows, r * tiles)
        out = x.new_empty(parts, 2, c, dtype=torch.float32) if reduces else torch.empty_like(x)
        grid = triton.cdiv(c, k), parts
        one_pass[grid](x, dy, out, norm, rows, c, tiles, slope, hw, r, k, first, back, reduces)
        return out.sum(0) if reduces else out

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, slope, first):
        count = x.numel() // x.shape[1]
        shift = x.detach()[0]  # the sums are of differences from the first value of each channel
        if x.dim() > 2:
            shift = shift.flatten(1)[:, 0]
        shift = shift.float()
        if first:
            shift = F.leaky_relu(shift, slope)
        norm = torch.stack([shift, *[torch.zeros_like(shift)] * 4])
        one, two = Triton.run(x, x, norm, slope, first, False, True) / count
        var = (two - one * one).clamp_min(0)
        rstd = (var + eps).rsqrt()
        norm[0] += one
        norm[1] = rstd * weight
        norm[2] = bias
        running_mean.lerp_(norm[0], momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
        ctx.slope = slope
        ctx.first = first
        ctx.count = count
        ctx.rstd = rstd
        ctx.save_for_backward(x, norm)
        return Triton.run(x, x, norm, slope, first, False, False)

    @staticmethod
    def backward(ctx, dy):
        x, norm = ctx.saved_tensors
        one, two = Triton.run(x, dy, norm, ctx.slope, ctx.first, True, True)
        level = norm[1] * one / ctx.count
        tilt = norm[1] * two / ctx.count * ctx.rstd**2
        norm = torch.cat([norm[:3], level[None], tilt[None]])
        dx = Triton.run(x, dy, norm, ctx.slope, ctx.first, True, False)
        return dx, two * ctx.rstd, one, None, None, None, None, None, None


def make_ours(operation):
    """gan_ops' function of a norm's tensors and the inputs; it returns a list."""
    ops = torch.ops.gan_ops
    split_add = ops.split_add_batch_norm_leaky_relu
    single = ops.leaky_relu_batch_norm if operation == ACT_BN else ops.batch_norm_leaky_relu
    splits = operation == SEAM

    def ours_split_add(mean, var, weight, bias, left, right):
        return split_add(left, right, weight, bias, mean, var, True, MOMENTUM, EPS, SLOPE, splits)

    def ours(mean, var, weight, bias, x):
        return [single(x, weight, bias, mean, var, True, MOMENTUM, EPS, SLOPE)]

    return ours_split_add if operation in (SEAM, SUM) else ours


def make_eager(operation, layout):
    """PyTorch's."""
    first = operation == ACT_BN
    adds = operation in (SEAM, SUM)
    parts = 2 if operation == SEAM else 1

    def eager(mean, var, weight, bias, x, right=None):
        if first:
            return [F.batch_norm(F.leaky_relu(x, SLOPE), mean, var, weight, bias, True, MOMENTUM, EPS)]
        if adds:
            x = x + right
        y = F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS), SLOPE)
        halves = y.chunk(parts, dim=1)  # dense, as the next convolution wants them
        return [half.contiguous(memory_format=layout) for half in halves]

    return eager


def make_triton(operation):
    """Triton's."""

    def by_triton(mean, var, weight, bias, x):
        return [Triton.apply(x, weight, bias, mean, var, MOMENTUM, EPS, SLOPE, operation == ACT_BN)]

    return by_triton


def make_sides(operation, layout):
    """{side: its function}."""
    eager = make_eager(operation, layout)
    sides = {"ours": make_ours(operation), "eager": eager, "compiled": torch.compile(eager, dynamic=False)}
    if triton and torch.cuda.is_available() and operation not in (SEAM, SUM):
        sides["triton"] = make_triton(operation)
    return sides


def make_sets(row, device, layout):
    """Triples (inputs, gradients, where a copy goes) that calls take in turn.

    On CUDA they are more than four L2 caches hold.
    """
    batch, channels, *plane = row["shape"]
    dtype = TYPES[row["type"]]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = 1 + 4 * cache // (math.prod(row["shape"]) * dtype.itemsize)

    def tensors(channels, grad=False):
        shape = count * batch, channels, *plane
        whole = torch.empty(shape, dtype=dtype, device=device, memory_format=layout).normal_()
        return [part.detach().requires_grad_(grad) for part in whole.split(batch)]

    inputs = [tensors(channels, grad=True)]
    if row["operation"] in (SEAM, SUM):
        inputs.append(tensors(channels, grad=True))
    gradients = [tensors(channels)]
    if row["operation"] == SEAM:
        gradients = [tensors(channels // 2), tensors(channels // 2)]
    return list(zip(zip(*inputs), zip(*gradients), tensors(channels)))


def make_call(kind, function, norm):
    """A call of a side's function on a set."""

    @torch.no_grad()
    def forward(inputs, gradients, copy):
        function(*norm, *inputs)

    def both(inputs, gradients, copy):
        _, _, weight, bias = norm
        torch.autograd.grad(function(*norm, *inputs), (*inputs, weight, bias), gradients)

    return forward if kind == "forward" else both


def make_calls(row, layout, norm, without):
    """{(kind, side): call of a set}."""

    def copy_once(inputs, gradients, copy):
        copy.copy_(inputs[0])

    calls = {COPY: copy_once}
    for side, function in make_sides(row["operation"], layout).items():
        if side not in without:
            for kind in KINDS:
                calls[kind, side] = make_call(kind, function, norm)
    return calls


def clock(device):
    """Seconds, once all that was begun on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def milliseconds(call, turns, count, device):
    """How long one of `count` calls takes, each on the next set."""
    began = clock(device)
    for arguments in itertools.islice(turns, count):
        call(*arguments)
    return 1000 * (clock(device) - began) / count


def measure(row, device, options):
    """The row with its figures, in milliseconds."""
    torch._dynamo.reset()  # else the rows add up to its limit of recompilations
    layout = LAYOUTS.get(row["layout"], torch.contiguous_format)
    channels = row["shape"][1]
    norm = [
        torch.zeros(channels, device=device),  # running mean
        torch.ones(channels, device=device),  # running variance
        torch.ones(channels, device=device, requires_grad=True),  # weight
        torch.zeros(channels, device=device, requires_grad=True),  # bias
    ]
    turns = itertools.cycle(make_sets(row, device, layout))
    calls = make_calls(row, layout, norm, options.without)
    counts = {}
    for key, call in calls.items():
        milliseconds(call, turns, 3, device)  # compiles, allocates, loads kernels
        counts[key] = max(1, math.ceil(LEAST / milliseconds(call, turns, 3, device)))
    rounds = {key: [] for key in calls}
    for _ in range(options.rounds):
        for key, call in calls.items():
            rounds[key].append(milliseconds(call, turns, counts[key], device))
    ms = {key: statistics.median(values) for key, values in rounds.items()}
    passes = 11 if row["operation"] in (SEAM, SUM) else 8
    floor = ms.pop(COPY) / 2 * passes  # a copy is two passes
    ratios = {(kind, side): ms[kind, side] / ms[kind, "ours"] for kind, side in ms if side != "ours"}
    return {**row, "floor": floor, "ms": ms, "ratios": ratios}


def cells(values, form=".3g"):
    """Texts, numbers and Nones as cells of the table."""
    text = ""
    for value in values:
        if value is None:
            value = "-"
        elif not isinstance(value, str):
            value = format(value, form)
        text += f"{value:>9}"
    return text


def print_row(row):
    """A line of the table."""
    times = [row["ms"].get((kind, side)) for kind in KINDS for side in SIDES]
    ratios = [row["ratios"].get(("both", side)) for side in OTHERS]
    speed = row["floor"] / row["ms"]["both", "ours"]
    cell_texts = cells([*times, row["floor"]]) + cells(ratios, ".2f") + cells([speed], ".0%")
    print(row["label"] + cell_texts, flush=True)


def summarise(rows):
    """Print the ratios' geometric means, by type and layout, and where ours is not the fastest."""
    groups = dict.fromkeys(["all", *(row["type"] for row in rows), *(row["layout"] for row in rows)])
    for group in groups:
        chosen = [row["ratios"] for row in rows if group in ("all", row["type"], row["layout"])]
        means = []
        for key in itertools.product(KINDS, OTHERS):
            values = [ratios[key] for ratios in chosen if key in ratios]
            if values:
                means.append(f"{key[0]}, {key[1]}/ours {statistics.geometric_mean(values):.2f};")
        print(f"{group} ({len(chosen)}):", *means)
    for row in rows:
        slower = {f"{kind}, {side}/ours": round(v, 2) for (kind, side), v in row["ratios"].items() if v < 1}
        if slower:
            print("slower:", row["label"], slower)


def make_rows(options):
    """The rows to be measured."""
    rows = []
    for operation, places in PLACES.items():
        for batch, place in itertools.product(options.batch, places.split()):
            if not any(text in operation or text in place for text in options.only):
                continue
            channels, *height = [int(number) for number in place.split("x")]
            shape = batch, channels, *height, *height
            shape_text = "x".join(str(number) for number in shape)
            for layout, dtype in itertools.product(LAYOUTS if height else ["2-D"], TYPES):
                label = f"{operation:21} {shape_text:13} {layout:13} {dtype}"
                row = {"operation": operation, "shape": shape, "layout": layout, "type": dtype}
                rows.append({**row, "label": label})
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[64, 128])
    add("--only", nargs="+", default=[""], metavar="TEXT", help="in the operation or in CxH, as 64x32 (all)")
    add("--rounds", type=int, default=5)
    add("--without", nargs="+", default=[], choices=SIDES[2:])
    add("--keep-memory", action="store_true", help="of the C library, see above; CPU")
    add("--threads", type=int)
    options = parser.parse_args()
    if options.keep_memory and not os.environ.items() >= KEEP_MEMORY.items():  # begin anew, with these
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in gan_ops.devices:
        parser.error(f"gan_ops is built without {device.type}: {gan_ops.without_cuda}")
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}; {torch.get_num_threads()} threads")
    print("milliseconds: forward, both, at a copy's speed; times ours in both; share of that speed")
    print(" " * 54 + cells([*SIDES, *SIDES, "floor", *OTHERS, "speed"]))
    rows = []
    for row in make_rows(options):
        rows.append(measure(row, device, options))
        print_row(rows[-1])
    summarise(rows)


if __name__ == "__main__":
    main()
