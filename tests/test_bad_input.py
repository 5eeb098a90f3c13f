"""What the user can mend ends with status 2 and one line that begins with "error: ", and breaks nothing."""
import math
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import cspup128

SCRIPT = Path(__file__).parents[1] / "cspup128.py"
TINY = "--width", "4", "--batch-size", "4", "--precision", "fp32", "--device", "cpu"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


def pictures(folder, count=8):
    """A folder of small pictures."""
    folder.mkdir(parents=True)
    for i in range(count):
        cspup128.draw_picture(i).resize((32, 32)).save(folder / f"{i}.png")
    return folder


def error_line(text):
    """The one error line that ends what was written to stderr, where progress bars may stand before it."""
    lines = re.split(r"[\r\n]+", text.strip())
    assert "Traceback" not in text
    assert [line for line in lines if "error: " in line] == lines[-1:], text
    assert lines[-1].startswith("error: ") and len(lines[-1]) > 20, text
    return lines[-1]


def fails(capsys, *argv):
    """The error line of a command line, which has to end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cspup128.main(list(map(str, argv)))
    assert stop.value.code == 2
    return error_line(capsys.readouterr().err)


def run(*argv):
    """Run the command line in this process."""
    cspup128.main(list(map(str, argv)))


def run_limited(limit, *argv):
    """Run the script in a process that can write no file of more than `limit` bytes, as if the disk were full."""
    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict, timeout=300, check=False)


def all_finite(path):
    """Whether a checkpoint can be loaded and holds only finite weights."""
    saved = cspup128.load_weights(path)
    return all(value.isfinite().all() for name in ("G", "D", "ema") for value in saved[name].values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures."""
    return pictures(tmp_path_factory.mktemp("bad") / "set")


@pytest.fixture(scope="module")
def trained(folder):
    """A run folder after two steps."""
    out = folder.parent / "run"
    run("--data", folder, "--root", folder.parent / "root", "--out", out, "--steps", 2, *TINY)
    return out


@pytest.fixture
def data(folder, tmp_path):
    """The flags of a quick run in tmp_path."""
    return "--data", folder, "--root", tmp_path / "root", "--out", tmp_path / "run", *TINY


@pytest.fixture(autouse=True)
def handlers():
    """Give the signals back whatever a run leaves behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# Data

def no_folder(path):
    """Nothing at all."""


def empty_folder(path):
    """A folder without pictures."""
    path.mkdir()
    (path / "notes.txt").write_text("nothing to see\n")


def broken_folder(path):
    """A folder in which every picture is broken."""
    path.mkdir()
    for name in "a.jpg", "b.png":
        (path / name).write_text("no picture\n")


def no_zip(path):
    """A text file with the name of a .zip."""
    path.write_text("no zip\n")


def cut_zip(path):
    """The first two thirds of a .zip."""
    pictures(path.with_name("whole"))
    whole = Path(shutil.make_archive(str(path.with_name("whole")), "zip", path.with_name("whole")))
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])


def empty_zip(path):
    """A .zip without pictures."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing to see\n")


DATA = [(no_folder, "no-such", "there is no"), (empty_folder, "empty", "holds no pictures"),
        (broken_folder, "broken", "none of the 2 pictures can be read"), (no_zip, "text.zip", "no zip file"),
        (cut_zip, "cut.zip", "cut short"), (empty_zip, "empty.zip", "holds no pictures")]


@pytest.mark.parametrize("make, name, words", DATA, ids=[make.__name__ for make, _, _ in DATA])
def test_data_that_cannot_be_used(make, name, words, tmp_path, capsys):
    make(tmp_path / name)
    line = fails(capsys, "--data", tmp_path / name, "--root", tmp_path / "root", "--out", tmp_path / "run", *TINY)
    assert words in line
    assert not (tmp_path / "run").exists()


def test_celeba_without_network(tmp_path, capsys, monkeypatch):
    def no_download(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("torchvision.datasets.CelebA", no_download)
    line = fails(capsys, "--data", "celeba", "--root", tmp_path, "--out", tmp_path / "run", *TINY)
    assert "no network" in line and "img_align_celeba.zip" in line


def test_classes_that_are_not_there(tmp_path, capsys):
    pictures(tmp_path / "set" / "cats"), pictures(tmp_path / "set" / "dogs")
    line = fails(capsys, "--data", tmp_path / "set", "--root", tmp_path, "--classes", "cats", "cows", *TINY)
    assert "cows" in line and "dogs" in line


def test_batch_larger_than_the_set(data, capsys):
    line = fails(capsys, *data, "--batch-size", 9)
    assert "9" in line and "8 pictures" in line and "--batch-size" in line


# Flags

@pytest.mark.parametrize("flags", [
    "--steps 0", "--steps -1", "--steps many", "--epochs 0", "--batch-size 0", "--batch-size -4", "--width 0",
    "--lr nan", "--lr inf", "--lr -1", "--lr fast", "--seed -1", "--loss mse", "--d-convs 6", "--device tpu",
    "--gamma -1", "--gamma nan", "--up cubic", "--beta2 2", "--generate 0", "--no-such-flag", "stray", "--classes", "--scheme"])
def test_flag_that_cannot_be(flags, data, tmp_path, capsys):
    line = fails(capsys, *data, *flags.split())
    assert flags.split()[0] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("use", [("--generate", "4"), ("--metrics",), ("--export", "g.onnx")], ids=lambda use: use[0])
def test_use_without_checkpoint(use, capsys):
    line = fails(capsys, *use)
    assert use[0] in line and "--checkpoint" in line


@pytest.mark.parametrize("seed", [20240101123456, 2**63, 10**30])
def test_seed_of_any_size_trains_or_says_why_not(seed, data, tmp_path, capsys):
    try:
        run(*data, "--seed", seed, "--steps", 1)
    except SystemExit as stop:
        assert stop.code == 2 and "--seed" in error_line(capsys.readouterr().err)
    else:
        assert all_finite(tmp_path / "run" / "checkpoint.pt")


# Checkpoints

class Code:
    """An object whose pickle makes a file when it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def changed(trained, path, **config):
    """A copy of models.pth with other values in its config."""
    saved = torch.load(trained / "models.pth", weights_only=True)
    saved["config"].update(config)
    torch.save(saved, path)


def cut(trained, path):
    """The first half of models.pth."""
    whole = (trained / "models.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


CHECKPOINTS = {
    "missing": (lambda trained, path: None, "no checkpoint"),
    "cut short": (cut, "no checkpoint"),
    "empty": (lambda trained, path: path.write_bytes(b""), "no checkpoint"),
    "text": (lambda trained, path: path.write_text("not a checkpoint\n"), "no checkpoint"),
    "a folder": (lambda trained, path: path.mkdir(), "no checkpoint"),
    "of another script": (lambda trained, path: changed(trained, path, script="dcgan"), "dcgan"),
    "only a tensor": (lambda trained, path: torch.save(torch.ones(3), path), "no checkpoint"),
    "of something else": (lambda trained, path: torch.save({"model": {}}, path), "no checkpoint"),
}


@pytest.mark.parametrize("use", [("--generate", "4"), ("--metrics",)], ids=lambda use: use[0])
@pytest.mark.parametrize("make, words", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoint_that_cannot_be_read(make, words, use, trained, tmp_path, capsys):
    make(trained, tmp_path / "c.pt")
    places = "--save", tmp_path / "g.npz", "--out", tmp_path / "run"
    line = fails(capsys, *use, "--checkpoint", tmp_path / "c.pt", *places)
    assert words in line and str(tmp_path / "c.pt") in line
    assert [path.name for path in tmp_path.iterdir() if path.name != "c.pt"] == []


@pytest.mark.parametrize("make, words", list(CHECKPOINTS.values())[1:], ids=list(CHECKPOINTS)[1:])
def test_resume_from_a_checkpoint_that_cannot_be_read(make, words, trained, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    make(trained, out / "checkpoint.pt")
    line = fails(capsys, "--resume", "--out", out, "--steps", 4)
    assert words in line and str(out / "checkpoint.pt") in line
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("save", [torch.save, lambda code, path: path.write_bytes(pickle.dumps(code))],
                         ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_does_not_run(save, tmp_path, capsys):
    path, made = tmp_path / "c.pt", tmp_path / "made"
    save({"config": {"script": "cspup128"}, "Generator": Code(made)} if save is torch.save else Code(made), path)
    fails(capsys, "--generate", 4, "--checkpoint", path, "--save", tmp_path / "g.npz")
    assert not made.exists()
    pickle.loads(pickle.dumps(Code(made))).close()
    assert made.exists()  # loaded the careless way, it does run


@pytest.mark.parametrize("flag, value, kept", [("width", 8, 4), ("d-convs", 3, 5), ("loss", "hinge", "relativistic"),
                                               ("lr", 0.1, 0.0004)])
def test_flag_other_than_the_checkpoints(flag, value, kept, trained, tmp_path, capsys):
    use = "--generate", 4, "--checkpoint", trained / "models.pth", "--save", tmp_path / "g.npz"
    line = fails(capsys, *use, f"--{flag}", value)
    assert f"{flag} {kept}" in line and f"{value}" in line
    assert not (tmp_path / "g.npz").exists()


@pytest.mark.parametrize("flag, value", [("--loss", "hinge"), ("--gamma", "1"), ("--up", "bilinear")])
def test_what_the_slides_leave_no_choice_of(flag, value, data, tmp_path, capsys):
    line = fails(capsys, *data, "--scheme", "exact", flag, value)
    assert "--scheme exact" in line and flag in line
    assert not (tmp_path / "run").exists()


def test_resume_with_another_width(trained, capsys):
    before = (trained / "checkpoint.pt").read_bytes()
    assert "width" in fails(capsys, "--resume", "--out", trained, "--width", 8)
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_training_on_from_models_pth_which_has_no_optimisers(trained, data, capsys):
    line = fails(capsys, *data, "--steps", 4, "--checkpoint", trained / "models.pth")
    assert "--checkpoint" in line and "--resume" in line


def test_resume_without_its_metrics(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").unlink()
    assert "metrics.csv" in fails(capsys, "--resume", "--out", tmp_path / "run", "--steps", 3)


# Devices

def test_cuda_that_is_not_there(data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails(capsys, *data, "--device", "cuda")
    assert "cuda" in line and "--device cpu" in line


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that this torch has no kernels for."""
    ones = torch.ones

    def no_kernel(*size, **options):
        if torch.device(options.get("device") or "cpu").type == "cuda":
            raise RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be reported later.")
        return ones(*size, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", no_kernel)


def test_gpu_without_kernels_when_asked_for(old_gpu, data, capsys):
    line = fails(capsys, *data, "--device", "cuda")
    assert "no kernel" in line and "--device cpu" in line


def test_gpu_without_kernels_falls_back_to_the_cpu(old_gpu):
    args, _ = cspup128.parse(["--device", "auto"])
    device, precision, why = cspup128.pick_device(args)
    assert device.type == "cpu" and precision in ("fp32", "bf16")
    assert "no kernel" in why and len(why.splitlines()) == 1


def test_gpu_whose_memory_is_too_small(data, capsys, monkeypatch):
    def too_much(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr(cspup128, "train_step", too_much)
    assert "--batch-size" in fails(capsys, *data, "--steps", 1)


# Places that cannot be written

@pytest.mark.parametrize("flag, name", [("--out", "run"), ("--root", "root")])
def test_folder_that_cannot_be_made(flag, name, data, tmp_path, capsys):
    (tmp_path / "file").write_text("a file\n")
    line = fails(capsys, *data, "--steps", 1, flag, tmp_path / "file" / name)
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize("name", ["file/g.npz", "file/g.png", "file/g"])
def test_generated_pictures_that_cannot_be_saved(name, trained, tmp_path, capsys):
    (tmp_path / "file").write_text("a file\n")
    line = fails(capsys, "--generate", 2, "--checkpoint", trained / "models.pth", "--save", tmp_path / name)
    assert str(tmp_path / "file") in line


def test_disk_full_as_the_checkpoint_is_written(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = (out / "checkpoint.pt").read_bytes()
    result = run_limited(len(before) // 2, "--resume", "--out", out, "--steps", 4)
    assert (out / "samples" / "epoch_0002.png").exists()  # it came as far as the checkpoint
    assert (out / "checkpoint.pt").read_bytes() == before
    assert result.returncode == 2
    error_line(result.stderr)
    assert list(out.rglob(".part-*")) == []
    run("--resume", "--out", out, "--steps", 4)
    assert cspup128.load_weights(out / "checkpoint.pt")["step"] == 4


def test_disk_full_as_pictures_are_packed(folder, tmp_path):
    root = tmp_path / "root"
    result = run_limited(100_000, "--data", folder, "--root", root, "--out", tmp_path / "run", "--steps", 1, *TINY)
    assert result.returncode == 2
    error_line(result.stderr)
    assert list((root / ".packed").iterdir()) == []


# A loss that is not finite

def spoil(monkeypatch, which):
    """Have the discriminator's loss (0) or the generator's (1) be not a number."""
    losses = list(cspup128.LOSSES["relativistic"])
    losses[which] = lambda real, fake: fake.mean() * math.nan
    monkeypatch.setitem(cspup128.LOSSES, "relativistic", tuple(losses))


@pytest.mark.parametrize("which", [0, 1])
def test_loss_that_is_not_finite_stops_the_run(which, data, tmp_path, capsys, monkeypatch):
    run(*data, "--steps", 1)
    out = tmp_path / "run"
    before = (out / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        spoil(patch, which)
        line = fails(capsys, "--resume", "--out", out, "--steps", 30)
    assert "step 10 " in line and "not finite" in line and "checkpoint.pt" in line
    assert (out / "checkpoint.pt").read_bytes() == before and all_finite(out / "checkpoint.pt")
    run("--resume", "--out", out, "--steps", 2)
    assert cspup128.load_weights(out / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("save_every", [5, 0])
def test_checkpoint_stays_finite_when_the_learning_rate_is_far_too_high(save_every, data, tmp_path, capsys):
    line = fails(capsys, *data, "--lr", "1e12", "--steps", 30, "--save-every", save_every)
    assert "not finite" in line and "--lr" in line
    assert all_finite(tmp_path / "run" / "checkpoint.pt")


def test_ctrl_c_works_again_after_a_run_that_failed(data, capsys, monkeypatch):
    spoil(monkeypatch, 0)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fails(capsys, *data, "--steps", 1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
