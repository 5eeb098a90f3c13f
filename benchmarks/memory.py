"""python benchmarks/memory.py: what a training step of --script keeps for backward, with gan_ops and without.

The tensors that autograd saves between forward and backward, each storage counted once, parameters left out: they are
what a step's memory grows by. On CUDA also the peak of a whole step. Flags not listed below go to the script: --width
(64), --batch-size (here 32; dcgan 64), --recipe (here classic), --precision, ...
"""
import argparse

import torch

from pack import machine, read_flags


def kept(network, x, autocast):
    """MiB that autograd keeps from network(x) until backward."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        output = network(x)
    del output
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def peak(script, nets, args, inputs):
    """MiB of GPU memory at the peak of a step beyond what is held before it."""
    script.train_step(nets, args, inputs)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    script.train_step(nets, args, inputs)
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def measure(script, args, device, precision, fused):
    """The figures of one side, by name."""
    state = script.use_gan_ops(device, fused)
    if fused and state != "serves":
        raise script.UserError(f"gan_ops {state}")
    nets = script.build(args, device, precision)
    z = torch.randn(args.batch_size, script.Z, device=device)
    real = torch.randint(256, (args.batch_size, args.size, args.size, args.channels), dtype=torch.uint8, device=device)
    pictures = script.to_float(real, torch.rand(args.batch_size, 8, device=device), False)
    figures = {"generator": kept(nets.G, z, nets.autocast), "discriminator": kept(nets.D, pictures, nets.autocast)}
    if device.type == "cuda":
        figures["peak of a step"] = peak(script, nets, args, (real, *script.draws(args, 1, device, 0, 1)))
    return figures


def main():
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(**about)
    script, _, others = read_flags(parser)
    try:
        args, _ = script.parse(others)
        args.augment = "none"
        device, precision, _ = script.pick_device(args)
        print(*(f"{name} {value}" for name, value in machine().items()), device, precision, sep="; ")
        with_it, without = (measure(script, args, device, precision, fused) for fused in (True, False))
    except script.UserError as error:
        parser.error(str(error))
    for name, figure in with_it.items():
        print(f"{name}: {figure:.0f} MiB with gan_ops, {without[name]:.0f} without: {figure / without[name]:.2f}")


if __name__ == "__main__":
    main()
