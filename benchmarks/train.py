"""python benchmarks/train.py: images/second of training, our way against the usual way; --script dcgan: of that one.

Both, and ours without gan_ops where that is installed, train the same networks on the same pictures, in one process
and in turn, a round of one after a round of the other. Ours is what the script does: its pack, its precision,
channels_last, fused Adam, gan_ops where installed, a CUDA graph on CUDA, and its averaged generator (and flips, where
it has them) besides. The usual way is that of PyTorch's DCGAN example: a DataLoader over JPEG files (of MNIST for
cgan_residual, as torchvision has it), eager fp32 with torch's own settings, contiguous, plain Adam, .item() of both
losses at each step. Flags not listed below go to the script: --width (its default), --batch-size (here 32; dcgan and
cgan_residual 64), --recipe (here classic), --device, --precision, ...
"""
import argparse, functools, itertools, json, statistics, tempfile, time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pack import machine, picture_folder, read_flags


def as_example(size):
    """The DCGAN example's way from a PIL picture to a tensor."""
    return transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(),
                               transforms.Normalize([0.5], [0.5])])


class Pictures(Dataset):
    """Picture files, opened, cropped and normalised as the DCGAN example does it."""
    def __init__(self, files, size, channels):
        self.files, self.mode, self.transform = files, "RGB" if channels == 3 else "L", as_example(size)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert(self.mode))


def make_ours(script, args, device, precision, rank=0, world=1):
    """(a function that opens a source of batches, one that trains on one and returns its losses, the generator)."""
    pack, numbers = script.load_pack(args), itertools.count(1)
    kept, _ = script.hold_out(args, len(pack))
    if len(kept) < args.batch_size * world:
        raise script.UserError(f"a batch of {args.batch_size * world} is more than the {len(kept)} pictures")
    args.augment = "none" if args.augment == "auto" else args.augment  # the usual way has none
    labels = script.settle(args, pack, 1)
    nets = script.build(args, device, precision)
    run_step = functools.partial(script.train_step, nets, args)
    run_step = script.captured(run_step, device.type == "cuda" and precision != "fp16")
    source = script.batches(pack, kept, args, device, rank, world, 0, labels)

    def step(batch):
        run_step((*batch, *script.draws(args, next(numbers), device, rank, world)), True)
        return nets.last[:2]
    return lambda: source, step, nets.ema


class Contiguous(nn.Module):
    """x, contiguous."""
    def forward(self, x):
        return x.contiguous()


def as_usual(script, network):
    """The same network as the DCGAN example would write it: torch's batch norm, activations in place, contiguous."""
    if hasattr(network, "project"):  # gives its feature map channels_last, where a view would be the usual way
        network.layers.insert(0, Contiguous())
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is script.BatchNormLeakyReLU:
                norm = nn.BatchNorm2d(child.num_features)
                norm.load_state_dict(child.state_dict())
                activation = nn.LeakyReLU(child.slope, inplace=True) if child.slope else nn.ReLU(inplace=True)
                setattr(module, name, nn.Sequential(norm, activation))
            elif isinstance(child, nn.LeakyReLU):
                child.inplace = True
    return network


def make_usual(script, args, device, workers):
    """The same three of the usual way; its worker processes live for one round, so they never slow ours down."""
    torch.manual_seed(args.seed)  # and so the weights that ours begins with
    g, d = (as_usual(script, net).to(device) for net in script.make_networks(args))
    adam = functools.partial(torch.optim.Adam, betas=(args.beta1, 0.999), fused=False)
    opt_g, opt_d, criterion = adam(g.parameters(), args.lr), adam(d.parameters(), args.d_lr), nn.BCEWithLogitsLoss()
    if args.data[0] in script.DIGITS:
        data = script.DIGITS[args.data[0]](args.root, transform=as_example(args.size))
    else:
        data = Pictures([Path(args.data[0], name) for name in script.list_pictures(args)[1]], args.size, args.channels)
    endless = (i for _ in itertools.count() for i in torch.randperm(len(data)).tolist())  # no pause between two epochs
    loader = DataLoader(data, args.batch_size, sampler=endless, num_workers=workers, drop_last=True)

    def step(batch):
        real, *labels = (part.to(device) for part in (batch if isinstance(batch, list) else [batch]))
        z = torch.randn(len(real), script.Z, device=device)
        judge = d
        if labels:  # a conditional model
            one_hot = nn.functional.one_hot(labels[0], len(args.names)).float()
            z, judge = torch.cat([one_hot, z], 1), lambda x: d(x, one_hot, logits=True).flatten()
        ones, zeros = torch.ones(len(real), device=device), torch.zeros(len(real), device=device)
        d.zero_grad()
        loss_real = criterion(judge(real), ones)
        loss_real.backward()
        fake = g(z)
        loss_fake = criterion(judge(fake.detach()), zeros)
        loss_fake.backward()
        opt_d.step()
        g.zero_grad()
        loss_g = criterion(judge(fake), ones)
        loss_g.backward()
        opt_g.step()
        return (loss_real + loss_fake).item(), loss_g.item()
    return lambda: iter(loader), step, g


def lengths(device, steps=None):
    """(steps that warm up, timed steps in a round, unless `steps` says); ours captures its graph at the 4th call."""
    return (10, steps or 50) if device.type == "cuda" else (1, steps or 4)


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


def compare(script, args, options):
    """Run the rounds and print them; returns all figures as a dict."""
    device, precision, _ = script.pick_device(args)
    cuda, fused = device.type == "cuda", script.use_gan_ops(device, not args.no_fused)
    warm, steps = lengths(device, options.steps)
    about = dict(machine(), script=script.SCRIPT, threads=torch.get_num_threads(), device=str(device),
                 precision=precision, gan_ops=fused, width=args.width, batch=args.batch_size, steps=steps, warm=warm,
                 workers=options.workers)
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
    names = ["ours", *["without gan_ops"] * (fused == "serves"), "usual"]
    sides, rates, waits, peaks = {}, {name: [] for name in names}, {name: [] for name in names}, {}
    for number, name in itertools.product(range(options.rounds), rates):
        script.use_gan_ops(device, name == "ours" and not args.no_fused)
        held = torch.cuda.memory_allocated() if cuda else 0
        torch.cuda.reset_peak_memory_stats() if cuda else None
        if number == 0 and name == "usual":
            sides[name] = make_usual(script, args, device, options.workers)
        elif number == 0:
            sides[name] = make_ours(script, args, device, precision)
        start, step, _ = sides[name]
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
    add("--data", help="a folder of pictures; synthetic: 512 drawn ones; mnist or fashion (the script's own)")
    add("--root", default="data", help="folder of mnist and fashion (data)")
    add("--steps", type=int, help="timed steps in a round (4; on CUDA 50)")
    add("--rounds", type=int, default=3)
    add("--workers", type=int, default=2, help="of the usual way's DataLoader (2)")
    add("--json", type=Path, help="write the results there")
    script, options, others = read_flags(parser, classes=True)
    with tempfile.TemporaryDirectory() as folder:
        data = picture_folder(script, options.data or script.DATA, folder)
        root = options.root if data in script.DIGITS else folder
        try:
            args, _ = script.parse([*others, "--data", data, "--root", root])
            result = compare(script, args, options)
        except script.UserError as error:
            parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
