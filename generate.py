"""Draw images from a trained energy: short-run SGLD is the generator x = M(z, xi) of noise z (course task 3.5).

    python generate.py --ckpt best.pt                              64 samples, of classes as frequent as in the data
    python generate.py --ckpt best.pt --classes a b c              eight of p(x|y) for each class
    python generate.py --ckpt best.pt --mode chain --classes a b   what the chain does on its way from noise, with energies

Each mode writes one picture, MODE.png, and the images in it as MODE.npy, float32 (N, C, H, W) in [-1, 1], into --out.
"""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import atomic_write, save_grid
from model import CommandLine, fail, folder, load_model, mistakes_told, real, whole
from sampler import prior, sgld


def draw(model, checkpoint, y, args, callback=None):
    """Chains from N(0, 0.01) by `args.steps` steps of SGLD, with the step size and noise of the training.

    Args:
        y: labels (N,) for E(x, y), or a number N of chains for E(x).
        callback: as in `sampler.sgld`.

    Returns:
        x (N, C, H, W) in [-1, 1] and its energies (N,).
    """
    labels = y if torch.is_tensor(y) else None
    count = y if labels is None else len(y)
    size = checkpoint['image_size']
    generator = torch.Generator(args.device).manual_seed(args.seed)
    start = prior('gaussian', (count, checkpoint['settings']['channels'], size, size), generator, args.device)

    with tqdm(total=args.steps, desc='SGLD', unit='step') as bar:
        def watch(k, x, e):
            bar.update()
            if callback is not None:
                callback(k, x, e)

        x = sgld(lambda x: model.energy(x, labels), start, args.steps, generator=generator, callback=watch,
                 **sampler_settings(checkpoint, args))
    return x, model.energy(x, labels)


def sampler_settings(checkpoint, args):
    """The checkpoint's own SGLD settings, with what the command line says instead."""
    given = {'step_size': args.step_size, 'noise': args.noise}
    return {**checkpoint['sampler'], **{key: value for key, value in given.items() if value is not None}}


def samples(model, checkpoint, args):
    """A grid of samples: a row for each of `--classes`, or eight rows of any."""
    if args.classes:
        labels = class_labels(args.classes, checkpoint, args.device)  # (R,)
        x, _ = draw(model, checkpoint, labels.repeat_interleave(args.count), args)  # (R * count, C, H, W)
        rows, columns = class_names(labels, checkpoint), args.count
    else:
        x, _ = draw(model, checkpoint, any_labels(8 * args.count, checkpoint, args), args)  # (8 * count, C, H, W)
        rows, columns = None, 8
    save_grid(x, args.out / 'samples.png', columns, f'{args.steps} steps of SGLD from noise', rows=rows)
    return x


def chain(model, checkpoint, args):
    """The states of a few chains at steps 0, 1, 2, 4, ... with the energy below each, a chain a row (course task 3.5)."""
    y = class_labels(args.classes, checkpoint, args.device) if args.classes else any_labels(args.count, checkpoint, args)
    shown = sorted({0, *(2 ** i for i in range(args.steps.bit_length()) if 2 ** i < args.steps)})
    states = []

    def remember(k, x, e):
        if k in shown:
            states.append((x, e))

    states.append(draw(model, checkpoint, y, args, remember))
    x = torch.stack([x for x, _ in states], dim=1).flatten(0, 1)  # S times (N, C, H, W) -> (N, S, C, H, W) -> (N * S, ...)
    e = torch.stack([e for _, e in states], dim=1).flatten()  # (N, S) -> (N * S,)
    rows = class_names(y, checkpoint) if torch.is_tensor(y) else None
    save_grid(x, args.out / 'chain.png', len(states), 'SGLD from noise: step, and the energy below each state', rows=rows,
              heads=[*shown, args.steps], captions=[f'{value:.2f}' for value in e.tolist()])
    return x


MODES = {'samples': samples, 'chain': chain}


def class_labels(names, checkpoint, device):
    """Class names, or numbers where no class is called so -> labels (R,)."""
    known = checkpoint['class_names']
    if not known:
        fail('--classes: this checkpoint is a plain EBM without classes; leave the flag out')
    numbers = {**{str(label): label for label in range(len(known))}, **{name: label for label, name in enumerate(known)}}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        fail(f'--classes {unknown[0]}: no such class; choose from {" ".join(known)}')
    return torch.tensor([numbers[name] for name in names], device=device)


def any_labels(count, checkpoint, args):
    """Labels (count,) as frequent as in the training data for a model whose chains follow E(x, y): x ~ p(x|y) with
    y ~ p(y) is x ~ p(x). Just the number for one whose chains follow E(x)."""
    if not checkpoint['args']['conditional']:
        return count
    generator = torch.Generator().manual_seed(args.seed)
    shares = torch.tensor(checkpoint['class_counts'], dtype=torch.float)  # (K,)
    return shares.multinomial(count, replacement=True, generator=generator).to(args.device)


def class_names(labels, checkpoint):
    return [checkpoint['class_names'][label] for label in labels.tolist()]


def parse_args(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    parser.add_argument('--mode', choices=list(MODES), default='samples', help='what to draw')
    parser.add_argument('--classes', nargs='+', metavar='CLASS', help='names or numbers of classes, for E(x, y)')
    parser.add_argument('--count', type=whole(1, 10_000), default=8, help='samples a class, or rows of eight; or chains')
    parser.add_argument('--steps', type=whole(1), default=256, help='SGLD steps')
    parser.add_argument('--step-size', type=real(1e-9), help='instead of the checkpoint\'s own')
    parser.add_argument('--noise', type=real(0), help='instead of the checkpoint\'s own')
    parser.add_argument('--out', type=folder, default='.', help='folder to write into')
    parser.add_shared_arguments()
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with mistakes_told():
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        x = MODES[args.mode](model, checkpoint, args)
        with atomic_write(args.out / f'{args.mode}.npy') as file:
            np.save(file, x.cpu().numpy())
    print(f'{args.out / args.mode}.png, {args.out / args.mode}.npy')


if __name__ == '__main__':
    main()
