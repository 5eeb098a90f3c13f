"""python benchmarks/train.py --script dcgan: images a second of training, our way against the usual way.

Each round runs each side once, one after the other, in a process of its own: the same networks, losses and
batch size on the same pictures. Figures are the median, lowest and highest of the rounds' ratios.
- ours: the script as it is, its averaged generator and flips included, without augmentation.
- without gan_ops: the same with --no-fused, where gan_ops is installed.
- memory kept (--keep-memory): ours, where the C library keeps freed memory, not giving it back to Linux.
- usual: PyTorch's DCGAN example. A DataLoader with workers over torchvision's ImageFolder of JPEG files,
  MNIST or FashionMNIST; eager fp32 with torch's own settings, contiguous, activations in place, plain Adam,
  .item() of both losses at each step.
Flags not listed below go to the script: --width, --batch-size (64; cspup128 and fashion_keras_port 32),
--device, ... Unless they say otherwise dcgan has --recipe classic, cspup128 --loss bce --gamma 0.
"""
import argparse, functools, importlib, itertools, json, os, platform, random, shlex, statistics, subprocess
import sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the scripts are
FLAGS = {  # by script: what is measured, where flags given do not say otherwise
    "dcgan": ["--recipe", "classic"],
    "cspup128": ["--batch-size", "32", "--loss", "bce", "--gamma", "0"],
    "cgan_residual": [], "fashion_keras_port": []}
DIGITS = dict(mnist=torchvision.datasets.MNIST, fashion=torchvision.datasets.FashionMNIST)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
KEEP = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="8589934592")  # for glibc, read as a process starts

# For all benchmarks
def fail(message):
    """End with one line, for what the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def machine():
    """The processor, the GPU if there is one, the versions and the command, as a dict."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    about = dict(cpu=names[0] if names else platform.processor() or platform.machine(), cores=CORES)
    if torch.cuda.is_available(): about["gpu"] = torch.cuda.get_device_name()
    return dict(about, python=platform.python_version(), torch=str(torch.__version__),
                command=shlex.join(["python", *sys.argv]))

def start_parser(doc, script=None):
    """An argparse parser with --rounds, --json and, where `script` is the default one, --script."""
    about = dict(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    parser.error, add = fail, parser.add_argument
    if script: add("--script", choices=FLAGS, default=script, help=f"what is measured ({script})")
    add("--rounds", type=int, default=3, help="turns of each side (3)")
    add("--json", type=Path, help="write all figures there")
    return parser

def show(about):
    """Print a dict in one line."""
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)

def save(path, figures):
    """Write figures as JSON, if a path is given."""
    if path: path.write_text(json.dumps(figures, indent=1) + "\n")

def compare(ours, theirs):
    """[median, lowest, highest] of the ratios of two lists of rounds' figures."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    return [statistics.median(ratios), min(ratios), max(ratios)]

def make_pictures(script, folder, count):
    """Write `count` pictures that the script draws into the folder as JPEG, those of no class into drawn/.

    Faces have the size of aligned CelebA's, and blurred noise, which gives their files the size, and so the
    time to decode, of photographs. Others are flat, of 64 to 150 pixels a side as those found online.
    """
    for index, name in enumerate(script.DRAWN[:count]):
        faces, side = script.SCRIPT == "cspup128", random.Random(index).randint(64, 150)
        image = ImageOps.fit(script.draw_picture(index), (178, 218) if faces else (side, side))
        if faces:
            noise = np.random.default_rng(index).normal(0, 3, (218 // 2, 178 // 2)).astype(np.float32)
            noise = np.asarray(Image.fromarray(noise).resize(image.size, Image.BICUBIC))[..., None]
            image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        file = Path(folder, name if "/" in name else f"drawn/{name}").with_suffix(".jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=90)

def measure(script, side, flags, steps=None, **environment):
    """One side's round, in a process of its own: its figures as a dict (see work)."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        mine = ["--script", script, "--side", side, "--json", str(result), "--steps", str(steps or 0)]
        command = [sys.executable, __file__, *mine, *flags, "--out", f"{folder}/run"]
        done = subprocess.run(command, env=dict(os.environ, **environment), capture_output=True, text=True)
        if not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            fail(lines[0][7:] if lines else f"{shlex.join(command)} failed:\n{done.stderr}")
        return json.loads(result.read_text())

# One side of one round
def timed(source, device, steps, report):
    """Yield `steps` batches of `source` (0: 50 on CUDA, else 4) after some that warm up; then report(steps,
    seconds, share of these that was spent on waiting for batches)."""
    warm, steps = (10, steps or 50) if device.type == "cuda" else (2, steps or 4)  # the 4th makes a graph
    wait_for_device, waited = getattr(torch, device.type).synchronize, 0.0
    for number in range(warm + steps):
        if number == warm:
            wait_for_device()
            began, waited = time.perf_counter(), 0.0
        asked, batch = time.perf_counter(), next(source)
        waited += time.perf_counter() - asked
        yield batch
    wait_for_device()
    seconds = time.perf_counter() - began
    report(steps, seconds, waited / seconds)

def time_ours(script, flags, steps, report):
    """Have the script train, and end it after the timed steps."""
    batches, load_pack = script.batches, script.load_pack

    def timed_batches(arrays, args, device, step):
        source = batches(arrays, args, device, step)
        yield from timed(source, device, steps, functools.partial(report, args))
        raise SystemExit  # which the script lets pass

    def repeated(args):  # an epoch longer than a round, so that no samples are made meanwhile
        pack, names = load_pack(args)
        pick = np.arange(max(len(pack), args.batch_size * (11 + (steps or 50)))) % len(pack)
        return (pack, names) if len(pick) == len(pack) else (pack[pick], [names[i] for i in pick])
    script.batches, script.load_pack = timed_batches, repeated
    script.main([*flags, *["--no-augment"] * (script.SCRIPT == "dcgan"), "--save-every", "1000"])

def as_usual(script, network):
    """The network as the DCGAN example would write it: torch's batch norm, activations in place."""
    if hasattr(network, "project"):  # gives its feature map channels_last, a view would be the usual way
        network.layers.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is getattr(script, "BatchNormLeakyReLU", None):
                norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
                activation = nn.LeakyReLU(child.slope, inplace=True) if child.slope else nn.ReLU(inplace=True)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, nn.Sequential(norm, activation))
            elif isinstance(child, nn.BatchNorm1d):  # Keras's order
                norm = nn.BatchNorm1d(child.num_features, child.eps, child.momentum)
                setattr(module, name, nn.Sequential(nn.LeakyReLU(0.2, inplace=True), norm))
            elif isinstance(child, nn.LeakyReLU):
                child.inplace = True
    return network

def usual_data(args, workers):
    """A DataLoader over pictures and labels without end, as the DCGAN example has it."""
    steps = transforms.Resize(args.size), transforms.CenterCrop(args.size), transforms.ToTensor()
    way = transforms.Compose([*[transforms.Grayscale()] * (args.channels == 1), *steps,
                              transforms.Normalize([0.5], [0.5])])
    if args.data in DIGITS: data = DIGITS[args.data](args.root, transform=way, download=True)
    else: data = torchvision.datasets.ImageFolder(args.data, way)
    endless = (i for _ in itertools.count() for i in torch.randperm(len(data)).tolist())  # no pause between
    return DataLoader(data, args.batch_size, sampler=endless, num_workers=workers, drop_last=True)

def time_usual(script, flags, steps, workers, report):
    """Train in the usual way, in as many parts a step as the script: one more for the Keras port."""
    args, _ = script.parse(flags)
    device, _ = script.pick_device(args)
    loader, keras = usual_data(args, workers), script.SCRIPT == "fashion_keras_port"
    conditional = getattr(args, "conditional", "names" in args)
    if conditional: args.names = loader.dataset.classes
    torch.manual_seed(args.seed)
    g, d = (as_usual(script, net).to(device) for net in script.make_networks(args))
    opt_g = torch.optim.Adam(g.parameters(), args.lr, args.betas, fused=False)
    opt_d = torch.optim.Adam(d.parameters(), args.d_lr, args.betas, fused=False)
    criterion, args.used = nn.BCEWithLogitsLoss(), dict(device=str(device), precision="fp32")
    batches = timed(iter(loader), device, steps, functools.partial(report, args))
    for real, labels in ((x.to(device), labels.to(device)) for x, labels in batches):
        one_hot = [F.one_hot(labels, len(args.names)).float()] if conditional else []

        def judge(x):
            return d(x, *one_hot, logits=True).flatten() if "names" in args else d(x)

        def make():
            return g(torch.cat([*one_hot, torch.randn(len(real), script.Z, device=device)], 1))
        ones, zeros = torch.ones(len(real), device=device), torch.zeros(len(real), device=device)
        d.zero_grad()
        loss_real = criterion(judge(real), ones)
        loss_real.backward()
        if keras:  # a step for the real ones, and one for those of the generator in inference mode
            opt_d.step()
            d.zero_grad()
            g.eval()
        with torch.set_grad_enabled(not keras): fake = make()
        loss_fake = criterion(judge(fake.detach()), zeros)
        loss_fake.backward()
        opt_d.step()
        g.train().zero_grad()
        loss_g = criterion(judge(make() if keras else fake), ones)
        loss_g.backward()
        opt_g.step()
        (loss_real + loss_fake).item(), loss_g.item()

def work(options, flags):
    """Be one side of one round: write its figures into the file --json."""
    script = importlib.import_module(options.script)

    def report(args, steps, seconds, waiting):
        about = {name: args.used[name] for name in ("device", "precision", "gan_ops") if name in args.used}
        about |= dict(width=args.width, batch=args.batch_size, threads=torch.get_num_threads(), steps=steps)
        peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
        rate = steps * args.batch_size / seconds
        save(options.json, dict(images_per_second=rate, waiting=waiting, peak_cuda_mib=peak, about=about))
    if options.side == "usual": time_usual(script, flags, options.steps, options.workers, report)
    else: time_ours(script, flags, options.steps, report)

def main():
    parser = start_parser(__doc__, "dcgan")
    add = parser.add_argument
    add("--data", help="a folder of folders of pictures, mnist, fashion, synthetic: 512 drawn (the script's)")
    add("--root", default="data", help="folder of mnist and fashion (data)")
    add("--steps", type=int, default=0, help="timed steps in a round (4; on CUDA 50)")
    add("--workers", type=int, default=2, help="of the usual way's DataLoader (2)")
    add("--keep-memory", action="store_true", help="ours with freed memory kept, too")
    add("--side", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    flags = FLAGS[options.script] + flags
    flags += ["--root", options.root, *(["--data", options.data] if options.data else [])]
    if options.side: return work(options, flags)
    script = importlib.import_module(options.script)
    args, _ = script.parse(flags)
    with tempfile.TemporaryDirectory() as folder:
        if args.data == "synthetic":
            args.data, args.root = f"{folder}/pictures", folder
            make_pictures(script, args.data, 512)
        flags += ["--data", args.data, "--root", args.root, "--workers", str(options.workers)]
        sides = {"ours": ("ours", flags, {})}
        if script.FUSED and not args.no_fused: sides["without gan_ops"] = "ours", [*flags, "--no-fused"], {}
        if options.keep_memory: sides["memory kept"] = "ours", flags, KEEP
        sides["usual"] = "usual", flags, {}
        show(about := machine())
        rounds = {name: [] for name in sides}
        for number, (name, (side, given, kept)) in itertools.product(range(options.rounds), sides.items()):
            found = measure(options.script, side, given, options.steps, **kept)
            if not number: show({"side": name} | found["about"])
            rounds[name].append(found)
            print(f"round {number + 1}: {name:15} {found['images_per_second']:9.2f} images/s, "
                  f"{found['waiting']:6.2%} of it waiting for data", flush=True)
    rates = {name: [found["images_per_second"] for found in rows] for name, rows in rounds.items()}
    ratios = {f"ours to {name}": compare(rates["ours"], rates[name]) for name in sides if name != "ours"}
    if options.keep_memory: ratios["memory kept to ours"] = compare(rates["memory kept"], rates["ours"])
    for name, ratio in ratios.items(): print("{}: {:.2f} times ({:.2f} to {:.2f})".format(name, *ratio))
    save(options.json, dict(about, script=options.script, rounds=rounds, ratios=ratios))

if __name__ == "__main__":
    main()
