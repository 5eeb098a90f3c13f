"""python benchmarks/ops.py: gan_ops against eager PyTorch, torch.compile and Triton, at every place between convolutions.

The sides take turns within a row, round by round, and a figure is the median of its rounds. Forward runs without
gradients; "both" is forward, then torch.autograd.grad for inputs, weight and bias; ratios and the last column belong to
it. The floor is what it needs at the speed of dst.copy_(src) on tensors of the row's size and type: 8 passes over such
a tensor, 11 at a seam. Where tensors are small, all figures are mostly the cost of calls, on CUDA of launches.

On the CPU --keep-memory has the C library keep what is freed, for all sides alike: fresh pages, which the system clears,
cost as much as a pass or two. --threads 1 counts the process's own time, which other work on the machine leaves alone.
"""
import argparse, itertools, math, os, statistics, sys, time

import torch
from torch.nn import functional as F

import gan_ops  # after torch, whose libraries it needs
try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch for CUDA
    triton = None

BN_ACT, SEAM, SUM, ACT_BN = "batch norm, LeakyReLU", "split-add", "split-add, unsplit", "LeakyReLU, batch norm"
PLACES = {  # channels and height; of 2-D inputs, channels
    BN_ACT: [(50, 1), (1024, 4), (512, 8), (256, 16), (128, 32), (64, 64), (512, 4), (256, 8), (128, 16), (64, 32),
             (128, 7), (128, 14), (64, 28)],
    SEAM: [(1024, 4), (512, 8), (256, 16), (128, 32)], SUM: [(64, 64)], ACT_BN: [(256,), (512,), (1024,)]}
TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SIDES = ("ours", "eager", "compiled", "triton")
KINDS = [(kind, side) for kind in ("forward", "both") for side in SIDES]
RATIOS = [f"{kind}, {side}/ours" for kind, side in KINDS if side != "ours"]
KEEP, LEAST = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="8589934592"), 20  # ms of a measurement, at least

if triton:
    @triton.jit
    def one_pass(x, dy, out, norm, rows, c, tiles, slope, HW: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                 FIRST: tl.constexpr, BACK: tl.constexpr, REDUCE: tl.constexpr):
        """Over tiles of R values of K channels: two sums of each channel, or y or dx. FIRST: LeakyReLU comes first."""
        channel, part = tl.program_id(0) * K + tl.arange(0, K), tl.program_id(1)
        known = channel < c
        mean, scale = tl.load(norm + channel, known, 0)[None, :], tl.load(norm + c + channel, known, 0)[None, :]
        bias, level = tl.load(norm + 2 * c + channel, known, 0)[None, :], tl.load(norm + 3 * c + channel, known, 0)[None, :]
        tilt = tl.load(norm + 4 * c + channel, known, 0)[None, :]
        one, two = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
        for tile in range(part * tiles, (part + 1) * tiles):
            row = tile * R + tl.arange(0, R)[:, None]
            place, inside = (row // HW * c + channel[None, :]) * HW + row % HW, (row < rows) & known[None, :]
            v = tl.load(x + place, inside, 0).to(tl.float32)
            y = tl.where(inside, (tl.where(v > 0, v, v * slope) if FIRST else v) - mean, 0)
            g = y
            if BACK:
                g = tl.load(dy + place, inside, 0).to(tl.float32)
                g = g if FIRST else tl.where(y * scale + bias > 0, g, g * slope)
            if REDUCE:
                one += tl.sum(g, 0)
                two += tl.sum(g * y, 0)
            else:
                y = g * scale - level - y * tilt if BACK else y * scale + bias
                corner = (v if BACK else v * 0 + 1) if FIRST else (y * 0 + 1 if BACK else y)
                tl.store(out + place, tl.where(corner > 0, y, y * slope).to(out.dtype.element_ty), inside)
        if REDUCE:
            tl.store(out + 2 * part * c + channel, one, known)
            tl.store(out + (2 * part + 1) * c + channel, two, known)


class Triton(torch.autograd.Function):
    """As one would write it there: two launches each way, and PyTorch's own for the channels' numbers; no seams."""
    @staticmethod
    def run(x, dy, norm, slope, first, back, reduces, parts=128):
        c, rows, hw = x.shape[1], x.numel() // x.shape[1], x[0, 0].numel() if x.is_contiguous() else 1
        r, k = (64, 32) if hw == 1 else (2048, 1)
        parts = triton.cdiv(rows, r * (tiles := triton.cdiv(triton.cdiv(rows, r), parts)))
        out = x.new_empty(parts, 2, c, dtype=torch.float32) if reduces else torch.empty_like(x)
        one_pass[triton.cdiv(c, k), parts](x, dy, out, norm, rows, c, tiles, slope, hw, r, k, first, back, reduces)
        return out.sum(0) if reduces else out

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, momentum, eps, slope, first):
        ctx.slope, ctx.first, ctx.count = slope, first, x.numel() // x.shape[1]
        shift = x.detach()[0].flatten(1)[:, 0].float() if x.dim() > 2 else x.detach()[0].float()
        norm = torch.stack([F.leaky_relu(shift, slope) if first else shift] + 4 * [torch.zeros_like(shift)])
        one, two = Triton.run(x, x, norm, slope, first, False, True) / ctx.count
        spread = (two - one * one).clamp_min(0)
        ctx.rstd = (spread + eps).rsqrt()
        norm[0], norm[1], norm[2] = norm[0] + one, ctx.rstd * weight, bias
        mean.lerp_(norm[0], momentum), var.lerp_(spread * (ctx.count / (ctx.count - 1)), momentum)
        ctx.save_for_backward(x, norm)
        return Triton.run(x, x, norm, slope, first, False, False)

    @staticmethod
    def backward(ctx, dy):
        x, norm = ctx.saved_tensors
        one, two = Triton.run(x, dy, norm, ctx.slope, ctx.first, True, True)
        norm = torch.cat([norm[:3], (norm[1] * one / ctx.count)[None], (norm[1] * two / ctx.count * ctx.rstd**2)[None]])
        return Triton.run(x, dy, norm, ctx.slope, ctx.first, True, False), two * ctx.rstd, one, *[None] * 6


def sides_of(operation, layout):
    """The sides' functions of a norm's tensors and the inputs; they return lists."""
    ops, seam, numbers, slope, first = torch.ops.gan_ops, operation in (SEAM, SUM), (0.1, 1e-5), 0.2, operation == ACT_BN
    single = ops.leaky_relu_batch_norm if first else ops.batch_norm_leaky_relu

    def ours(mean, var, weight, bias, *inputs):
        norm = (weight, bias, mean, var, True, *numbers, slope)
        if seam:
            return ops.split_add_batch_norm_leaky_relu(*inputs, *norm, operation == SEAM)
        return [single(*inputs, *norm)]

    def eager(mean, var, weight, bias, x, right=None):
        if first:
            return [F.batch_norm(F.leaky_relu(x, slope), mean, var, weight, bias, True, *numbers)]
        x = x + right if seam else x
        y = F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, True, *numbers), slope)
        halves = y.chunk(2 if operation == SEAM else 1, dim=1)  # dense, as the next convolution wants them
        return [half.contiguous(memory_format=layout) for half in halves]
    sides = dict(ours=ours, eager=eager, compiled=torch.compile(eager, dynamic=False))
    if triton and torch.cuda.is_available() and not seam:
        sides["triton"] = lambda mean, var, *rest: [Triton.apply(rest[2], *rest[:2], mean, var, *numbers, slope, first)]
    return sides


def make_sets(row, device, layout):
    """Triples (inputs, gradients, where a copy goes) that calls take in turn: on CUDA more than four L2 caches hold."""
    (batch, channels, *plane), dtype = row["shape"], TYPES[row["type"]]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = 1 + 4 * cache // (math.prod(row["shape"]) * dtype.itemsize)

    def tensors(parts=1, grad=False):
        whole = torch.empty(count * batch, channels // parts, *plane, dtype=dtype, device=device, memory_format=layout)
        return [part.detach().requires_grad_(grad) for part in whole.normal_().split(batch)]
    inputs, parts = 1 + (row["operation"] in (SEAM, SUM)), 1 + (row["operation"] == SEAM)
    inputs, grads = [tensors(grad=True) for _ in range(inputs)], [tensors(parts) for _ in range(parts)]
    return list(zip(zip(*inputs), zip(*grads), tensors()))


def make_calls(row, layout, norm, without):
    """{(kind, side): call of a set}."""
    calls = {("copy", "copy"): lambda inputs, grads, copy: copy.copy_(inputs[0])}
    for side, function in sides_of(row["operation"], layout).items():
        @torch.no_grad()
        def forward(inputs, grads, copy, function=function):
            function(*norm, *inputs)

        def both(inputs, grads, copy, function=function):
            torch.autograd.grad(function(*norm, *inputs), (*inputs, *norm[2:]), grads)
        calls |= {("forward", side): forward, ("both", side): both} if side not in without else {}
    return calls


def milliseconds(call, turns, count, device):
    """How long one of `count` calls takes, each on the next set."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = wait() or clock()
    for arguments in itertools.islice(turns, count):
        call(*arguments)
    wait()
    return 1000 * (clock() - start) / count


def measure(row, device, options):
    """The row with its figures, in milliseconds."""
    torch._dynamo.reset()  # else the rows add up to its limit of recompilations
    layout = LAYOUTS.get(row["layout"], torch.contiguous_format)
    norm = [torch.full((row["shape"][1],), v, device=device, requires_grad=g) for v, g in
            ((0.0, False), (1.0, False), (1.0, True), (0.0, True))]
    turns, calls = itertools.cycle(make_sets(row, device, layout)), make_calls(row, layout, norm, options.without)
    rounds, counts = {key: [] for key in calls}, {}
    for key, call in calls.items():
        milliseconds(call, turns, 3, device)  # compiles, allocates, loads kernels
        counts[key] = max(1, math.ceil(LEAST / milliseconds(call, turns, 3, device)))
    for _, (key, call) in itertools.product(range(options.rounds), calls.items()):
        rounds[key].append(milliseconds(call, turns, counts[key], device))
    ms = {key: statistics.median(values) for key, values in rounds.items()}
    floor = ms.pop(("copy", "copy")) / 2 * (11 if row["operation"] in (SEAM, SUM) else 8)  # a copy is two passes
    ratios = {f"{kind}, {side}/ours": ms[kind, side] / ms[kind, "ours"] for kind, side in ms if side != "ours"}
    return dict(row, floor=floor, ms=ms, ratios=ratios)


def cells(values, form=".3g"):
    return "".join(f"{'-' if v is None else v if isinstance(v, str) else format(v, form):>9}" for v in values)


def summarise(rows):
    """Print the ratios' geometric means, by type and layout, and where ours is not the fastest."""
    for group in dict.fromkeys(["all", *(row["type"] for row in rows), *(row["layout"] for row in rows)]):
        chosen = [row["ratios"] for row in rows if group in ("all", row["type"], row["layout"])]
        print(f"{group} ({len(chosen)}):", *(
            f"{name} {statistics.geometric_mean([r[name] for r in chosen if name in r]):.2f};" for name in RATIOS
            if any(name in r for r in chosen)))
    for row in rows:
        if slower := {name: round(ratio, 2) for name, ratio in row["ratios"].items() if ratio < 1}:
            print("slower:", row["label"], slower)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[64, 128])
    add("--only", nargs="+", default=[""], metavar="TEXT", help="rows with this in the operation, or in CxH (64x32)")
    add("--rounds", type=int, default=5)
    add("--without", nargs="+", default=[], choices=SIDES[2:])
    add("--keep-memory", action="store_true", help="of the C library, see above; CPU")
    add("--threads", type=int)
    options = parser.parse_args()
    if options.keep_memory and any(os.environ.get(key) != value for key, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)  # it is read when a process starts
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in gan_ops.devices:
        parser.error(f"gan_ops is built without {device.type}: {gan_ops.without_cuda}")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    print(f"torch {torch.__version__}; {torch.get_num_threads()} threads; milliseconds: forward, both, at a copy's speed; "
          f"times ours in both; share of that speed\n{'':54}" + cells([*SIDES, *SIDES, "floor", *SIDES[1:], "speed"]))
    rows, everywhere = [], ((name, batch, p) for name, places in PLACES.items() for batch in options.batch for p in places)
    for operation, batch, place in everywhere:
        if any(text in operation or text in "x".join(map(str, place)) for text in options.only):
            for layout, dtype in itertools.product(LAYOUTS if len(place) > 1 else ["2-D"], TYPES):
                shape = batch, *place, *place[1:]
                label = f"{operation:21} {'x'.join(map(str, shape)):13} {layout:13} {dtype}"
                row = dict(operation=operation, shape=shape, layout=layout, type=dtype, label=label)
                rows.append(row := measure(row, device, options))
                figures = [row["ms"].get(key) for key in KINDS] + [row["floor"]]
                ratios = cells([row["ratios"].get(f"both, {side}/ours") for side in SIDES[1:]], ".2f")
                print(label + cells(figures) + ratios + cells([row["floor"] / figures[4]], ".0%"), flush=True)
    summarise(rows)


if __name__ == "__main__":
    main()
