"""How good, how varied and how new the pictures of trained generators are, in one table.

    python tools/evaluate.py runs/dcgan                           # a run folder, models.pth or checkpoint.pt
    python tools/evaluate.py runs/forest runs/mountain --json figures.json
    python tools/evaluate.py weights/cgan_residual.pth --root data --inception

Of --count generated pictures, in brackets of as many real ones; distances are to other real ones and depend
on the count. "Small" is 16x16 pixels by averaging, 14x14 where pictures are 28x28.
- swd: sliced Wasserstein distance x 1000 of 7x7 patches of each level of the Laplacian pyramid, from full
  size to small, and the mean of the levels (Karras et al. 2018, who take 16,384 pictures).
- frechet: of the Gaussians fitted to small pictures of values in [0, 1], as FID squares it.
- vendi: how many different pictures 500 small ones amount to (Friedman and Dieng 2023).
- apart: RMS distance from a small picture to the nearest other one of 500, in the median.
- spread: mean RMS distance between pairs of 500 pictures.
- copies: share whose nearest of 20,000 real pictures, small, is nearer than half of what a real one has in
  the median; coverage: how many are nearest to one, over the count. With flips, mirrored ones are the same.
- d_seen: mean D(x) of pictures trained on, in brackets of others: the test pictures of mnist and fashion, or
  those of --against. A discriminator that tells the two apart has memorised.
Where pictures lie in folders by class, a small classifier, trained once on nine tenths of them (on all, where
there are such others) and kept beside the decoded pictures, reads --read generated ones:
- classifier: Frechet distance of its features to those of test pictures, in brackets of pictures it knows.
- as_asked: share read as the class asked for, in brackets of test pictures read as what they are;
  lowest_class: the same of the class where it is least.
- share of each class; one below a tenth of that in brackets has vanished.
"""
import argparse, inspect, json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from classifier import classes_of, frechet, read_classes, to_float, vanished
from common import fail, guarded, load

SOME, MOST = 500, 20_000  # pictures for vendi and others; to look for the nearest among
PATCH, PATCHES, DIRECTIONS, REPEATS = 7, 128, 128, 4  # PATCHES a picture
VENDI_WIDTH = 0.1  # of the Gaussian kernel between pictures, as an RMS distance of values in [0, 1]

# Pictures against pictures
def small(images):
    """uint8 N,C,H,W averaged to 16x16, those of 28x28 to 14x14, as float64 N,C,16,16 in [0, 1]."""
    factor = images.shape[-1] // (14 if images.shape[-1] == 28 else 16)
    return torch.cat([F.avg_pool2d(part.float(), factor) for part in images.split(256)]).double() / 255

def vendi(rows):
    """exp of the entropy of the eigenvalues of a Gaussian kernel between rows N,K, over N: from 1 to N."""
    kernel = torch.exp(-torch.cdist(rows, rows).square() / rows.shape[1] / (2 * VENDI_WIDTH**2))  # N,N
    shares = torch.linalg.eigvalsh(kernel / len(rows)).clamp(min=1e-30)
    return torch.exp(-(shares * shares.log()).sum()).item()

def nearest(rows, views, others=False):
    """(RMS distances, numbers) of the pictures nearest to `rows` in any of `views`, all of N,K.

    others: the rows are the first ones of the views, and each looks among all but itself.
    """
    found = []
    for part, numbers in zip(rows.split(128), torch.arange(len(rows)).split(128)):
        distances = torch.stack([torch.cdist(part, view) for view in views]).amin(0)  # 128,N
        if others: distances[range(len(part)), numbers] = torch.inf
        found.append(distances.min(1))
    distances, numbers = (torch.cat(values) for values in zip(*found))
    return distances / rows.shape[1] ** 0.5, numbers

def variety(images):
    """{figure: value} of 500 pictures by themselves, uint8 N,C,H,W."""
    rows, flat = small(images[:SOME]).flatten(1), images[:SOME].flatten(1).float() / 255
    apart, pairs = nearest(rows, [rows], others=True)[0].median(), torch.pdist(flat).mean()
    return dict(vendi=vendi(rows), apart=apart.item(), spread=pairs.item() / flat.shape[1] ** 0.5)

def copies(fake, real, flip):
    """{figure: [of `fake`, of as many `real`]}: copies and coverage, of small pictures N,C,h,w."""
    views = [view.flatten(1) for view in ([real, real.flip(3)] if flip else [real])]
    found = nearest(fake.flatten(1), views), nearest(views[0][: len(fake)], views, others=True)
    near = found[1][0].median() / 2
    return dict(copies=[(distances < near).double().mean().item() for distances, _ in found],
                coverage=[len(numbers.unique()) / len(fake) for _, numbers in found])

def blur(x):
    """N,C,H,W under the binomial 5x5 filter, mirrored at the edges."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, groups=x.shape[1])

def pyramid_level(x, level):
    """One level of the Laplacian pyramid of N,C,H,W; the last, of 16x16 or 14x14, is what is left over."""
    for _ in range(level): x = blur(x)[..., ::2, ::2]
    if x.shape[-1] in (14, 16): return x
    up = torch.zeros_like(x)
    up[..., ::2, ::2] = blur(x)[..., ::2, ::2]
    return x - 4 * blur(up)

def descriptors(images, level, generator, device):
    """Random 7x7 patches of a pyramid's level, float N*PATCHES,C*49, each colour of mean 0, deviation 1."""
    parts = []
    for part in images.split(256):
        x = pyramid_level(part.to(device).float(), level)
        y, left = torch.randint(x.shape[2] - PATCH + 1, (2, len(x), PATCHES), generator=generator).to(device)
        windows = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # N,C,H-6,W-6,7,7
        parts.append(windows[torch.arange(len(x), device=device)[:, None], :, y, left].flatten(0, 1))
    patches = torch.cat(parts)  # N*PATCHES,C,7,7
    deviation, mean = torch.std_mean(patches, (0, 2, 3), correction=0, keepdim=True)
    return ((patches - mean) / deviation.clamp(min=1e-8)).flatten(1)

def sliced_wasserstein(sets, target, seed=0, device="cpu"):
    """{swd and the side of a level, or swd: [distance of each of `sets` to `target`]}, all uint8 N,C,H,W."""
    generator, found, side = torch.Generator().manual_seed(seed), {}, target.shape[-1]
    for level in range((side // 14).bit_length()):
        rows, total = [descriptors(images, level, generator, device) for images in (*sets, target)], 0
        for _ in range(REPEATS):
            directions = F.normalize(torch.randn(rows[0].shape[1], DIRECTIONS, generator=generator), dim=0)
            lines = [(row @ directions.to(device)).T.contiguous().cpu().numpy() for row in rows]
            for line in lines: line.sort()  # by numpy, several times as fast as PyTorch on a CPU
            total += np.array([np.abs(line - lines[-1]).mean(dtype=np.float64) for line in lines[:-1]])
        found[f"swd {side >> level}"] = (1000 * total / REPEATS).tolist()
    return found | dict(swd=np.mean(list(found.values()), axis=0).tolist())

# What the discriminator remembers, what a classifier reads, what Inception sees
@torch.no_grad()
def remembered(script, args, saved, seen, others):
    """[mean D(x) of pictures trained on, of others], each (uint8 N,C,H,W, one-hot labels N,K or None).

    Of as many of each, in batches as in training, from which batch norm takes its statistics.
    """
    device, D = script.pick_device(args)[0], script.make_networks(args)[1]
    D.load_state_dict(saved["Discriminator"])
    for module in D.to(device).modules(): module.train(not isinstance(module, nn.modules.dropout._DropoutNd))
    logits = dict(logits=True) if "logits" in inspect.signature(D.forward).parameters else {}
    count, found = min(len(seen[0]), len(others[0])), []
    for images, labels in (seen, others):
        chosen, verdicts = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed)), []
        for part in chosen[:count].chunk(max(1, count // args.batch_size)):
            told = [] if labels is None else [labels[part].to(device)]
            verdicts.append(D(to_float(images[part], device), *told, **logits))
        found.append(torch.cat(verdicts).sigmoid().mean().item())
    return found

def inception_metrics(count):
    """torchmetrics' FID, KID and Inception score for `count` pictures of each kind."""
    try:
        from torchmetrics.image import FrechetInceptionDistance, InceptionScore, KernelInceptionDistance
        kid = KernelInceptionDistance(subset_size=min(count, 1000))
        return dict(fid=FrechetInceptionDistance(), kid=kid, inception=InceptionScore())
    except (ImportError, OSError) as error:  # the package, or the network that its weights come by
        fail(f"--inception: {error}; pip install torchmetrics[image], and once a network for its weights")

def inception(fake, real, device):
    """{fid, kid, inception: [of generated pictures, None]} of uint8 N,C,H,W."""
    metrics = {name: metric.to(device) for name, metric in inception_metrics(len(real)).items()}
    for parts in zip(real.split(64), fake.split(64)):
        for images, is_real in zip(parts, (True, False)):
            images = images.expand(-1, 3, -1, -1).to(device)
            for name in ("fid", "kid"): metrics[name].update(images, real=is_real)
        metrics["inception"].update(images)
    values = {name: metric.compute() for name, metric in metrics.items()}  # some with a deviation
    return {name: [float(value if name == "fid" else value[0]), None] for name, value in values.items()}

# The figures of a run
def test_pictures(script, args, against):
    """(uint8 N,C,H,W, their names) of the folder `against`, else of the set's own test pictures, or none."""
    kinds = dict(mnist=torchvision.datasets.MNIST, fashion=torchvision.datasets.FashionMNIST)
    if against:
        pack, names = script.load_pack(argparse.Namespace(**vars(args) | dict(data=against, classes=[])))
    elif args.data in kinds:
        found = kinds[args.data](args.root, train=False, download=True)
        folders = [name.split(" - ")[0].replace("/", " or ") for name in found.classes]  # as the scripts do
        kept = [(x, f"{folders[k]}/") for x, k in found if folders[k] in (args.classes or folders)]
        pack = np.stack([script.square(image, args.size, args.channels) for image, _ in kept])
        names = [name for _, name in kept]
    else:
        return torch.empty(0), []
    return torch.from_numpy(pack).permute(0, 3, 1, 2), names

def figures(run, options):
    """{figure: [of generated pictures, of real ones]} of a run folder or checkpoint, where there are any."""
    changed = dict(data=options.data, classes=options.data and [], root=options.root, device=options.device)
    script, args, saved, generator = load(run, seed=options.seed, **changed)
    device, (pack, names) = next(generator.parameters()).device, script.load_pack(args)
    images, count = torch.from_numpy(pack).permute(0, 3, 1, 2), min(options.count, len(pack) // 2)
    if count < 2: fail(f"{len(pack)} pictures of --data {args.data} are too few for two sets")
    if count < options.count: print(f"{run}: {len(pack)} pictures are two sets of no more than {count}")
    order = torch.randperm(len(pack), generator=torch.Generator().manual_seed(options.seed))
    real, other = images[order[: 2 * count]].split(count)
    fake = script.sample(generator, script.draw_z(args, count))
    found = sliced_wasserstein([fake, other], real, options.seed, device)
    rows = torch.cat([small(images[part]) for part in order[: max(2 * count, MOST)].split(1000)])
    made, sets = small(fake), rows.flatten(1).split(count)
    found["frechet"] = [frechet(made.flatten(1), sets[0]), frechet(sets[1], sets[0])]
    alone = variety(fake), variety(real)
    found |= {name: [x[name] for x in alone] for name in alone[0]} | copies(made, rows, args.flip)
    if options.inception: found |= inception(fake, real, device)

    told, (test, test_names) = getattr(args, "names", None), test_pictures(script, args, options.against)
    folders = classes_of(names, told or args.classes)
    classes = told or sorted(set(folders))
    test_folders = classes_of(test_names, classes)
    if told and (foreign := {*folders, *test_folders} - {*told}):
        fail(f"{run}: pictures are of {sorted(foreign)}, the model's classes are {told}")
    known = images, torch.tensor([classes.index(folder) for folder in folders])
    if {*test_folders} - {*classes}: test_folders = []  # they are of no use to a classifier
    test = test, torch.tensor([classes.index(folder) for folder in test_folders])
    if test_names and "Discriminator" in saved:
        pairs = [(x, F.one_hot(labels, len(told)).float() if told else None) for x, labels in (known, test)]
        found["d_seen"] = remembered(script, args, saved, *pairs)
    test = test if test_folders else None
    return found | read_classes(script, args, generator, pack, known, test, classes, options.read)

def table(found):
    """The figures of runs, {run: figures}, as text: a row for each figure, a column for each run."""
    def cell(pair):
        return "{} ({})".format(*("-" if value is None else f"{value:.4g}" for value in pair)) if pair else ""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    columns = [["", *names]]
    for run, values in found.items():
        columns.append([run, *(cell(values.get(name)) for name in names)])
    columns = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))

def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, models.pth or checkpoint.pt of any script")
    add("--data", help="real pictures, as the script takes them (those of the run)")
    add("--root", help="folder of the named sets and of decoded pictures (that of the run)")
    add("--against", help="folder or .zip of pictures that the run was not trained on")
    add("--count", type=int, default=2000, help="pictures in each set (2000)")
    add("--read", type=int, default=10_000, help="pictures for the classifier (10000)")
    add("--inception", action="store_true", help="FID, KID and Inception score, by torchmetrics")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--json", type=Path, help="file for {run: {figure: [of generated pictures, of real ones]}}")
    options = parser.parse_args(argv)
    if options.inception: inception_metrics(options.count)  # to say at once what is missing
    found = {run: guarded(figures, run, options) for run in options.runs}
    print(table(found))
    for run, values in found.items():
        if gone := vanished(values): print(f"warning: {run}: classes that have vanished: {', '.join(gone)}")
    if options.json: guarded(options.json.write_text, json.dumps(found, indent=1))

if __name__ == "__main__":
    main()
