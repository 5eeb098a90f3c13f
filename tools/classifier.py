"""What a small classifier reads in pictures: trained once, kept beside the decoded ones; for evaluate.py."""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

LEAST, STEPS = 20, 600  # pictures of a folder that is to be a class; of training, at least

def frechet(a, b):
    """The Frechet distance of the Gaussians fitted to the rows of a and b, float64 N,K, as FID squares it."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # of (cov_a cov_b) ** 0.5
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace).item()

def classes_of(names, known):
    """The class of each picture: the folder in its name that is a known class, or else all its folders."""
    paths = [name.split("/")[:-1] for name in names]
    return [next((folder for folder in path if folder in known), "/".join(path)) for path in paths]

def to_float(images, device):
    """uint8 N,C,H,W to [-1, 1] on the device."""
    return images.to(device, memory_format=torch.channels_last).float() / 127.5 - 1

def make_classifier(channels, classes):
    """Pictures N,channels,H,W in [-1, 1] to logits N,classes; all but the last layer give 128 features."""
    layers, sizes = [nn.AdaptiveAvgPool2d(28)], [channels, 16, 32, 64, 128]
    for c_in, c_out, stride in zip(sizes, sizes[1:], (2, 1, 2, 2)):
        layers += nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))

def train_classifier(images, labels, classes, device):
    """A classifier of uint8 N,C,H,W: four times through them, but 600 steps of 128 at least.

    Each batch is shifted by up to two pixels each way, so that it reads more than it saw.
    """
    torch.manual_seed(0)
    net = make_classifier(images.shape[1], classes).to(device, memory_format=torch.channels_last)
    batch = min(128, len(images))
    steps = len(images) // batch  # of an epoch
    epochs = max(4, -(-STEPS // steps))
    optimiser = torch.optim.Adam(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, epochs * steps)
    for _ in tqdm(range(epochs), desc="training the classifier", unit="epoch"):
        for which in torch.randperm(len(images)).split(batch)[:steps]:
            right, down = torch.randint(5, (2,)).tolist()
            x = F.pad(to_float(images[which], device), (right, 4 - right, down, 4 - down), value=-1.0)
            loss = F.cross_entropy(net(x[:, :, 2:-2, 2:-2]), labels[which].to(device), label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return net.eval()

def load_classifier(path, images, labels, classes, device):
    """The classifier kept in `path`, or one that is trained and put there."""
    net = make_classifier(images.shape[1], classes).to(device).eval()
    try:
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except Exception:  # it is not there yet, is cut short, or another
        net = train_classifier(images, labels, classes, device)
        torch.save(net.state_dict(), path)
    return net

@torch.no_grad()
def read(classifier, images):
    """(features float64 N,128, classes read N) of pictures, uint8 N,C,H,W."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier[:-1](to_float(part, device)) for part in images.split(500)])
    return features.double().cpu(), classifier[-1](features).argmax(1).cpu()

def right_shares(found, truth):
    """(share of classes `found` that are the true ones, the same of the class where it is least), or Nones."""
    if truth is None: return None, None
    right = (found == truth).double()
    return right.mean().item(), min(right[truth == i].mean().item() for i in truth.unique())

def by_class(net, made, asked, known, test, classes):
    """{figure: [of pictures `made`, of real ones]} as a classifier reads them; asked: what was wanted.

    known, which it has learnt from, and test: (pictures uint8 N,C,H,W, numbers of their classes N).
    """
    (features, found), (real, right) = read(net, made), read(net, test[0])
    as_asked, lowest = zip(right_shares(found, asked), right_shares(right, test[1]))
    figures = dict(classifier=[frechet(features, real), frechet(read(net, known[0])[0], real)],
                   as_asked=[*as_asked], lowest_class=[*lowest])
    for i, name in enumerate(classes):
        figures[f"share of {name}"] = [(part == i).double().mean().item() for part in (found, test[1])]
    return figures

def vanished(figures):
    """The classes that have less than a tenth of their share of real pictures, by the figures of by_class."""
    shares = {name[9:]: pair for name, pair in figures.items() if name.startswith("share of ")}
    return [name for name, (share, real) in shares.items() if share < real / 10]

def read_classes(script, args, generator, pack, known, test, classes, count):
    """by_class of `count` pictures of a run, if each class has enough of `known` to learn from, or else {}.

    Of `known` a tenth is held out to test on, if `test` is None. A model that knows classes is asked for as
    many of each as are among the test pictures.
    """
    if len(classes) < 2 or known[1].bincount(minlength=len(classes)).min() < LEAST: return {}
    path = Path(pack.filename).with_suffix(f".classifier{'' if test is None else '-all'}.pth")
    if test is None:
        order = torch.randperm(len(known[1]), generator=torch.Generator().manual_seed(0))
        known, test = ([x[part] for x in known] for part in order.tensor_split([-(len(order) // 10)]))
    net = load_classifier(path, *known, len(classes), next(generator.parameters()).device)
    z, asked = script.draw_z(args, count), test[1][torch.arange(count) * len(test[1]) // count]
    told = z.shape[1] > script.Z  # which class to make
    if told: z[:, : len(classes)] = F.one_hot(asked, len(classes))
    return by_class(net, script.sample(generator, z), asked if told else None, known, test, classes)
