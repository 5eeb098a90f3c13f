"""python benchmarks/diversity.py --checkpoint runs/cspup128/models.pth --data celeba --root data

How varied the pictures of a trained generator are, and how like those of --data, without downloaded weights; of
whichever script the checkpoint is, and of any size:
- the mean RMS distance between pairs of 500 pictures, generated and real;
- how far each is from the nearest other one of them at 16x16 pixels, in the median;
- their Vendi score (Friedman and Dieng 2023) at 16x16 pixels: how many different pictures these 500 amount to;
- the Frechet distance between Gaussians fitted to the pictures averaged down to 16x16 (768 values in [0, 1]);
- the sliced Wasserstein distance between 7x7 patches of each level of the Laplacian pyramid (Karras et al. 2018);
- copies: the share of generated pictures whose nearest real one, by RMS distance of 16x16 pixels, is nearer than half
  of what the nearest other one is from a real picture in the median; and coverage: how many different pictures are
  nearest to a generated one, over the count. If the run flipped pictures, mirrored ones count as the same.
Each distance is of --count generated to as many real pictures; beside it that of other real ones to the same, its
floor, which depends on the count (that paper takes 16,384 pictures): figures compare at one count only. Copies and
coverage look among all pictures of --data, 20,000 of them at most, those held out too; the figures beside them are of
--count real pictures, each among the others.
"""
import argparse, importlib, itertools, json, sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SCRIPTS = "cspup128", "dcgan"
PAIRS, PATCH, PATCHES, DIRECTIONS, REPEATS = 500, 7, 128, 128, 4  # PATCHES a picture
VENDI_WIDTH = 0.1  # of the Gaussian kernel between pictures, as an RMS distance of values in [0, 1]
LEAST, MOST = 1000, 20_000  # pictures for a covariance that says something, and to look for the nearest among


def pooled(images):
    """uint8 N,3,H,W averaged to 16x16, as float64 N,768 in [0, 1]."""
    parts = [F.avg_pool2d(part.float(), part.shape[-1] // 16) for part in images.split(256)]
    return torch.cat(parts).flatten(1).double().div(255)


def spread(images):
    """Mean RMS distance between pairs of pictures, uint8 N,C,H,W, for values in [0, 1]."""
    flat = images.flatten(1).float() / 255
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


def frechet(a, b):
    """The Frechet distance of the Gaussians fitted to the rows of a and b, as FID squares it."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()  # of (cov_a cov_b) ** 0.5
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace


def blur(x):
    """N,C,H,W under the binomial 5x5 filter, mirrored at the edges."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, groups=x.shape[1])


def pyramid_level(x, level):
    """One level of the Laplacian pyramid of N,C,H,W; the last one, of 16x16, is what is left, not a difference."""
    for _ in range(level):
        x = blur(x)[..., ::2, ::2]
    if x.shape[-1] == 16:
        return x
    up = torch.zeros_like(x)
    up[..., ::2, ::2] = blur(x)[..., ::2, ::2]
    return x - 4 * blur(up)


def descriptors(images, level, generator, device):
    """Random 7x7 patches of a pyramid's level, as float N*PATCHES,147, each colour of mean 0 and deviation 1."""
    parts = []
    for part in images.split(256):
        x = pyramid_level(part.to(device).float(), level)
        y, left = torch.randint(x.shape[2] - PATCH + 1, (2, len(x), PATCHES), generator=generator).to(device)
        windows = x.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # N,C,H-6,W-6,7,7
        parts.append(windows[torch.arange(len(x), device=device)[:, None], :, y, left].flatten(0, 1))
    patches = torch.cat(parts)  # N*PATCHES,C,7,7
    deviation, mean = torch.std_mean(patches, (0, 2, 3), correction=0, keepdim=True)
    return ((patches - mean) / deviation).flatten(1)


def projected(rows, directions):
    """Rows N,K along directions K,D, sorted, as D,N: by numpy, which sorts several times as fast as PyTorch on a CPU."""
    return np.sort((rows @ directions).T.contiguous().cpu().numpy(), axis=1)


def sliced_wasserstein(sets, target, generator):
    """The mean distance of each of `sets` to `target` along random directions, times 1000 as Karras et al. have it."""
    total = torch.zeros(len(sets), dtype=torch.float64)
    for _ in range(REPEATS):
        directions = torch.randn(target.shape[1], DIRECTIONS, generator=generator)
        directions = F.normalize(directions, dim=0).to(target.device)
        wanted = projected(target, directions)
        for i, rows in enumerate(sets):
            total[i] += np.abs(projected(rows, directions) - wanted).mean(dtype=np.float64)
    return (1000 * total / REPEATS).tolist()


def vendi(rows):
    """The Vendi score (Friedman and Dieng 2023) of pooled rows N,768: how many different pictures they amount to.

    exp of the entropy of the eigenvalues of a Gaussian kernel between all pairs, over N: from 1, all alike, to N.
    """
    kernel = torch.exp(-torch.cdist(rows, rows).square() / rows.shape[1] / (2 * VENDI_WIDTH**2))  # N,N
    shares = torch.linalg.eigvalsh(kernel / len(rows)).clamp(min=1e-30)
    return torch.exp(-(shares * shares.log()).sum()).item()


def nearest(rows, views, others=False):
    """(RMS distances, numbers) of the pictures nearest to the pooled `rows` in any of `views`, N,768 each.

    others: the rows are the first ones of the views, and each looks among all but itself.
    """
    found = []
    for start in range(0, len(rows), 128):
        part = rows[start : start + 128]
        distances = torch.stack([torch.cdist(part, view) for view in views]).amin(0)  # 128,N
        if others:
            distances[range(len(part)), range(start, start + len(part))] = torch.inf
        found.append(distances.min(1))
    distances, numbers = (torch.cat(values) for values in zip(*found))
    return distances / rows.shape[1] ** 0.5, numbers


def copies(fake, real, flip):
    """[(share of copies, coverage) of generated pictures, the same of as many of the real ones], from pooled rows."""
    views = [real, real.unflatten(1, (-1, 16, 16)).flip(3).flatten(1)] if flip else [real]
    made, others = nearest(fake, views), nearest(real[: len(fake)], views, others=True)
    near = others[0].median() / 2
    return [((distances < near).double().mean().item(), len(numbers.unique()) / len(fake))
            for distances, numbers in (made, others)]


def script_of(path):
    """The module of the script that wrote a checkpoint; of a file that is none, one that will say so."""
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["config"]["script"]
    except Exception:  # a missing, cut or foreign file fails in many ways
        name = SCRIPTS[0]
    return importlib.import_module(name if name in SCRIPTS else SCRIPTS[0])


def load(script, options):
    """(generated, real, other real, pooled rows of these and more, device, whether mirrored ones are the same).

    Pictures are uint8 N,3,H,W; the real ones are drawn by chance from the seed.
    """
    flags = ["--checkpoint", options.checkpoint, "--device", options.device, "--seed", str(options.seed)]
    flags += ["--data", *options.data] if options.data else []  # else the checkpoint's own
    args, saved = script.parse([*flags, "--root", options.root, "--generate", "1"])
    device, pack = script.pick_device(args)[0], script.load_pack(args)
    count = min(options.count, len(pack) // 2)
    if count < 2:
        raise script.UserError(f"{len(pack)} pictures are too few for two sets")
    if count < options.count:
        print(f"{len(pack)} pictures are not enough for two sets of {options.count}: taking {count}")
    order = torch.randperm(len(pack), generator=torch.Generator().manual_seed(options.seed))[: max(2 * count, MOST)]
    parts = (torch.from_numpy(pack[part.numpy()]).permute(0, 3, 1, 2) for part in order.split(count))
    sets = [next(parts), next(parts)]
    rows = torch.cat([pooled(part) for part in itertools.chain(sets, parts)])
    return torch.cat(list(script.sampled(args, saved, count))), *sets, rows, device, bool(args.flip)


def figures(script, options):
    """{name: (of generated pictures, of real ones)} for --checkpoint; prints each as it is known."""
    fake, real, other, rows, device, flip = load(script, options)
    made, count, found = pooled(fake), len(fake), {}

    def say(name, text, ours, theirs):
        found[name] = ours, theirs
        print(f"{text}: generated {ours:.4g}, real {theirs:.4g}", flush=True)

    print(f"{options.checkpoint}: {count} generated pictures against {count} real ones")
    some = len(fake[:PAIRS])
    say("spread", f"mean RMS distance between pairs of {some}", spread(fake[:PAIRS]), spread(real[:PAIRS]))
    ours, theirs = (nearest(x[:some], [x[:some]], others=True)[0].median().item() for x in (made, rows))
    say("apart", f"median RMS distance at 16x16 pixels to the nearest other of {some}", ours, theirs)
    say("vendi", f"Vendi score of {some}", vendi(made[:PAIRS]), vendi(rows[:some]))
    if count < LEAST:
        print(f"the covariance of {made.shape[1]} values from so few pictures ({count}, less than {LEAST}) is rank "
              "deficient, or nearly: Frechet distances of this count compare with each other only")
    say("frechet", "Frechet distance of 16x16 pixels",
        *(frechet(x.numpy(), rows[:count].numpy()) for x in (made, rows[count : 2 * count])))
    generator, levels = torch.Generator().manual_seed(options.seed), []
    for level in range((fake.shape[-1] // 16).bit_length()):
        *sets, target = (descriptors(images, level, generator, device) for images in (fake, other, real))
        levels.append(sliced_wasserstein(sets, target, generator))
        side = fake.shape[-1] >> level
        say(f"swd_{side}", f"sliced Wasserstein distance x 1000 at {side}x{side}", *levels[-1])
    say("swd", "sliced Wasserstein distance x 1000, mean of the levels", *np.mean(levels, axis=0).tolist())
    (share, coverage), (real_share, real_coverage) = copies(made, rows, flip)
    say("copies", f"copies of one of {len(rows)} real pictures", share, real_share)
    say("coverage", "real pictures that are nearest to one of these, over their count", coverage, real_coverage)
    return found


def main():
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--checkpoint", required=True, help="models.pth or checkpoint.pt of a run")
    parser.add_argument("--data", nargs="+", help="as of the script (the set the checkpoint was trained on)")
    parser.add_argument("--root", default="data", help="as of the script (data)")
    parser.add_argument("--count", type=int, default=2000, help="pictures in each set (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="file for the figures, {name: [of generated pictures, of real ones]}")
    options = parser.parse_args()
    script = script_of(options.checkpoint)
    try:
        found = figures(script, options)
    except script.UserError as error:
        parser.error(str(error))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
