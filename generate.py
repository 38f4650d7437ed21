"""Draw images from a trained energy (course task 3.5).

    python generate.py --ckpt best.pt                               64 samples
    python generate.py --ckpt best.pt --classes a b c               eight of p(x|y) for each class
    python generate.py --ckpt best.pt --mode chain --classes a b    watch chains leave the noise

    from noise    samples; chain, the states on the way, with their energies; interpolate, between
                  two samples; compose, product, mixture and negation of two experts
    from images   reconstruct, the noise that becomes an image; inpaint, missing pixels; denoise;
                  concepts, dE/dx, what the energy looks at
    evaluate      samples seen by an independent classifier; writes evaluate.csv as well

Each mode writes a picture, MODE.png, and its images, MODE.npy, float32 (N, C, H, W), into --out.
Image i has its own random stream: on the CPU it is the same however many images are drawn.
"""
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (DataError, atomic_write, check_apart, load_data, load_images, save_gif, save_grid,
                  to_float, write_csv)
from model import CommandLine, energy_of_logits, fail, load_model, number, user_mistakes
from sampler import chain_settings, prior, randn, sgld

# Kind of the chains, default --steps and --images, and those flags that only some modes use.
Mode = namedtuple('Mode', 'kind steps images flags')
CHAIN, TEST = ['steps', 'step_size', 'guidance', 'gif'], ['images', 'data', 'data_root']
FROM_NOISE = [*CHAIN, 'noise', 'classes', 'count']
FROM_IMAGES = [*CHAIN, *TEST, 'start', 'classes']
MODES = {
    'samples': Mode('sampling', 256, None, FROM_NOISE),
    'chain': Mode('training', 256, None, FROM_NOISE),
    'interpolate': Mode('descent', 256, None, [*CHAIN, 'classes', 'count']),
    'reconstruct': Mode('descent', 32, 8, [*FROM_IMAGES, 'iterations']),
    'inpaint': Mode('training', 48, 8, [*FROM_IMAGES, 'noise', 'count', 'mask']),
    'denoise': Mode('descent', 24, 8, [*FROM_IMAGES, 'strengths', 'data_weight']),
    'compose': Mode('sampling', 256, None, [*FROM_NOISE, 'ckpt2', 'weight']),
    'concepts': Mode('descent', None, 8, [*TEST, 'start', 'classes']),
    'evaluate': Mode('sampling', 256, 500, [*CHAIN, *TEST, 'noise', 'judge']),
}
MASKS = ['left', 'centre', 'random', 'salt-and-pepper']


def parse_args(argv=None):
    parser = CommandLine(__doc__)
    count, weight, positive = number(int, 1, 10**5), number(float, 0, 1e9), number(float, 1e-9, 1e9)
    flag = parser.add_argument
    flag('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    flag('--mode', choices=list(MODES), default='samples', help='what to draw, see above')
    flag('--classes', nargs='+', metavar='CLASS', help='chains follow E(x, y) of these classes')
    flag('--count', type=count, default=8, help='of samples for each of --classes, or of rows; '
         'also of chains, of pairs to interpolate, of completions in inpaint')
    flag('--out', type=Path, default='.', help='folder to write into')
    flag = parser.add_argument_group('chains').add_argument
    flag('--steps', type=count, help='default: denoise 24, reconstruct 32, inpaint 48, others 256')
    flag('--step-size', type=positive, help='default: that of the training')
    flag('--noise', type=weight, help='standard deviation in a step; default: that of the training '
         'in chain and inpaint, else falling from .5 to 0 if training had --matching')
    flag('--guidance', type=weight, default=1., help='w of E(x) + w (E(x, y) - E(x))')
    flag('--gif', action='store_true', help='write the chains as a film, MODE.gif')
    flag = parser.add_argument_group('images and single modes').add_argument
    flag('--images', type=count, help='number of test images; default: 8, in evaluate 500')
    flag('--start', type=Path, metavar='FILE|FOLDER', help='your own images instead')
    flag('--data', help='where the data of the checkpoint are now')
    flag('--data-root', type=Path, help='where downloads and letterpress are now')
    flag('--iterations', type=count, default=60, help='reconstruct: steps of Adam')
    flag('--mask', default='left', help=f'inpaint: {", ".join(MASKS)}, or an image file that is '
         'white where pixels are missing')
    flag('--strengths', type=positive, nargs='+', default=[.2, .4, .8], metavar='S',
         help='denoise: standard deviations of the noise')
    flag('--data-weight', type=weight, default=.0003, help='denoise: pull to the noisy image')
    flag('--ckpt2', type=Path, help='compose: checkpoint of the second expert')
    flag('--weight', type=weight, default=.2, help='compose: w of the negation E1 - w E2')
    flag('--judge', type=Path, metavar='CKPT', help='evaluate: the independent classifier')

    args = parser.parse_args(argv)
    for name in [name for mode in MODES.values() for name in mode.flags]:
        if name not in MODES[args.mode].flags and getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name.replace("_", "-")}: mode {args.mode} does not use it')
    mask = None if args.mask in MASKS else Path(args.mask)
    if mask and not mask.is_file():
        parser.error(f'--mask {mask}: no such image, and none of {", ".join(MASKS)}')
    outputs = [os.path.realpath(args.out / f'{args.mode}.{end}') for end in ('png', 'npy', 'gif')]
    for name, path in [('--start', args.start), ('--mask', mask)]:
        if path and os.path.realpath(path) in outputs:
            parser.error(f'{name} {path}: would be overwritten; name another --out')
    args.steps = args.steps or MODES[args.mode].steps
    args.images = args.images or MODES[args.mode].images
    return args


# --- the one sampler ----------------------------------------------------------------------------

CHUNK = 32  # chains that run together: bounds the memory
Chains = namedtuple('Chains', 'x curve states')


def draw(energy, start, args, streams=(), free=None, keep=()):
    """Run SGLD from every start (N, C, H, W), CHUNK chains at a time. Returns the last states x
    (N, C, H, W), their energies, curve (steps + 1, N), and states {step: (N, C, H, W)} for `keep`.

    energy is a callable (x, i) -> (B,): x (B, C, H, W) are states of the chains number i (B,) of N,
    so it can look up their labels y[i]. streams are N torch.Generators; chains without noise need
    none. free, bool (N, 1, H, W), are the pixels that move; None is all."""
    count = len(start)
    streams = [*streams, *[torch.Generator(args.device)] * CHUNK]
    frames = sorted({round(k) for k in np.linspace(0, args.steps, 60)}) if args.gif else []
    states, curves = {step: [] for step in [*keep, *frames, args.steps]}, []
    bar = tqdm(total=args.steps * -(-count // CHUNK), desc=args.mode, unit='step')
    for at in range(0, count, CHUNK):
        # Copies of the last chain fill up the last chunk: smaller batches may round differently.
        i = torch.arange(at, at + CHUNK, device=args.device).clamp_max(count - 1)  # (CHUNK,)
        curve = []

        def watch(step, x, e):
            bar.update(step > 0)
            curve.append(e)
            if step in states:
                states[step].append(x)

        x = sgld(lambda x: energy(x, i), start[i], generator=streams[at:at + CHUNK],
                 free=None if free is None else free[i], callback=watch, **args.settings)
        watch(args.steps, x, energy(x, i))
        curves.append(torch.stack(curve))  # (steps + 1, CHUNK)
    bar.close()
    states = {step: torch.cat(chunks)[:count] for step, chunks in states.items()}  # (N, C, H, W)
    if args.gif:
        save_gif([states[step] for step in frames], args.out / f'{args.mode}.gif')
    return Chains(states[args.steps], torch.cat(curves, dim=1)[:, :count], states)


def start_noise(count, checkpoint, args):
    """A torch.Generator for each image and, drawn from it, noise z ~ N(0, 0.01): (N, C, H, W)."""
    streams = []
    for i in range(count):
        # SeedSequence mixes the two numbers: image 1 of seed 0 is not image 0 of seed 1.
        seed = int(np.random.SeedSequence([args.seed, i]).generate_state(1)[0])
        streams.append(torch.Generator(args.device).manual_seed(seed))
    shape = checkpoint['data']['image_shape']  # [C, H, W]
    return streams, prior('gaussian', (count, *shape), streams, args.device)


def guided(model, y, args):
    """Energy for `draw`: E(x) if y is None, else that of classifier-free guidance for labels y (N,)
    (Ho and Salimans 2022), E(x) + w (E(x, y) - E(x)) = E(x) - w log p(y|x). It is E(x, y) for w = 1
    and asks for clearer members of the class for w > 1."""
    def energy(x, i):
        logits = model.get_logits(x)  # (B, K)
        e = energy_of_logits(logits)  # (B,)
        if y is None:
            return e
        return (1 - args.guidance) * e + args.guidance * energy_of_logits(logits, y[i])  # (B,)
    return energy


# --- from noise: each mode draws its picture and returns its images -------------------------------

def samples(model, checkpoint, args):
    """A grid of samples: a row for each of --classes, or --count rows of eight."""
    y, streams, z = start_samples(8 * args.count, args.count, checkpoint, args)
    x = draw(guided(model, y, args), z, args, streams).x
    save_grid(x, args.out / 'samples.png', args.count if args.classes else 8,
              f'{args.steps} steps of SGLD from noise', rows=args.classes)
    return x


def chain(model, checkpoint, args):
    """A row for each chain: its states at steps 0, 1, 2, 4, ... with their energies."""
    y, streams, z = start_samples(args.count, 1, checkpoint, args)
    shown = sorted({0, *(2 ** i for i in range(args.steps.bit_length())), args.steps})
    chains = draw(guided(model, y, args), z, args, streams, keep=shown)
    x = torch.stack([chains.states[k] for k in shown], dim=1)  # (N, S, C, H, W)
    e = chains.curve[shown].T.flatten()  # (steps + 1, N) -> (S, N) -> (N * S,)
    save_grid(x.flatten(0, 1), args.out / 'chain.png', len(shown),
              f'SGLD with noise {args.settings["noise"]:g}: step, and the energy below each state',
              rows=class_names(y, checkpoint), heads=shown,
              captions=[f'{value:.2f}' for value in e.tolist()],
              curve=('mean energy', chains.curve.mean(1).cpu()))  # (steps + 1, N) -> (steps + 1,)
    return x.flatten(0, 1)  # (N, S, C, H, W) -> (N * S, C, H, W)


def interpolate(model, checkpoint, args):
    """Samples between two samples: chains without noise from z = sqrt(rho) z1 + sqrt(1 - rho) z2,
    which is N(0, 0.01) for every rho (Nijkamp et al. 2019, "Learning non-convergent non-persistent
    short-run MCMC toward energy-based model")."""
    y, _, z = start_samples(2 * args.count, 2, checkpoint, args)
    rho = torch.linspace(1, 0, 9, device=args.device).view(9, 1, 1, 1)
    z = rho.sqrt() * z[0::2, None] + (1 - rho).sqrt() * z[1::2, None]  # (P, 9, C, H, W)
    energy = guided(model, y, args)  # a row of 9 follows the label of its z1
    x = draw(lambda x, i: energy(x, i // 9 * 2), z.flatten(0, 1), args).x  # (P * 9, C, H, W)
    save_grid(x, args.out / 'interpolate.png', 9, 'from one sample (rho = 1) to another (rho = 0)',
              rows=args.classes, heads=[f'{r:.3g}' for r in rho.flatten().tolist()])
    return x


def compose(model, checkpoint, args):
    """Two experts, alone and composed (Du et al. 2020, "Compositional visual generation with energy
    based models"), a row each: E(x, y) of two classes, or the energies of two checkpoints."""
    names = args.classes or [args.ckpt, args.ckpt2]
    if len(names) != 2 or None in names:
        fail('--mode compose: name two classes with --classes, or a second checkpoint with --ckpt2')
    model2, checkpoint2 = load_model(args.ckpt2 or args.ckpt, args.device, args.precision)
    if checkpoint2['data']['image_shape'] != checkpoint['data']['image_shape']:
        fail(f'--ckpt2 {args.ckpt2}: has images of another shape than {args.ckpt}; name another')
    y1 = y2 = None
    if args.classes:
        y1 = class_labels(names[:1], checkpoint, args).expand(5 * args.count)  # (5 * count,)
        y2 = class_labels(names[1:], checkpoint2, args).expand(5 * args.count)
    expert1, expert2 = guided(model, y1, args), guided(model2, y2, args)
    starts = [start_noise(args.count, checkpoint, args) for _ in range(5)]  # each row has the same
    streams = [stream for streams, _ in starts for stream in streams]
    z = torch.cat([z for _, z in starts])  # (5 * count, C, H, W)

    def energy(x, i):
        e1, e2 = expert1(x, i), expert2(x, i)  # (B,) both
        product, mixture, negation = e1 + e2, -torch.logaddexp(-e1, -e2), e1 - args.weight * e2
        e = torch.stack([e1, e2, product, mixture, negation], dim=1)  # (B, 5)
        return e[torch.arange(len(i), device=i.device), i // args.count]  # (B, 5) -> (B,)

    x = draw(energy, z, args, streams).x
    save_grid(x, args.out / 'compose.png', args.count, 'two experts and their compositions',
              rows=[f'1: {names[0]}', f'2: {names[1]}', '1 and 2', '1 or 2', '1 not 2'])
    return x


def start_samples(count, per_class, checkpoint, args):
    """Labels y (N,), or None for E(x), random streams and noises z (N, C, H, W): `per_class` of
    each of --classes, or else `count` with labels as frequent as in the training data, so that
    x ~ p(x|y) is x ~ p(x)."""
    if args.classes:
        y = class_labels(args.classes, checkpoint, args).repeat_interleave(per_class)  # (N,)
        return y, *start_noise(len(y), checkpoint, args)
    streams, z = start_noise(count, checkpoint, args)
    if not checkpoint['args']['conditional']:
        return None, streams, z
    counts = torch.tensor(checkpoint['data']['class_counts']['train'], device=args.device)  # (K,)
    y = [counts.float().multinomial(1, generator=stream) for stream in streams]  # (1,) each
    return torch.cat(y), streams, z


def class_labels(names, checkpoint, args):
    """Class names -> labels (R,). Positions are accepted too, unless a class is called a number."""
    known = checkpoint['class_names']
    if not known:
        fail('--classes: this model is a plain EBM without classes; leave the flag out')
    labels = {name: label for label, name in enumerate(known)}
    if not any(name.isdecimal() for name in known):
        labels |= {str(label): label for label in range(len(known))}
    for name in names:
        if name not in labels:
            fail(f'--classes {name}: no such class; choose from {" ".join(known)}')
    return torch.tensor([labels[name] for name in names], device=args.device)


def class_names(y, checkpoint):
    return None if y is None else [checkpoint['class_names'][label] for label in y.tolist()]


# --- from images ----------------------------------------------------------------------------------

def reconstruct(model, checkpoint, args):
    """The noise z from which a chain without noise ends in a given image x: Adam on |M(z) - x|^2,
    where M(z) is the last state of the chain (Nijkamp et al. 2019)."""
    x, y = given_images(checkpoint, args)  # (N, C, H, W), (N,)
    energy = guided(model, y, args)
    _, z = start_noise(len(x), checkpoint, args)
    found = z.clone().requires_grad_(True)  # (N, C, H, W)
    optimizer = torch.optim.Adam([found], lr=.03)
    for _ in tqdm(range(args.iterations), desc='reconstruct', unit='iteration'):
        optimizer.zero_grad()
        for i in torch.arange(len(x), device=args.device).split(8):  # (8,), to bound the memory
            end = sgld(lambda x: energy(x, i), found[i], differentiable=True, **args.settings)
            (end - x[i]).square().sum().backward()
        optimizer.step()
    starts = torch.cat([z, found.detach()])  # (2N, C, H, W)
    ends = draw(lambda state, i: energy(state, i % len(x)), starts, args).x  # (2N, C, H, W)
    first, last = ends.chunk(2)  # (N, C, H, W) both
    columns = {'image': x, 'z found': starts[len(x):], 'M(first z)': first, 'M(z found)': last,
               'error': (last - x).abs() - 1}
    title = f'{args.iterations} steps of Adam through {args.steps} of SGLD; PSNR in dB'
    return save_columns(columns, ['M(first z)', 'M(z found)'], title, args)


def inpaint(model, checkpoint, args):
    """Missing pixels filled in by SGLD on them alone, --count times from different noises.
    Baselines: the noise that the chains start from, and the mean of the known pixels."""
    x, y = given_images(checkpoint, args)  # (N, C, H, W), (N,)
    streams, z = start_noise(len(x) * args.count, checkpoint, args)  # (N * count, C, H, W)
    missing = missing_pixels(streams[::args.count], x, args)  # (N, 1, H, W)
    if args.mask == 'salt-and-pepper':
        z = z[:, :1].sign()  # (N * count, 1, H, W), black and white
    free = missing.repeat_interleave(args.count, 0)  # (N * count, 1, H, W)
    start = torch.where(free, z, x.repeat_interleave(args.count, 0))  # (N * count, C, H, W)
    energy = guided(model, y, args)
    done = draw(lambda x, i: energy(x, i // args.count), start, args, streams, free).x
    done = done.unflatten(0, (-1, args.count))  # (N * count, C, H, W) -> (N, count, C, H, W)
    total = (x * ~missing).sum((2, 3), keepdim=True)  # (N, C, 1, 1)
    mean = total / (~missing).sum((2, 3), keepdim=True).clamp_min(1)  # (N, C, 1, 1)
    columns = {'image': x, 'noise': start[::args.count], 'mean fill': torch.where(missing, mean, x)}
    for i in range(args.count):
        columns[f'SGLD {i + 1}'] = done[:, i]  # (N, C, H, W)
    columns['SGLD mean'] = torch.where(missing, done.mean(1), x)
    title = f'missing pixels ({args.mask}) filled in; their PSNR in dB'
    return save_columns(columns, list(columns)[1:], title, args, missing)


def missing_pixels(streams, x, args):
    """The pixels that --mask takes away from images x with these streams: bool (N, 1, H, W)."""
    count, _, height, width = x.shape
    if args.mask in ('random', 'salt-and-pepper'):
        limit = .674 if args.mask == 'random' else 0.  # 3/4, or half, of N(0, 1) is below
        return randn((count, 1, height, width), streams, args.device) < limit
    missing = torch.zeros(height, width, dtype=torch.bool, device=args.device)
    if args.mask == 'left':
        missing[:, :width // 2] = True
    elif args.mask == 'centre':
        missing[height // 4:height - height // 4, width // 4:width - width // 4] = True
    else:
        missing = load_images(args.mask, height, 1)[0][0, 0].to(args.device) > 127  # (H, W)
        if not missing.any():
            fail(f'--mask {args.mask}: all of one colour; make missing pixels white, others black')
    return missing.expand(count, 1, -1, -1)  # (H, W) -> (N, 1, H, W)


def denoise(model, checkpoint, args):
    """Gaussian noise of a strength s removed by chains without noise, from the noisy image, along

        E(x) + w / (2 s^2) |x - noisy|^2  =  w [E(x) / w + |x - noisy|^2 / (2 s^2)],

    w times the energy of p(x | noisy) for the prior exp(-E/w). w is --data-weight / step size: a
    step pulls x back by --data-weight / s^2 of the distance. Baseline: total variation."""
    x, y = given_images(checkpoint, args)  # (N, C, H, W), (N,)
    s = torch.tensor(args.strengths, device=args.device).repeat_interleave(len(x))  # (S * N,)
    streams, z = start_noise(len(s), checkpoint, args)
    noise = s.view(-1, 1, 1, 1) * randn(z.shape, streams, args.device)  # (S * N, C, H, W)
    noisy = x.repeat(len(args.strengths), 1, 1, 1) + noise  # (S * N, C, H, W)
    w = args.data_weight / args.settings['step_size']
    prior_energy = guided(model, y, args)

    def energy(state, i):
        distance = (state - noisy[i]).square().sum((1, 2, 3))  # (B,)
        return prior_energy(state, i % len(x)) + w / (2 * s[i] ** 2) * distance

    done = draw(energy, noisy.clamp(-1, 1), args).x  # (S * N, C, H, W)
    smooth = total_variation(noisy, s)  # (S * N, C, H, W)
    columns = {'image': x}
    for i, strength in enumerate(args.strengths):
        part = slice(i * len(x), (i + 1) * len(x))
        columns[f'noise {strength:g}'] = noisy[part].clamp(-1, 1)  # (N, C, H, W)
        columns[f'TV {strength:g}'] = smooth[part].clamp(-1, 1)
        columns[f'SGLD {strength:g}'] = done[part]
    return save_columns(columns, list(columns)[1:], 'Gaussian noise removed; PSNR in dB', args)


def total_variation(noisy, s):
    """Descent on (|u - noisy|^2 + 1.75 s * sum |grad u|) / 2 (Rudin, Osher and Fatemi 1992) for
    strengths s (B,): (B, C, H, W) -> u (B, C, H, W). The factor was chosen on validation images."""
    def objective(u):  # (B, C, H, W) -> (B,)
        across, down = u[..., :-1, :].diff(dim=3), u[..., :-1].diff(dim=2)  # (B, C, H - 1, W - 1)
        length = (across.square() + down.square() + 1e-4).sqrt()
        return ((u - noisy).square().sum((1, 2, 3)) + 1.75 * s * length.sum((1, 2, 3))) / 2
    return sgld(objective, noisy, 800, step_size=.004, noise=0., clamp=None)


def given_images(checkpoint, args):
    """Images x (N, C, H, W) in [-1, 1]: those of --start, or --images of the test split, at even
    distances. With them the labels (N,) that chains follow, or None for E(x)."""
    if args.start:
        channels, size, _ = checkpoint['data']['image_shape']
        x, y = to_float(load_images(args.start, size, channels)[0]), None
    else:
        test = load_test(checkpoint, args)
        x, y = test.batch(torch.linspace(0, len(test) - 1, min(args.images, len(test))).long())
        y = y.to(args.device) if checkpoint['args']['conditional'] else None
    if args.classes and args.mode != 'concepts':
        y = class_labels(args.classes, checkpoint, args)
        if len(y) > 1:
            fail(f'--classes: mode {args.mode} takes one, the class of all images')
        y = y.expand(len(x))  # (1,) -> (N,)
    return x.to(args.device), y


def load_test(checkpoint, args):
    """The test split of the data that the model was trained on; a DataError if it is another."""
    flags = checkpoint['args']
    return load_data(args.data or flags['data'], data_root=args.data_root or flags['data_root'],
                     seed=flags['seed'], like=checkpoint['data']).test


def save_columns(columns, scored, title, args, where=None):
    """Draw up to eight images with what became of them and return all, (N * columns, C, H, W).
    columns is {name: (N, C, H, W)}; those in `scored` get their PSNR over the pixels `where`."""
    x, scores, captions = columns['image'], {}, []
    for name in scored:
        scores[name] = psnr(columns[name], x, where).tolist()
        print(f'{name:<14}{np.mean(scores[name]):6.2f} dB, mean over {len(x)} images')
    for i in range(min(8, len(x))):
        for name in columns:
            captions.append(f'{scores[name][i]:.1f}' if name in scores else '')
    stacked = torch.stack(list(columns.values()), dim=1)  # (N, columns, C, H, W)
    save_grid(stacked[:8].flatten(0, 1), args.out / f'{args.mode}.png', len(columns), title,
              heads=list(columns), captions=captions)
    return stacked.flatten(0, 1)


def psnr(result, x, where=None):
    """Peak signal-to-noise ratio in dB, over the pixels `where` or all: (N, C, H, W) -> (N,)."""
    where = torch.ones_like(x) if where is None else where.expand_as(x).float()
    mse = ((result - x).square() * where).sum((1, 2, 3)) / where.sum((1, 2, 3))  # (N,)
    return 10 * (4 / mse).log10()  # the values have a range of 2


def concepts(model, checkpoint, args):
    """What the energies look at: the gradients of E(x), and of E(x, y) for the three most likely
    classes or --classes. Red: a brighter pixel is less likely; blue: more likely."""
    x, _ = given_images(checkpoint, args)  # (N, C, H, W)
    logits = model.get_logits(x.requires_grad_(True))  # (N, K)
    labels = logits.topk(min(3, logits.shape[1])).indices  # (N, R)
    if args.classes:
        labels = class_labels(args.classes, checkpoint, args).expand(len(x), -1)  # (R,) -> (N, R)
    columns = [None, *labels.T] if checkpoint['class_names'] else [None]  # None or (N,)
    gradients, pictures, captions = [], [x.detach().expand(-1, 3, -1, -1)], [[''] * len(x)]
    for y in columns:
        e = energy_of_logits(logits, y)  # (N,)
        gradients += torch.autograd.grad(e.sum(), x, retain_graph=True)  # (N, C, H, W)
        pictures.append(heat_map(x.detach(), gradients[-1]))  # (N, 3, H, W)
        names = class_names(y, checkpoint) or ['E(x)'] * len(x)
        captions.append([f'{name}: {value:.2f}' for name, value in zip(names, e.tolist())])
    pictures = torch.stack(pictures, dim=1).flatten(0, 1)  # (N * (2 + R), 3, H, W)
    save_grid(pictures, args.out / 'concepts.png', 1 + len(columns),
              'dE/dx: red, a brighter pixel raises the energy',
              captions=np.transpose(captions).flatten().tolist())
    return torch.stack(gradients, dim=1).flatten(0, 1)  # (N * (1 + R), C, H, W)


def heat_map(x, gradient):
    """Gradients in red and blue over pale images: (N, C, H, W) both -> (N, 3, H, W)."""
    heat = gradient.sum(1, keepdim=True)  # (N, C, H, W) -> (N, 1, H, W)
    strongest = heat.abs().flatten(1).quantile(.99, dim=1).view(-1, 1, 1, 1)  # (N, 1, 1, 1)
    heat = (heat / strongest.clamp_min(1e-12)).clamp(-1, 1)
    colour = torch.cat([heat.sign(), -torch.ones_like(heat), -heat.sign()], dim=1)  # (N, 3, H, W)
    return (.7 + .3 * x.mean(1, keepdim=True)).lerp(colour, heat.abs())


def evaluate(model, checkpoint, args):
    """How often an independent classifier sees the class asked for, the Frechet distance of its
    features, and the share of distinct samples: farther from the next one of their class than the
    closest 5 % of test images. The numbers of further test images show what can be reached."""
    if not checkpoint['class_names']:
        fail(f'--mode evaluate: {args.ckpt} is a plain EBM without classes; evaluate a JEM')
    judge, test = load_judge(checkpoint, args), load_test(checkpoint, args)
    first, second = paired_halves(test.labels, args.images, args.seed)  # (N,) both
    real, y = test.batch(first)  # (N, C, H, W), (N,)
    streams, z = start_noise(len(y), checkpoint, args)
    x = draw(guided(model, y.to(args.device), args), z, args, streams).x

    features_real, _ = judge_features(judge, real, args)  # (N, D)
    distances = nearest(features_real, y)  # (N,), inf if there is no other image of the class
    closest = distances.masked_fill(distances.isinf(), torch.nan).nanquantile(.05)
    rows, p = [], {}
    for name, images in [('samples', x), ('more real', test.batch(second)[0])]:
        features, logits = judge_features(judge, images, args)  # (N, D), (N, K)
        row = {'images': name,
               'agreement': (logits.argmax(1) == y).float().mean().item(),
               'frechet': frechet_distance(features, features_real),
               'distinct': 1 - (nearest(features, y) <= closest).float().mean().item(),
               'n': len(y)}
        rows.append(row)
        print(name, *[f' {key} {row[key]:.3f}' for key in ('agreement', 'frechet', 'distinct')])
        p[name] = logits.softmax(1)[torch.arange(len(y)), y]  # (N, K) -> (N,), p(y|x)
    write_csv(rows, list(rows[0]), args.out / 'evaluate.csv')
    worst = p['samples'].argsort()[:64]
    pairs = zip(class_names(y[worst], checkpoint), p['samples'][worst].tolist())
    save_grid(x.cpu()[worst], args.out / 'evaluate.png', 8,
              'samples with the lowest p(y|x) of the classifier: class asked for, p(y|x)',
              captions=[f'{name}: {value:.2f}' for name, value in pairs])
    return x


def load_judge(checkpoint, args):
    """The classifier at --judge: of another run, on the same data, split in the same way."""
    if not args.judge:
        fail('--mode evaluate: name an independent classifier with --judge; python train.py '
             '--px-weight 0 --width 48 on the same data makes one')
    judge, facts = load_model(args.judge, args.device, args.precision)
    if facts['args'] == checkpoint['args']:
        fail(f'--judge {args.judge}: is --ckpt itself, or of the same run; name another classifier')
    if not facts['class_names']:
        fail(f'--judge {args.judge}: is a plain EBM and no classifier; name another')
    if facts['data'] != checkpoint['data'] or facts['args']['seed'] != checkpoint['args']['seed']:
        fail(f'--judge {args.judge}: has other --data or another --seed than {args.ckpt}')
    return judge


def paired_halves(labels, count, seed):
    """Positions (N,) and (N,) of two disjoint random sets of at most `count` images with the same
    labels, pair by pair: a Frechet distance would count a difference in the classes as well."""
    order, pairs = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)), []
    for label in labels.unique():
        members = order[labels[order] == label]  # in random order
        pairs.append(members[:len(members) // 2 * 2].view(-1, 2))  # an odd one is left out
    pairs = torch.cat(pairs)  # (P, 2)
    if len(pairs) < 2 or count < 2:
        fail('--images: evaluate needs at least two, and two pairs of test images of one class')
    picked = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
    return pairs[picked].unbind(1)  # (N, 2) -> (N,) both


def judge_features(judge, x, args):
    """Last features (N, D) and logits (N, K) of images (N, C, H, W), both on the CPU."""
    features = torch.cat([judge.features(part.to(args.device)) for part in x.split(256)])  # (N, D)
    return features.cpu().double(), judge.head(features).cpu()  # mps has no float64


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D) with
    covariances C (Heusel et al. 2017)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (D, D)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt()  # (D,), of its eigenvalues
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()
    return (distance - 2 * root.sum()).item()


def nearest(features, y):
    """Distance to the nearest other image of the class, or inf: (N, D), (N,) -> (N,)."""
    distance = torch.cdist(features, features)  # (N, N)
    distance[y[:, None] != y] = torch.inf
    return distance.fill_diagonal_(torch.inf).amin(1)


def main(argv=None):
    with user_mistakes(DataError):
        args = parse_args(argv)
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        check_apart(args.out, args.data or checkpoint['args']['data'], args.start)
        args.settings = chain_settings(checkpoint['sampler'], MODES[args.mode].kind, args.steps,
                                       args.step_size, args.noise)
        x = globals()[args.mode](model, checkpoint, args)  # the function of that name
        with atomic_write(args.out / f'{args.mode}.npy') as file:
            np.save(file, x.cpu().numpy())
    print(f'{args.out / args.mode}.png, {args.out / args.mode}.npy')


if __name__ == '__main__':
    main()
