"""A small classifier that judges generated images by class: trained once and kept; for evaluate.py."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

LEAST_IMAGES = 20  # of a folder that is to be a class
LEAST_STEPS = 600  # of training
LEAST_EPOCHS = 4
BATCH_SIZE = 128
SHIFT = 2  # pixels that a batch is moved by at most, each way, in training
LR = 4e-3  # highest learning rate
SHARE = "share of "  # figures of classes are named so
NEIGHBOUR = 3  # to which nearest one the balls of precision and recall reach


def frechet(a, b):
    """Squared Frechet distance of the Gaussians fitted to the rows of a and b, float64 N,K (as in FID)."""
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    squares = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0)  # eigenvalues of cov_a cov_b
    distance = (a.mean(0) - b.mean(0)).square().sum()
    return (distance + cov_a.trace() + cov_b.trace() - 2 * squares.sqrt().sum()).item()


def covered(rows, others):
    """Share of rows N,K in a ball around one of `others` M,K, which reaches to its third nearest other.

    Precision is that of generated images among real ones, recall the reverse (Kynkaanniemi et al. 2019).
    """
    k = min(NEIGHBOUR + 1, len(others))  # each is its own nearest
    radii = torch.cat([torch.cdist(part, others).kthvalue(k).values for part in others.split(1000)])
    inside = [(torch.cdist(part, others) <= radii).any(1) for part in rows.split(1000)]
    return torch.cat(inside).double().mean().item()


def classes_of(names, known):
    """The class of each image: the folder in its name that is a known class, else all its folders."""
    found = []
    for name in names:
        folders = name.split("/")[:-1]
        found.append(next((folder for folder in folders if folder in known), "/".join(folders)))
    return found


def to_float(images, device):
    """uint8 N,C,H,W to [-1, 1] on the device."""
    return images.to(device, memory_format=torch.channels_last).float() / 127.5 - 1


# The network
def make_classifier(channels, classes):
    """Images N,channels,H,W in [-1, 1] to logits N,classes; all but the last layer give 128 features."""
    layers = [nn.AdaptiveAvgPool2d(28)]  # N,C,28,28
    c_in = channels
    for c_out, stride in (16, 2), (32, 1), (64, 2), (128, 2):  # N,16,14,14; N,32,14,14; N,64,7,7; N,128,4,4
        layers.append(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False))
        layers.append(nn.BatchNorm2d(c_out))
        layers.append(nn.ReLU())
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def shifted(x):
    """A batch N,C,H,W moved by up to SHIFT pixels each way, all of it alike, with -1 where it was."""
    right, down = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    x = F.pad(x, (right, 2 * SHIFT - right, down, 2 * SHIFT - down), value=-1.0)
    return x[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT]


def train_classifier(images, labels, classes, device):
    """A classifier of uint8 N,C,H,W by class numbers N, after four epochs, but 600 steps at least."""
    torch.manual_seed(0)
    net = make_classifier(images.shape[1], classes).to(device, memory_format=torch.channels_last)
    batch_size = min(BATCH_SIZE, len(images))
    steps_per_epoch = len(images) // batch_size
    epochs = max(LEAST_EPOCHS, -(-LEAST_STEPS // steps_per_epoch))  # rounded up
    optimiser = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, epochs * steps_per_epoch)
    for _ in tqdm(range(epochs), desc="training the classifier", unit="epoch"):
        for rows in torch.randperm(len(images)).split(batch_size)[:steps_per_epoch]:
            logits = net(shifted(to_float(images[rows], device)))
            loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
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
    """(features float64 N,128, predicted classes N) of images, uint8 N,C,H,W, by a classifier."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier[:-1](to_float(part, device)) for part in images.split(500)])
    return features.double().cpu(), classifier[-1](features).argmax(1).cpu()


# Figures
def accuracies(predicted, labels):
    """(accuracy, that of the class where it is lowest) of class numbers N; labels None: (None, None)."""
    if labels is None:
        return None, None
    right = (predicted == labels).double()
    return right.mean().item(), min(right[labels == number].mean().item() for number in labels.unique())


def figures_by_class(net, fake, labels, known, test, classes):
    """{figure: [of fake images, of real ones]} by a classifier; labels: what `fake` are to show, or None.

    known, which it was trained on, and test: (images uint8 N,C,H,W, class numbers N).
    """
    test_images, test_labels = test
    features, predicted = read(net, fake)
    test_features, test_predicted = read(net, test_images)
    known_features, _ = read(net, known[0])
    accuracy, lowest = accuracies(predicted, labels)
    test_accuracy, test_lowest = accuracies(test_predicted, test_labels)
    some = known_features[:: -(-len(known_features) // len(features))]  # of each class, at most as many
    figures = {
        "classifier": [frechet(features, test_features), frechet(known_features, test_features)],
        "precision": [covered(features, test_features), covered(some, test_features)],
        "recall": [covered(test_features, features), covered(test_features, some)],
        "conditional_accuracy": [accuracy, test_accuracy],
        "lowest_class_accuracy": [lowest, test_lowest],
    }
    for number, name in enumerate(classes):
        share = (predicted == number).double().mean().item()
        figures[SHARE + name] = [share, (test_labels == number).double().mean().item()]
    return figures


def vanished(figures):
    """The classes that have less than a tenth of their share of real images, by figures_by_class."""
    found = []
    for name, pair in figures.items():
        if name.startswith(SHARE) and pair[0] < pair[1] / 10:
            found.append(name.removeprefix(SHARE))
    return found


def hold_out(known):
    """(nine tenths, one tenth) of (images, class numbers), drawn at random, always alike."""
    images, labels = known
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, held_out = order.tensor_split([-(len(order) // 10)])
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


def class_figures(script, args, generator, pack, known, test, classes, count):
    """figures_by_class of `count` images of a run; {} if a class has too few images to train a classifier.

    known and test: (images uint8 N,C,H,W, class numbers N); where test is None a tenth of known is held out.
    A conditional generator gets the classes of the test images, in their proportions.
    """
    images_per_class = known[1].bincount(minlength=len(classes))
    few = [name for name, images in zip(classes, images_per_class) if images < LEAST_IMAGES]
    if len(classes) < 2:
        return {}
    if few:
        print(f"no figures by class: fewer than {LEAST_IMAGES} images of {', '.join(few)}")
        return {}
    suffix = ".classifier-all.pth"
    if test is None:
        suffix = ".classifier.pth"
        known, test = hold_out(known)
    device = next(generator.parameters()).device
    net = load_classifier(Path(pack.filename).with_suffix(suffix), *known, len(classes), device)
    z = script.draw_z(args, count)
    labels = None
    if z.shape[1] > script.Z_DIM:  # one-hot labels come before the noise
        labels = test[1][torch.arange(count) * len(test[1]) // count]
        z[:, : len(classes)] = F.one_hot(labels, len(classes))
    return figures_by_class(net, script.sample(generator, z), labels, known, test, classes)
