"""python benchmarks/cgan.py: cgan_residual.py against the plain conditional GAN, after the same time of training.

The plain one is the best-known such script in its published form: fully connected, an embedding of the label beside
noise and picture, batch norm whose eps is 0.8, least-squares loss, Adam at 2e-4 with betas (0.5, 0.999), 64 a batch, a
DataLoader in the main process over torchvision's set; at its option of 28x28 pixels (32 is its default), so that its
pictures need no resizing. Both train in turn, a slice of one after a slice of the other; only the time of steps and of
waiting for data counts. After each slice 10,000 pictures of each, with the labels of the test set, are read by the
classifier of cgan_residual.py's report. The plain generator is judged in training mode, as its script samples, and in
evaluation mode; the better of the two counts. Flags not listed below go to cgan_residual.py: --root, --data, --width,
--batch-size, --seed, ...
"""
import argparse, json, time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from pack import machine  # first, as it makes the scripts known
from train import as_example, make_ours
import cgan_residual as script


class PlainGenerator(nn.Module):
    """Noise (N,100) and labels (N) to pictures (N,1,28,28)."""
    def __init__(self, classes):
        super().__init__()
        self.embed, layers = nn.Embedding(classes, classes), []
        for i, (c_in, c_out) in enumerate(((100 + classes, 128), (128, 256), (256, 512), (512, 1024))):
            layers.append(nn.Linear(c_in, c_out))
            layers += [nn.BatchNorm1d(c_out, eps=0.8)] if i else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh())

    def forward(self, z, labels):
        return self.layers(torch.cat([self.embed(labels), z], 1)).view(-1, 1, 28, 28)


class PlainDiscriminator(nn.Module):
    """Pictures (N,1,28,28) and labels (N) to validity (N,1), 1 for real."""
    def __init__(self, classes):
        super().__init__()
        self.embed, layers = nn.Embedding(classes, classes), []
        for c_in in (784 + classes, 512, 512):
            layers.append(nn.Linear(c_in, 512))
            layers += [nn.Dropout(0.4)] if c_in == 512 else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, nn.Linear(512, 1))

    def forward(self, x, labels):
        return self.layers(torch.cat([x.flatten(1), self.embed(labels)], 1))


def make_plain(args, device):
    """(a function that opens a source of batches, one that trains on a batch, pictures from labels by mode)."""
    torch.manual_seed(args.seed)
    classes = len(args.names)
    g, d, mse = PlainGenerator(classes).to(device), PlainDiscriminator(classes).to(device), nn.MSELoss()
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (g, d))
    data = script.DIGITS[args.data[0]](args.root, transform=as_example(28))

    def batches():
        while True:
            yield from DataLoader(data, 64, shuffle=True)

    def step(batch):
        real, labels = (part.to(device) for part in batch)
        ones, zeros = torch.ones(len(real), 1, device=device), torch.zeros(len(real), 1, device=device)
        opt_g.zero_grad()
        asked = torch.randint(classes, (len(real),), device=device)
        fake = g(torch.randn(len(real), 100, device=device), asked)
        loss_g = mse(d(fake, asked), ones)
        loss_g.backward()
        opt_g.step()
        opt_d.zero_grad()
        loss_d = (mse(d(real, labels), ones) + mse(d(fake.detach(), asked), zeros)) / 2
        loss_d.backward()
        opt_d.step()
        return loss_d.item(), loss_g.item()

    def pictures(labels, training):
        g.train(training)
        numbers, made = torch.Generator().manual_seed(args.seed), torch.empty(len(labels), 1, 28, 28, dtype=torch.uint8)
        with torch.no_grad():  # classes mixed in each batch, as in training: batch norm would take one alone away
            for part in torch.randperm(len(labels), generator=numbers).split(64):
                z = torch.randn(len(part), 100, generator=numbers).to(device)
                made[part] = g(z, labels[part].to(device)).mul(127.5).add(128).clamp(0, 255).byte().cpu()
        g.train()
        return made
    return batches, step, pictures


def pictures_of(generator, args, labels, device):
    """What our averaged generator makes of labels, int64 N: uint8 N,1,28,28."""
    numbers, made = torch.Generator().manual_seed(args.seed), []
    for part in torch.nn.functional.one_hot(labels, len(args.names)).float().split(64):
        z = torch.randn(len(part), script.Z, generator=numbers)
        made.append(script.sample(generator, torch.cat([part, z], 1).to(device)))
    return torch.cat(made)


def train_for(source, step, seconds, device):
    """Train for so many seconds; returns (steps, seconds they took)."""
    wait_for_device, began, steps = getattr(torch, device.type).synchronize, time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step(next(source))
        steps += 1
    wait_for_device()
    return steps, time.perf_counter() - began


def judge(evaluator, labels, made):
    """The figures of pictures made for labels, by name."""
    classifier, _, features, *_ = evaluator
    of_made, classes = script.read(classifier, made)
    right = (classes == labels).double()
    lowest = min(right[labels == i].mean().item() for i in labels.unique())
    return dict(read_as_asked=right.mean().item(), lowest_class=lowest, frechet=script.frechet(of_made, features))


def compare(args, options):
    """Train both in turn, print the figures after each slice; returns (all figures as a dict, pictures by side)."""
    device, precision, _ = script.pick_device(args)
    fused = script.use_gan_ops(device, not args.no_fused)
    open_ours, step_ours, generator = make_ours(script, args, device, precision)
    open_plain, step_plain, plain_pictures = make_plain(args, device)
    evaluator = script.load_evaluator(args, device)
    labels = evaluator[3][torch.arange(10_000) * len(evaluator[3]) // 10_000]
    about = dict(machine(), threads=torch.get_num_threads(), device=str(device), precision=precision, gan_ops=fused,
                 data=args.data[0], width=args.width, batch=args.batch_size, seed=args.seed,
                 classifier_accuracy=evaluator[1], frechet_floor=evaluator[4])
    print(*(f"{name} {value}" for name, value in about.items()), sep="; ", flush=True)
    sides = {"ours": (open_ours(), step_ours), "plain": (open_plain(), step_plain)}
    spent, steps, rows, made = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0), [], {}
    while spent["plain"] < options.seconds - 1e-3:
        for name, (source, step) in sides.items():
            if name == "plain":
                script.use_gan_ops(device, False)
            done, seconds = train_for(source, step, min(options.slice, options.seconds - spent[name]), device)
            script.use_gan_ops(device, not args.no_fused)
            spent[name], steps[name] = spent[name] + seconds, steps[name] + done
            if name == "ours":
                made[name] = pictures_of(generator, args, labels, device)
                figures = judge(evaluator, labels, made[name])
            else:
                both = {mode: plain_pictures(labels, mode == "training") for mode in ("training", "evaluation")}
                judged = {mode: judge(evaluator, labels, pictures) for mode, pictures in both.items()}
                better = min(judged, key=lambda mode: judged[mode]["frechet"])
                made[name], figures = both[better], dict(judged[better], mode=better)
            rows.append(dict(side=name, seconds=round(spent[name], 1), steps=steps[name], **figures))
            print("{side:6} {seconds:6.0f} s {steps:6} steps: {read_as_asked:.2%} read as asked, lowest class "
                  "{lowest_class:.2%}, Frechet distance {frechet:.4f}".format(**rows[-1]), flush=True)
    ratio = rows[-1]["frechet"] / rows[-2]["frechet"]
    print(f"Frechet distance of the plain one over ours: {ratio:.2f}; floor {evaluator[4]:.4f}")
    first = [i for row in range(len(args.names)) for i in (labels == row).nonzero()[:10, 0].tolist()]
    return dict(about, rows=rows, ratio=ratio), {name: pictures[first] for name, pictures in made.items()}


def draw(path, made, seconds):
    """Both sides' pictures, a row for each class."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axes, (name, pictures) in zip(figure.subplots(1, 2), made.items()):
        axes.set(title=f"{name}, after {seconds:.0f} s", xticks=[], yticks=[])
        axes.imshow(script.to_grid(pictures))
    figure.savefig(path)


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    add = parser.add_argument
    add("--seconds", type=float, default=600.0, help="of training for each side (600)")
    add("--slice", type=float, default=60.0, help="seconds of training before the other side's turn (60)")
    add("--picture", type=Path, help="write both sides' pictures there")
    add("--json", type=Path, help="write the results there")
    options, others = parser.parse_known_args()
    try:
        args, _ = script.parse(others)
        if len(args.data) != 1 or args.data[0] not in script.DIGITS:
            raise script.UserError(f"the plain one trains on {' or '.join(script.DIGITS)} alone")
        result, made = compare(args, options)
    except script.UserError as error:
        parser.error(str(error))
    if options.picture:
        draw(options.picture, made, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
