"""python benchmarks/train.py: images/second of training, cspup128's way against the usual way.

Both, and ours without gan_ops where that is installed, train the same networks on the same pictures, in one process
and in turn, a round of one after a round of the other. Ours is what cspup128.py does: its pack, its precision, channels_last, fused Adam, gan_ops where installed,
a CUDA graph on CUDA, and its flips and averaged generator besides. The usual way is that of PyTorch's DCGAN example:
a DataLoader over JPEG files, eager fp32 with torch's own settings, contiguous, plain Adam, .item() of both losses at
each step. Flags not listed below go to cspup128: --width (64), --batch-size (32 here), --device, --precision, ...
"""
import argparse, functools, itertools, json, statistics, tempfile, time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from pack import cspup128, machine, make_faces


class Pictures(Dataset):
    """Picture files, opened, cropped and normalised as the DCGAN example does it."""
    transform = transforms.Compose([
        transforms.Resize(cspup128.SIZE), transforms.CenterCrop(cspup128.SIZE), transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def make_ours(args, device, precision):
    """(a function that opens a source of batches, a function that trains on one)."""
    run_step = functools.partial(cspup128.train_step, cspup128.build(args, device, precision), args)
    run_step = cspup128.captured(run_step, device.type == "cuda" and precision != "fp16")
    source, numbers = cspup128.batches(cspup128.load_pack(args), args, device, 0, 1, 0), itertools.count(1)

    def step(real):
        run_step((real, *cspup128.draws(args, next(numbers), device, 0, 1)), True)
    return lambda: source, step


def make_usual(args, device, workers):
    """The same two for the usual way; its worker processes live for one round, so they never slow ours down."""
    torch.manual_seed(args.seed)
    g, d = (net.to(device) for net in cspup128.make_networks(args))
    adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.999), fused=False)
    opt_g, opt_d, criterion = adam(g.parameters(), args.lr), adam(d.parameters(), args.d_lr), nn.BCEWithLogitsLoss()
    data = Pictures([Path(args.data, name) for name in cspup128.list_pictures(args)[1]])
    endless = RandomSampler(data, replacement=True, num_samples=1 << 40)  # no pause between two epochs
    loader = DataLoader(data, args.batch_size, sampler=endless, num_workers=workers, drop_last=True)

    def step(real):
        real = real.to(device)
        ones, zeros = torch.ones(len(real), device=device), torch.zeros(len(real), device=device)
        d.zero_grad()
        loss_real = criterion(d(real), ones)
        loss_real.backward()
        fake = g(torch.randn(len(real), cspup128.Z, device=device))
        loss_fake = criterion(d(fake.detach()), zeros)
        loss_fake.backward()
        opt_d.step()
        g.zero_grad()
        loss_g = criterion(d(fake), ones)
        loss_g.backward()
        opt_g.step()
        return (loss_real + loss_fake).item(), loss_g.item()
    return lambda: iter(loader), step


def measure(source, step, warm, steps, device):
    """Seconds that `steps` steps take after `warm` ones, and the seconds of these spent on waiting for batches."""
    wait_for_device, waited = getattr(torch, device.type).synchronize, 0.0
    for number in range(warm + steps):
        if number == warm:
            wait_for_device()
            began, waited = time.perf_counter(), 0.0
        asked, batch = time.perf_counter(), next(source)
        waited += time.perf_counter() - asked
        step(batch)
    wait_for_device()
    return time.perf_counter() - began, waited


def compare(args, options):
    """Run the rounds and print them; returns all figures as a dict."""
    device, precision, _ = cspup128.pick_device(args)
    cuda, fused = device.type == "cuda", cspup128.use_gan_ops(device, not args.no_fused)
    warm, steps = 10 if cuda else 1, options.steps or (50 if cuda else 4)  # ours captures its graph at the 4th call
    about = dict(machine(), threads=torch.get_num_threads(), device=str(device), precision=precision, gan_ops=fused,
                 width=args.width, batch=args.batch_size, steps=steps, warm=warm, workers=options.workers)
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
    names = ["ours", *["without gan_ops"] * (fused == "serves"), "usual"]
    sides, rates, waits, peaks = {}, {name: [] for name in names}, {name: [] for name in names}, {}
    for number, name in itertools.product(range(options.rounds), rates):
        cspup128.use_gan_ops(device, name == "ours" and not args.no_fused)
        held = torch.cuda.memory_allocated() if cuda else 0
        torch.cuda.reset_peak_memory_stats() if cuda else None
        if number == 0 and name == "usual":
            sides[name] = make_usual(args, device, options.workers)
        elif number == 0:
            sides[name] = make_ours(args, device, precision)
        start, step = sides[name]
        seconds, waited = measure(start(), step, warm, steps, device)
        if cuda and number == 0:  # later rounds replay a graph, which the counter does not see
            peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
        rates[name].append(steps * args.batch_size / seconds)
        waits[name].append(waited / seconds)
        print(f"round {number + 1}: {name:15} {rates[name][-1]:9.2f} images/s, "
              f"{waits[name][-1]:6.2%} of it waiting for data", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name in sides:
        memory = f", peak CUDA memory {peaks[name]:.0f} MiB" if peaks else ""
        print(f"median: {name:15} {medians[name]:9.2f} images/s{memory}")
    ratios = {name: medians["ours"] / medians[name] for name in names[1:]}
    for name, ratio in ratios.items():
        single = [f"{a / b:.2f}" for a, b in zip(rates["ours"], rates[name])]
        print(f"ours to {name}: ratio of the medians {ratio:.2f}; of the single rounds:", *single)
    return dict(about, images_per_second=rates, waiting=waits, peak_cuda_mib=peaks, median=medians, ratios=ratios)


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    add = parser.add_argument
    add("--data", default="synthetic", help="a folder of pictures, or synthetic: 512 drawn faces (synthetic)")
    add("--steps", type=int, help="timed steps in a round (4; on CUDA 50)")
    add("--rounds", type=int, default=3)
    add("--workers", type=int, default=2, help="of the usual way's DataLoader (2)")
    add("--json", type=Path, help="write the results there")
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data == "synthetic":
            options.data = f"{folder}/faces"
            make_faces(Path(options.data), 512)
        try:
            args, _ = cspup128.parse(["--batch-size", "32", *others, "--data", options.data, "--root", folder])
            args.augment = "off" if args.augment == "auto" else args.augment
            result = compare(args, options)
        except cspup128.UserError as error:
            parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
