"""How good, how varied and how new the images of trained generators are, in one table.

    python tools/evaluate.py runs/dcgan                           # a run folder, models.pth or checkpoint.pt
    python tools/evaluate.py runs/dcgan runs/mygan --script mygan.py --json figures.json
    python tools/evaluate.py weights/cgan_residual.pth --root data --inception

Of --count generated images, in brackets of as many real ones; distances are to other real ones and depend
on the count. "Small" is 16x16 pixels by averaging, 14x14 where images are 28x28.
- swd: sliced Wasserstein distance x 1000 of 7x7 patches of each level of the Laplacian pyramid, from full
  size to small, and the mean of the levels (Karras et al. 2018, who take 16,384 images).
- frechet: of the Gaussians fitted to small images of values in [0, 1], squared, as FID is.
- vendi: how many different images 500 small ones amount to (Friedman and Dieng 2023).
- nearest_distance: RMS distance from a small image to the nearest other one of 500, in the median.
- pair_distance: mean RMS distance between pairs of 500 images.
- copies: share whose nearest of 20,000 real images, small, is nearer than half of what a real one has in
  the median to another one, not to the same saved twice; coverage: how many are nearest to one, over the
  count. With flips, mirrored ones are the same.
- d_seen: mean D(x) of images trained on, in brackets of others: the test images of mnist and fashion, or
  those of --against. A discriminator that gives them different values has memorised.
Where images lie in folders by class, a small classifier, trained once on nine tenths of them (on all, where
there are such others) and kept beside the decoded images, judges --read generated ones:
- classifier: Frechet distance of its features to those of test images, in brackets of images it knows.
- precision: share of images whose features are among those of test images; recall: share of test images
  whose features are among theirs (Kynkaanniemi et al. 2019, with 3 neighbours; they take VGG-16's features).
- conditional_accuracy: share that it gives the class asked for, in brackets of test images that it gives
  theirs; lowest_class_accuracy: the same of the class where it is lowest.
- share of each class; one below a tenth of that in brackets has vanished.
"""

import argparse
import functools
import inspect
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from classifier import class_figures, classes_of, frechet, to_float, vanished
from common import add_script_flag, count, fail, load, load_images, mendable_errors, seed

SOME = 500  # images for vendi and the distances
MOST_REAL = 20_000  # images among which the nearest is looked for
PATCH = 7  # side of the patches of swd
PATCHES = 128  # of an image, at random
DIRECTIONS = 128  # that patches are projected on, at random
REPEATS = 4  # with other directions
SAME = 0.01  # RMS distance of values in [0, 1] below which two small images are the same, saved again
VENDI_WIDTH = 0.1  # of the Gaussian kernel between images, as an RMS distance of values in [0, 1]


# Distances between images
def small(images):
    """uint8 N,C,H,W averaged to 16x16, those of 28x28 to 14x14, as float64 N,C,16,16 in [0, 1]."""
    side = images.shape[-1]
    factor = side // (14 if side == 28 else 16)
    return torch.cat([F.avg_pool2d(part.float(), factor) for part in images.split(256)]).double() / 255


def vendi(rows):
    """exp of the entropy of the eigenvalues of a Gaussian kernel between rows N,K, over N: from 1 to N."""
    squares = torch.cdist(rows, rows).square() / rows.shape[1]  # N,N
    kernel = torch.exp(-squares / (2 * VENDI_WIDTH**2))
    shares = torch.linalg.eigvalsh(kernel / len(rows)).clamp(min=1e-30)
    return torch.exp(-(shares * shares.log()).sum()).item()


def nearest(rows, views, least=0.0):
    """(RMS distances, numbers) of the images nearest to `rows`, in any of `views`, all of N,K.

    Those nearer than `least` do not count.
    """
    distances = []
    numbers = []
    for part in rows.split(128):
        table = torch.stack([torch.cdist(part, view) for view in views]).amin(0)  # 128,N
        table[table < least * rows.shape[1] ** 0.5] = torch.inf
        part_distances, part_numbers = table.min(1)
        distances.append(part_distances)
        numbers.append(part_numbers)
    return torch.cat(distances) / rows.shape[1] ** 0.5, torch.cat(numbers)


def variety(images):
    """{figure: value} of 500 images by themselves, uint8 N,C,H,W."""
    rows = small(images[:SOME]).flatten(1)
    full_rows = images[:SOME].flatten(1).float() / 255
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1) / rows.shape[1] ** 0.5
    return {
        "vendi": vendi(rows),
        "nearest_distance": distances.median().item(),
        "pair_distance": torch.pdist(full_rows).mean().item() / full_rows.shape[1] ** 0.5,
    }


def copies(fake, real, flip):
    """{figure: [of `fake`, of as many `real`]}: copies and coverage, of small images N,C,h,w."""
    views = [real.flatten(1)]
    if flip:
        views.append(real.flip(3).flatten(1))
    of_fake, fake_numbers = nearest(fake.flatten(1), views)
    of_real, real_numbers = nearest(views[0][: len(fake)], views, least=SAME)
    near = of_real.median() / 2
    return {
        "copies": [(distances < near).double().mean().item() for distances in (of_fake, of_real)],
        "coverage": [len(numbers.unique()) / len(fake) for numbers in (fake_numbers, real_numbers)],
    }


# Sliced Wasserstein distance
def blur(x):
    """N,C,H,W under the binomial 5x5 filter, mirrored at the edges."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, groups=x.shape[1])


def pyramid_level(x, level):
    """One level of the Laplacian pyramid of N,C,H,W; the last, of 16x16 or 14x14, is what is left over."""
    for _ in range(level):
        x = blur(x)[..., ::2, ::2]
    if x.shape[-1] in (14, 16):
        return x
    coarse = torch.zeros_like(x)
    coarse[..., ::2, ::2] = blur(x)[..., ::2, ::2]
    return x - 4 * blur(coarse)


def descriptors(images, level, generator, device):
    """Random 7x7 patches of a pyramid's level, float N*PATCHES,C*49, each colour of mean 0, deviation 1."""
    parts = []
    for part in images.split(256):
        x = pyramid_level(part.to(device).float(), level)
        corners = torch.randint(x.shape[2] - PATCH + 1, (2, len(x), PATCHES), generator=generator)
        top, left = corners.to(device)  # N,PATCHES each
        windows = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # N,C,H-6,W-6,7,7
        image = torch.arange(len(x), device=device)[:, None]  # N,1
        parts.append(windows[image, :, top, left].flatten(0, 1))
    patches = torch.cat(parts)  # N*PATCHES,C,7,7
    deviation, mean = torch.std_mean(patches, (0, 2, 3), correction=0, keepdim=True)
    return ((patches - mean) / deviation.clamp(min=1e-8)).flatten(1)


def projected(rows, directions):
    """Rows N,K on each direction of K,D, sorted, as numpy D,N."""
    lines = (rows @ directions).T.contiguous().cpu().numpy()
    lines.sort()  # several times as fast as PyTorch's on a CPU
    return lines


def sliced_wasserstein(sets, target, seed=0, device="cpu"):
    """{swd and the side of a level, or swd: [distance of each of `sets` to `target`]}, all uint8 N,C,H,W."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    side = target.shape[-1]
    for level in range((side // 14).bit_length()):
        rows = [descriptors(images, level, generator, device) for images in (*sets, target)]
        total = 0
        for _ in range(REPEATS):
            directions = torch.randn(rows[0].shape[1], DIRECTIONS, generator=generator)
            directions = F.normalize(directions, dim=0).to(device)
            *lines, target_lines = [projected(part, directions) for part in rows]
            total += np.array([np.abs(line - target_lines).mean(dtype=np.float64) for line in lines])
        found[f"swd {side >> level}"] = (1000 * total / REPEATS).tolist()
    found["swd"] = np.mean(list(found.values()), axis=0).tolist()
    return found


# What the discriminator remembers, what Inception sees
@torch.no_grad()
def seen_and_unseen(script, args, saved, seen, unseen):
    """[mean D(x) of images trained on, of others], each (uint8 N,C,H,W, one-hot labels N,K or None).

    Of as many of each, in batches as in training, from which batch norm takes its statistics.
    """
    device, _ = script.pick_device(args)
    _, D = script.make_networks(args)
    D.load_state_dict(saved["Discriminator"])
    for module in D.to(device).modules():
        module.train(not isinstance(module, nn.modules.dropout._DropoutNd))
    options = {"logits": True} if "logits" in inspect.signature(D.forward).parameters else {}
    size = min(len(seen[0]), len(unseen[0]))
    means = []
    for images, labels in seen, unseen:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        logits = []
        for rows in order[:size].chunk(max(1, size // args.batch_size)):
            inputs = [to_float(images[rows], device)]
            if labels is not None:
                inputs.append(labels[rows].to(device))
            logits.append(D(*inputs, **options))
        means.append(torch.cat(logits).sigmoid().mean().item())
    return means


def inception_metrics(size):
    """torchmetrics' FID, KID and Inception score, for so many images of each kind."""
    try:
        from torchmetrics.image import FrechetInceptionDistance, InceptionScore, KernelInceptionDistance

        kid = KernelInceptionDistance(subset_size=min(size, 1000))
        return {"fid": FrechetInceptionDistance(), "kid": kid, "inception": InceptionScore()}
    except (ImportError, OSError) as error:  # the package, or the network that its weights come by
        fail(f"--inception: {error}; pip install torchmetrics[image], and once a network for its weights")


def inception(fake, real, device):
    """{fid, kid, inception: [of fake images, None]} of uint8 N,C,H,W."""
    metrics = {name: metric.to(device) for name, metric in inception_metrics(len(real)).items()}
    for real_part, fake_part in zip(real.split(64), fake.split(64)):
        real_part = real_part.expand(-1, 3, -1, -1).to(device)
        fake_part = fake_part.expand(-1, 3, -1, -1).to(device)
        for name in "fid", "kid":
            metrics[name].update(real_part, real=True)
            metrics[name].update(fake_part, real=False)
        metrics["inception"].update(fake_part)
    fid = metrics["fid"].compute()
    kid, _ = metrics["kid"].compute()  # and its deviation
    score, _ = metrics["inception"].compute()
    return {"fid": [float(fid), None], "kid": [float(kid), None], "inception": [float(score), None]}


# The figures of a run
def unseen_images(script, args, against):
    """(uint8 N,C,H,W, their names) of the folder `against`, else of the set's own test images, or none."""
    kinds = {"mnist": torchvision.datasets.MNIST, "fashion": torchvision.datasets.FashionMNIST}
    if against:
        args = argparse.Namespace(**{**vars(args), "data": against, "classes": []})
        pack, names = script.load_pack(args)
    elif args.data in kinds:
        dataset = script.download(functools.partial(kinds[args.data], train=False), args.root)
        folders = script.classes_of_set(args.data)
        kept = [(image, folders[label]) for image, label in dataset]
        if args.classes:
            kept = [pair for pair in kept if pair[1] in args.classes]
        pack = np.stack([script.square(image, args.size, args.channels) for image, _ in kept])
        names = [f"{folder}/" for _, folder in kept]
    else:
        return torch.empty(0), []
    return torch.from_numpy(pack).permute(0, 3, 1, 2), names


def numbered_classes(run, args, names, unseen_names):
    """(classes, class numbers of images by their names, of unseen images).

    The latter are None where there are no such images, or some are of other classes.
    """
    model_classes = getattr(args, "class_names", None)
    folders = classes_of(names, model_classes or args.classes)
    classes = model_classes or sorted(set(folders))
    unseen_folders = classes_of(unseen_names, classes)
    others = {*folders, *unseen_folders} - {*classes}
    if others and model_classes:
        fail(f"{run}: images are of {sorted(others)}, the model's classes are {model_classes}")
    numbers = torch.tensor([classes.index(folder) for folder in folders])
    if others or not unseen_folders:
        return classes, numbers, None
    return classes, numbers, torch.tensor([classes.index(folder) for folder in unseen_folders])


def image_figures(fake, images, order, args, device):
    """{figure: [of fake images, of as many real ones]}, both uint8 N,C,H,W, the latter in that order."""
    real, other = images[order[: 2 * len(fake)]].split(len(fake))
    found = sliced_wasserstein([fake, other], real, args.seed, device)
    rows = order[: max(2 * len(fake), MOST_REAL)]
    small_real = torch.cat([small(images[part]) for part in rows.split(1000)])
    small_fake = small(fake)
    first, second, *_ = small_real.flatten(1).split(len(fake))
    found["frechet"] = [frechet(small_fake.flatten(1), first), frechet(second, first)]
    of_fake = variety(fake)
    of_real = variety(real)
    found |= {name: [of_fake[name], of_real[name]] for name in of_fake}
    return found | copies(small_fake, small_real, args.flip)


def figures(run, options):
    """{figure: [of fake images, of real ones]} of a run folder or checkpoint, where there are any."""
    changes = {
        "data": options.data,
        "classes": [] if options.data else None,
        "image_set": "" if options.data else None,
        "root": options.root,
        "seed": options.seed,
        "device": options.device,
    }
    script, args, saved, generator = load(run, options.script, **changes)
    device = next(generator.parameters()).device
    pack, names = load_images(script, args)
    size = min(options.count, len(pack) // 2)
    if size < 2:
        fail(f"{len(pack)} images of --data {args.data} are too few for two sets")
    if size < options.count:
        print(f"{run}: {len(pack)} images are two sets of no more than {size}")
    images = torch.from_numpy(pack).permute(0, 3, 1, 2)
    order = torch.randperm(len(pack), generator=torch.Generator().manual_seed(options.seed))
    fake = script.sample(generator, script.draw_z(args, size))
    found = image_figures(fake, images, order, args, device)
    if options.inception:
        found |= inception(fake, images[order[:size]], device)

    unseen, unseen_names = unseen_images(script, args, options.against)
    classes, numbers, unseen_numbers = numbered_classes(run, args, names, unseen_names)
    if unseen_names and "Discriminator" in saved:
        labels = [None, None]
        if getattr(args, "class_names", None):
            labels = [F.one_hot(x, len(classes)).float() for x in (numbers, unseen_numbers)]
        found["d_seen"] = seen_and_unseen(script, args, saved, *zip((images, unseen), labels))
    known = images, numbers
    test = None if unseen_numbers is None else (unseen, unseen_numbers)
    return found | class_figures(script, args, generator, pack, known, test, classes, options.read)


# The command line
def cell(pair):
    """A figure as text: that of fake images and, in brackets, that of real ones."""
    if pair is None:
        return ""
    fake, real = ["-" if value is None else f"{value:.4g}" for value in pair]
    return f"{fake} ({real})"


def table(found):
    """The figures of runs, {run: figures}, as text: a row for each figure, a column for each run."""
    names = dict.fromkeys(name for values in found.values() for name in values)  # each once, in order
    columns = [["", *names]]
    for run, values in found.items():
        columns.append([run, *[cell(values.get(name)) for name in names]])
    padded = []
    for column in columns:
        padded.append([text.ljust(max(map(len, column))) for text in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded))


@mendable_errors()
def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, models.pth or checkpoint.pt of any script")
    add_script_flag(parser)
    add("--data", help="real images, as the script takes them (those of the run)")
    add("--root", help="folder of the named sets and of decoded images (that of the run)")
    add("--against", help="folder or .zip of images that the run was not trained on")
    add("--count", type=count, default=2000, help="images in each set (2000)")
    add("--read", type=count, default=10_000, help="images for the classifier (10000)")
    add("--inception", action="store_true", help="FID, KID and Inception score, by torchmetrics")
    add("--seed", type=seed, default=0, help="of the noise, and of what else is drawn by chance (0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--json", type=Path, help="file for {run: {figure: [of fake images, of real ones]}}")
    options = parser.parse_args(argv)
    if min(options.count, options.read) < 2:
        fail("one image is too few for --count and --read")
    if options.inception:
        inception_metrics(options.count)  # to say at once what is missing
    found = {run: figures(run, options) for run in options.runs}
    print(table(found))
    for run, values in found.items():
        missing = vanished(values)
        if missing:
            print(f"warning: {run}: classes that have vanished: {', '.join(missing)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
