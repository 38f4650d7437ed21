"""Draw images from a trained energy (course task 3.5).

    python generate.py --ckpt best.pt                               64 samples
    python generate.py --ckpt best.pt --mode chain --classes a b    watch chains of two classes

    from noise    samples; chain: the states on the way, with their energies; interpolate: from one
                  sample to another; compose: product, mixture and negation of two experts
    from images   reconstruct: the noise that a chain turns into the image; inpaint: fill in missing
                  pixels; denoise; concepts: dE/dx, which pixels raise the energy
    evaluate      let an independent classifier judge the samples; writes evaluate.csv as well

Each mode writes a picture, MODE.png, and its images (concepts: its gradients), MODE.npy, float32
(N, C, H, W), into --out. Image i has its own random stream: sample 7 is the same in every grid.
"""
from model import CommandLine, fail, load_model, number, user_mistakes  # before torch, for Ctrl-C
import math
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (DataError, atomic_write, blur, check_apart, load_data, load_images, save_grid,
                  to_float, to_uint8, write_csv)
from sampler import chain_settings, prior, randn, sgld

CHUNK = 32  # chains that run together: bounds the memory


def draw(energy, start, args, streams=(), free=None, keep=()):
    """Run SGLD from every start (N, C, H, W), CHUNK chains at a time. Returns the last states x
    (N, C, H, W) and the states {step: (N, C, H, W)} at the steps in `keep`. energy(x, i) -> (B,)
    gets chains x (B, C, H, W) and their numbers i (B,), by which it finds their labels.
    streams are N torch.Generators. free, bool (N, 1, H, W), says which pixels move."""
    count = len(start)
    streams = [*streams] + CHUNK * [torch.Generator(args.device)]  # spare ones for copies
    frames = sorted({round(k) for k in np.linspace(0, args.steps, 60)}) if args.gif else []
    states = {step: [] for step in [*keep, *frames, args.steps]}
    with tqdm(total=args.steps * math.ceil(count / CHUNK), desc=args.mode, unit='step') as bar:
        for at in range(0, count, CHUNK):
            # Copies of the last chain fill the last chunk: another batch size rounds differently.
            i = torch.arange(at, at + CHUNK, device=args.device).clamp_max(count - 1)  # (CHUNK,)

            def watch(step, x, _):  # called before each step and after the last one
                bar.update(step > 0)
                if step in states:
                    states[step].append(x)
            x = sgld(lambda x: energy(x, i), start[i], generator=streams[at:at + CHUNK],
                     free=None if free is None else free[i], callback=watch, **args.settings)
            watch(args.steps, x, None)
    states = {step: torch.cat(chunks)[:count] for step, chunks in states.items()}  # (N, C, H, W)
    if args.gif:
        save_film([states[step] for step in frames], args.out / f'{args.mode}.gif')
    return states[args.steps], states


def save_film(frames, path):
    """A film of a square grid from a list of (N, C, H, W); the last frame is held for 2 s."""
    from torchvision.transforms.v2.functional import to_pil_image  # slow to import
    from torchvision.utils import make_grid
    columns = math.ceil(len(frames[0]) ** .5)
    first, *others = [to_pil_image(make_grid(to_uint8(x.cpu()), columns)) for x in frames]
    with atomic_write(path) as file:
        first.save(file, 'GIF', save_all=True, append_images=others, loop=0,
                   duration=[80] * len(others) + [2000])


def start_noise(count, checkpoint, args):
    """A torch.Generator for each image and, drawn from it, noise z ~ N(0, 0.01): (N, C, H, W)."""
    # SeedSequence mixes the two numbers: image 1 of seed 0 is not image 0 of seed 1.
    seeds = [np.random.SeedSequence([args.seed, i]).generate_state(1)[0] for i in range(count)]
    streams = [torch.Generator(args.device).manual_seed(int(seed)) for seed in seeds]
    shape = checkpoint['data']['image_shape']  # [C, H, W]
    return streams, prior('gaussian', (count, *shape), streams, args.device)


def guided(model, y, args):
    """Energy for `draw`: E(x) if y is None, else E(x, y) - (w - 1) log softmax f(x)[y] for labels
    y (N,) and w = --guidance, classifier guidance (Dhariwal and Nichol 2021): w > 1 asks for
    clearer members of the class, w = 0 for an image of any class."""
    if y is None and args.guidance != 1:
        fail('--guidance: chains follow E(x) here; name --classes of a JEM, or leave it out')
    def energy(x, i):
        logits = model.get_logits(x)  # (B, K)
        if y is None:
            return model.energy_of_logits(logits)  # (B,)
        log_p = logits.log_softmax(1).gather(1, y[i, None]).squeeze(1)  # (B, K) -> (B,)
        return model.energy_of_logits(logits, y[i]) - (args.guidance - 1) * log_p  # (B,)
    return energy


def samples(model, checkpoint, args):
    """A grid of samples: a row for each of --classes, or --count rows of eight."""
    y, streams, z = start_samples(8 * args.count, args.count, checkpoint, args)
    x = draw(guided(model, y, args), z, args, streams)[0]
    save_grid(x, args.out / 'samples.png', args.count if args.classes else 8,
              f'{args.steps} steps of SGLD from noise', rows=args.classes or ())
    return x


def chain(model, checkpoint, args):
    """A row for each chain: its states at steps 0, 1, 2, 4, ... and the energies it follows."""
    y, streams, z = start_samples(args.count, args.count, checkpoint, args)
    shown = sorted({0, *(2 ** i for i in range(args.steps.bit_length())), args.steps})
    energy = guided(model, y, args)
    states = draw(energy, z, args, streams, keep=shown)[1]
    x = torch.stack([states[k] for k in shown], 1).flatten(0, 1)  # (N * S, C, H, W)
    e = torch.stack([energy(states[k], torch.arange(len(z))) for k in shown], 1)  # (N, S)
    save_grid(x, args.out / 'chain.png', len(shown),
              f'SGLD with noise {args.settings["noise"]:g}: step, and the energy below each state',
              rows=class_names(y, checkpoint), heads=shown,
              captions=[f'{value:.2f}' for value in e.flatten().tolist()])
    tell_mixing(energy, checkpoint, args)
    return x


def tell_mixing(energy, checkpoint, args):
    """Eight chains of the first row's class: print R-hat (Gelman and Rubin 1992) and the effective
    sample size of their second halves: the worst over the energy and the brightness of four
    quarters (perfect draws: some 60 %). If all energies fall alike, R-hat is too low."""
    streams, z = start_noise(8, checkpoint, args)
    trace = []

    def watch(k, x, e):
        quarters = F.adaptive_avg_pool2d(x, 2).flatten(1)  # (8, 4 * C)
        trace.append(torch.cat([e[:, None], quarters], dim=1))  # (8, 1 + 4 * C)
    sgld(lambda x: energy(x, [0] * 8), z, generator=streams, callback=watch, **args.settings)
    x = torch.stack(trace[args.steps // 2:], dim=1).cpu().double()  # (8, n, 1 + 4 * C)
    within, between = x.var(1, correction=0).mean(0), x.mean(1).var(0)  # (1 + 4 * C,) both
    r_hat, ess = (1 + between / within).sqrt().max(), (8 * (1 + within / between)).min()
    print(f'R-hat {r_hat:.2f} (near 1 if chains mix); sample size {ess:.0f} of 8 x {x.shape[1]}')


def interpolate(model, checkpoint, args):
    """Samples between two samples of a class: chains without noise from z = sqrt(rho) z1 +
    sqrt(1 - rho) z2, which is N(0, 0.01) for every rho (rho^2 in Nijkamp et al. 2019)."""
    y, _, z = start_samples(2 * args.count, 2 * args.count, checkpoint, args)
    rho = torch.linspace(1, 0, 9, device=args.device).view(9, 1, 1, 1)
    z = rho.sqrt() * z[0::2, None] + (1 - rho).sqrt() * z[1::2, None]  # (P, 9, C, H, W)
    energy = guided(model, y, args)
    x = draw(lambda x, i: energy(x, i // 9 * 2), z.flatten(0, 1), args)[0]  # (P * 9, C, H, W)
    save_grid(x, args.out / 'interpolate.png', 9, 'from one sample (rho = 1) to another (rho = 0)',
              rows=class_names(y, checkpoint)[::2], heads=[f'{r:.3g}' for r in rho.flatten()])
    return x


def compose(model, checkpoint, args):
    """Two experts and their compositions, a row each (Du et al. 2020): two classes (by default the
    first two) or two checkpoints. "1 or 2" is an even mixture only if both Z are equal."""
    if not args.ckpt2:
        args.classes = args.classes or checkpoint['class_names'][:2]
    names = args.classes or [args.ckpt, args.ckpt2]
    if len(names) != 2 or None in names:
        fail('--mode compose: name two classes with --classes, or a second checkpoint with --ckpt2')
    model2, checkpoint2 = load_model(args.ckpt2 or args.ckpt, args.device, args.precision)
    if checkpoint2['data']['image_shape'] != checkpoint['data']['image_shape']:
        fail(f'--ckpt2 {args.ckpt2}: has images of another shape than {args.ckpt}; name another')
    y1 = y2 = None
    if args.classes:
        y1 = class_labels(names[:1], checkpoint, args).expand(5 * args.count)  # (1,) -> (N,)
        y2 = class_labels(names[1:], checkpoint2, args).expand(5 * args.count)  # (1,) -> (N,)
    expert1, expert2 = guided(model, y1, args), guided(model2, y2, args)
    starts = [start_noise(args.count, checkpoint, args) for _ in range(5)]  # the same in each row
    streams = [stream for streams, _ in starts for stream in streams]
    z, t = torch.cat([z for _, z in starts]), model.temperature  # (N, C, H, W), N = 5 * count

    def energy(x, i):
        e1, e2 = expert1(x, i), t / model2.temperature * expert2(x, i)  # (B,), E2 scaled to T = t
        mixture = -t * torch.logaddexp(-e1 / t, -e2 / t)
        e = torch.stack([e1, e2, e1 + e2, mixture, e1 - args.weight * e2], dim=1)  # (B, 5)
        return e[torch.arange(len(i), device=i.device), i // args.count]  # (B, 5) -> (B,)
    x = draw(energy, z, args, streams)[0]
    save_grid(x, args.out / 'compose.png', args.count, 'two experts and their compositions',
              rows=[f'1: {names[0]}', f'2: {names[1]}', '1 and 2', '1 or 2', '1 not 2'])
    return x


def start_samples(count, per_class, checkpoint, args):
    """Labels y (N,), or None for E(x), random streams and noises z (N, C, H, W): `per_class` of
    each of --classes, or else `count` with labels as frequent as in the data."""
    if args.classes:
        y = class_labels(args.classes, checkpoint, args).repeat_interleave(per_class)  # (N,)
        return y, *start_noise(len(y), checkpoint, args)
    streams, z = start_noise(count, checkpoint, args)
    if not checkpoint['args']['conditional']:
        return None, streams, z
    counts = torch.tensor(checkpoint['data']['class_counts']['train'], device=args.device)  # (K,)
    y = [counts.float().multinomial(1, generator=stream) for stream in streams]  # (1,) each
    return torch.cat(y), streams, z  # N times (1,) -> (N,)


def class_labels(names, checkpoint, args):
    """Class names -> labels (R,)."""
    known = checkpoint['class_names']
    for name in names:
        if name not in known:
            fail(f'--classes {name}: choose from {" ".join(known) or "none (a plain EBM)"}')
    return torch.tensor([known.index(name) for name in names], device=args.device)


def class_names(y, checkpoint):
    return [] if y is None else [checkpoint['class_names'][label] for label in y.tolist()]


def reconstruct(model, checkpoint, args):
    """The noise z from which a chain without noise ends in a given image x: Adam on |M(z) - x|^2
    for its last state M(z) (Nijkamp et al. 2019). Nothing keeps z within N(0, 0.01)."""
    x, y = given_images(checkpoint, args)  # (N, C, H, W), (N,)
    energy = guided(model, y, args)
    z = start_noise(len(x), checkpoint, args)[1].requires_grad_(True)  # (N, C, H, W)
    optimizer = torch.optim.Adam([z], lr=.03)
    for _ in tqdm(range(args.iterations), desc='reconstruct', unit='iteration'):
        optimizer.zero_grad()
        for i in torch.arange(len(x), device=args.device).split(8):  # (8,), to bound the memory
            end = sgld(lambda x: energy(x, i), z[i], differentiable=True, **args.settings)
            (end - x[i]).square().sum().backward()
        optimizer.step()
    end = draw(energy, z.detach(), args)[0]  # (N, C, H, W)
    columns = {'image': x, 'z': z.detach(), 'M(z)': end, 'error, black is 0': (end - x).abs() - 1}
    title = f'{args.iterations} steps of Adam through {args.steps} of SGLD; PSNR in dB'
    return save_columns(columns, ['M(z)'], title, args)


def inpaint(model, checkpoint, args):
    """Missing pixels filled in by chains that move only them, --count times from other noises."""
    x, y = given_images(checkpoint, args)  # (N, C, H, W), (N,)
    streams, z = start_noise(len(x) * args.count, checkpoint, args)  # (N * count, C, H, W)
    missing = missing_pixels(streams[::args.count], x, args)  # (N, 1, H, W)
    if args.mask == 'salt-and-pepper':
        z = z[:, :1].sign()  # (N * count, 1, H, W), black and white
    free = missing.repeat_interleave(args.count, 0)  # (N * count, 1, H, W)
    start = torch.where(free, z, x.repeat_interleave(args.count, 0))  # (N * count, C, H, W)
    energy = guided(model, y, args)
    done = draw(lambda x, i: energy(x, i // args.count), start, args, streams, free)[0]
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
    """The pixels of images x (N, C, H, W) that --mask takes away: bool (N, 1, H, W)."""
    count, _, height, width = x.shape
    if args.mask in ('random', 'salt-and-pepper'):
        limit = .674 if args.mask == 'random' else 0.  # 3/4, or 1/2, of N(0, 1) lies below
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
    """Chains without noise start from an image plus Gaussian noise of deviation s and descend
    E(x, y) + w / (2 s^2) |x - noisy|^2, w = --data-weight / step size: up to a constant this is
    -w log p(x | noisy) for the prior exp(-E/w). Total variation is there to compare with."""
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
    done = draw(energy, noisy.clamp(-1, 1), args)[0]  # (S * N, C, H, W)
    smooth = total_variation(noisy, s)  # (S * N, C, H, W)
    columns, parts = {'image': x}, [images.split(len(x)) for images in (noisy, smooth, done)]
    for strength, noisy_x, smooth_x, done_x in zip(args.strengths, *parts):  # (N, C, H, W) each
        columns[f'noise {strength:g}'] = noisy_x.clamp(-1, 1)
        columns[f'TV {strength:g}'] = smooth_x.clamp(-1, 1)
        columns[f'SGLD {strength:g}'] = done_x
    return save_columns(columns, list(columns)[1:], 'Gaussian noise removed; PSNR in dB', args)


def total_variation(noisy, s):
    """Descent on (|u - noisy|^2 + 1.75 s * sum |grad u|) / 2 (Rudin, Osher and Fatemi 1992) for
    noise of deviation s (B,): (B, C, H, W) -> u (B, C, H, W). 1.75 suits validation images best."""
    def objective(u):  # (B, C, H, W) -> (B,)
        across, down = u[..., :-1, :].diff(dim=3), u[..., :-1].diff(dim=2)  # (B, C, H - 1, W - 1)
        length = (across.square() + down.square() + 1e-4).sqrt()  # |grad u|, smooth at 0
        return ((u - noisy).square().sum((1, 2, 3)) + 1.75 * s * length.sum((1, 2, 3))) / 2
    return sgld(objective, noisy, 800, step_size=.004, noise=0., clamp=None)


def given_images(checkpoint, args):
    """Images x (N, C, H, W) in [-1, 1]: those of --start, or --images of the test split, spread
    evenly over it. Also the labels (N,) that chains follow, or None for E(x)."""
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
    """The test split of the training's data set. Raises DataError if the set has changed."""
    flags = checkpoint['args']
    return load_data(args.data or flags['data'], data_root=args.data_root or flags['data_root'],
                     seed=flags['seed'], like=checkpoint['data']).test


def save_columns(columns, scored, title, args, where=None):
    """Draw a row for each of the first eight images and return all rows, (N * columns, C, H, W).
    columns is {name: (N, C, H, W)}; those in `scored` get their PSNR over the pixels `where`."""
    x, scores, captions = columns['image'], {}, []
    for name in scored:
        scores[name] = psnr(columns[name], x, where).tolist()
        print(f'{name:<14}{np.mean(scores[name]):6.2f} dB, mean over {len(x)} images')
    for i in range(min(8, len(x))):
        captions += [f'{scores[name][i]:.1f}' if name in scores else '' for name in columns]
    stacked = torch.stack(list(columns.values()), dim=1)  # (N, columns, C, H, W)
    save_grid(stacked[:8].flatten(0, 1), args.out / f'{args.mode}.png', len(columns), title,
              heads=list(columns), captions=captions)
    return stacked.flatten(0, 1)  # (N * columns, C, H, W)


def psnr(result, x, where=None):
    """PSNR in dB, 10 log10(2^2 / MSE), over the pixels `where` or all: (N, C, H, W) -> (N,)."""
    where = torch.ones_like(x) if where is None else where.expand_as(x).float()
    mse = ((result - x).square() * where).sum((1, 2, 3)) / where.sum((1, 2, 3))  # (N,)
    return 10 * (4 / mse).log10()


def concepts(model, checkpoint, args):
    """The gradients of E(x), and of E(x, y) for --classes or else the three most likely classes.
    A brighter pixel raises the energy where the picture is red and lowers it where it is blue."""
    x, _ = given_images(checkpoint, args)  # (N, C, H, W)
    logits = model.get_logits(x.requires_grad_(True))  # (N, K)
    labels = logits.topk(min(3, logits.shape[1])).indices  # (N, R)
    if args.classes:
        labels = class_labels(args.classes, checkpoint, args).expand(len(x), -1)  # (R,) -> (N, R)
    columns = [None, *labels.T] if checkpoint['class_names'] else [None]  # None or (N,)
    gradients, pictures, captions = [], [x.detach().expand(-1, 3, -1, -1)], [[''] * len(x)]
    for y in columns:
        e = model.energy_of_logits(logits, y)  # (N,)
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
    """An independent classifier, the judge, looks at one sample for each of --images test images,
    of its class, and in the row `more real` at other test images. agreement: the share that it puts
    into the class asked for. *_blurred: after a blur, so that fine grain is not seen as variety."""
    if not checkpoint['class_names']:
        fail(f'--mode evaluate: {args.ckpt} is a plain EBM without classes; evaluate a JEM')
    judge, test = load_judge(checkpoint, args), load_test(checkpoint, args)
    first, second = paired_halves(test.labels, args.images, args.seed)  # (N,) both
    real, y = test.batch(first)  # (N, C, H, W), (N,)
    streams, z = start_noise(len(y), checkpoint, args)
    x = draw(guided(model, y.to(args.device), args), z, args, streams)[0].cpu()  # (N, C, H, W)
    sharp_real, soft_real, _ = judge_features(judge, real, args)  # (N, D) both
    rows = []
    for name, images in [('more real', test.batch(second)[0]), ('samples', x)]:
        sharp, soft, logits = judge_features(judge, images, args)  # (N, D) both, (N, K)
        row = {'agreement': (logits.argmax(1) == y).double().mean().item(),
               'frechet': frechet_distance(sharp, sharp_real)}
        row['distinct'], row['coverage'] = variety(sharp, sharp_real, y)
        row['distinct_blurred'], row['coverage_blurred'] = variety(soft, soft_real, y)
        print(f'{name:9}', *[f' {key} {value:.3f}' for key, value in row.items()])
        rows.append({'images': name, **row, 'n': len(y)})
    write_csv(rows, list(rows[0]), args.out / 'evaluate.csv')
    # The samples came last, so these logits are theirs.
    least = logits.softmax(1)[torch.arange(len(y)), y].argsort()[:64]  # (N, K) -> (N,) -> (64,)
    save_grid(x[least], args.out / 'evaluate.png', 8, 'samples of the lowest p(y|x) of the judge, '
              'and the class asked for', captions=class_names(y[least], checkpoint))
    return x


def load_judge(checkpoint, args):
    """The classifier at --judge, without p(x), on the same data, split in the same way."""
    flags, size = checkpoint['args'], checkpoint['data']['image_shape'][2]
    if not args.judge:
        fail('--mode evaluate: needs --judge judge/best.pt: python train.py --width 48 --out judge '
             f'--data {flags["data"]} --image-size {size} --seed {flags["seed"]} --px-weight 0')
    judge, facts = load_model(args.judge, args.device, args.precision)
    same_data = facts['data'] == checkpoint['data'] and facts['args']['seed'] == flags['seed']
    if facts['args']['px_weight'] or not facts['class_names'] or not same_data:
        fail(f'--judge {args.judge}: name a --px-weight 0 classifier of the same --data and --seed')
    return judge


def paired_halves(labels, count, seed):
    """Positions (N,) and (N,) of two disjoint random sets of at most `count` images with the same
    labels, pair by pair, so that a Frechet distance does not count how often a class comes."""
    order, pairs = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)), []
    for label in labels.unique():
        members = order[labels[order] == label]  # in random order
        pairs.append(members[:len(members) // 2 * 2].view(-1, 2))  # an odd one is left out
    pairs = torch.cat(pairs)  # (P, 2)
    picked = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
    if labels[pairs[picked, 0]].bincount(minlength=1).max() < 2:
        fail(f'--images {count}: no class has two pairs of test images; name more, if it has four')
    return pairs[picked].unbind(1)  # (N, 2) -> (N,) both


def judge_features(judge, x, args):
    """The judge's last features (N, D) of images x (N, C, H, W), those of x after a Gaussian blur
    of 1.5 pixels per 56 of width, (N, D), and the logits (N, K) of x, all on the CPU."""
    soft = blur(x, 1.5 * x.shape[3] / 56)  # (N, C, H, W)
    sharp, soft = [torch.cat([judge.features(part.to(args.device)) for part in images.split(256)])
                   for images in (x, soft)]  # (N, D) both
    return sharp.cpu().double(), soft.cpu().double(), judge.head(sharp).cpu()  # mps lacks float64


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D) with
    covariances C (Heusel et al. 2017)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (D, D)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt()  # (D,), of its eigenvalues
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()
    return (distance - 2 * root.sum()).item()


def variety(features, real, y, k=5):
    """Two shares, from distances within the classes y (N,) of features and real, (N, D) both.
    distinct: samples whose nearest other sample is farther than that of the closest 5 % of real
    images. coverage (Naeem et al. 2020): real images with a sample at most as far as their k-th
    nearest other real image, or the last if there are fewer. Classes of one do not count."""
    def distances(a, b):  # (N, D) both -> (N, N), inf between classes, 0 for equal features
        distance = torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')
        return distance.masked_fill(y[:, None] != y, torch.inf)
    nearest = distances(real, real).fill_diagonal_(torch.inf).sort(1).values[:, :k]  # (N, k)
    radius = nearest.nan_to_num(posinf=0.).amax(1)  # (N,)
    covered = distances(real, features).amin(1) <= radius  # (N,)
    others = nearest[:, 0].isfinite()  # (N,), whether the class has other images
    apart = distances(features, features).fill_diagonal_(torch.inf).amin(1)  # (N,)
    distinct = apart > nearest[others, 0].quantile(.05)  # (N,)
    return [share[others].double().mean().item() for share in (distinct, covered)]


Mode = namedtuple('Mode', 'function kind default_steps default_images flags')
CHAIN, TEST = ['steps', 'step_size', 'guidance', 'gif'], ['images', 'data', 'data_root']
FROM_NOISE = [*CHAIN, 'noise', 'classes', 'count']
FROM_IMAGES = [*CHAIN, *TEST, 'start', 'classes']
MODES = {
    'samples': Mode(samples, 'sampling', None, None, FROM_NOISE),
    'chain': Mode(chain, 'training', 256, None, FROM_NOISE),
    'interpolate': Mode(interpolate, 'descent', 256, None, [*CHAIN, 'classes', 'count']),
    'reconstruct': Mode(reconstruct, 'descent', 32, 8, [*FROM_IMAGES, 'iterations']),
    'inpaint': Mode(inpaint, 'training', 48, 8, [*FROM_IMAGES, 'noise', 'count', 'mask']),
    'denoise': Mode(denoise, 'descent', 24, 8, [*FROM_IMAGES, 'strengths', 'data_weight']),
    'compose': Mode(compose, 'sampling', None, None, [*FROM_NOISE, 'ckpt2', 'weight']),
    'concepts': Mode(concepts, 'descent', None, 8, [*TEST, 'start', 'classes']),
    'evaluate': Mode(evaluate, 'sampling', None, 500, [*CHAIN, *TEST, 'noise', 'judge']),
}
MASKS = ['left', 'centre', 'random', 'salt-and-pepper']


def parse_args(argv=None):
    parser = CommandLine(__doc__)
    count, weight, positive = number(int, 1, 10**5), number(float, 0, 1e9), number(float, 1e-9, 1e9)
    flag = parser.add_argument
    flag('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    flag('--mode', choices=list(MODES), default='samples', help='what to draw, see above')
    flag('--classes', nargs='+', metavar='CLASS', help='chains follow E(x, y) of these classes')
    flag('--count', type=count, help='samples per class, fillings, rows; default: 8, or 1 row each')
    flag('--out', type=Path, default='.', help='folder to write into')
    flag = parser.add_argument_group('chains').add_argument
    flag('--steps', type=count, help='default: 24 to 256, see MODES and chain_settings')
    flag('--step-size', type=positive, help='default: that of the training')
    flag('--noise', type=weight, help='standard deviation in a step; default: see chain_settings')
    flag('--guidance', type=weight, default=1., help='1 is E(x, y); more: clearer members')
    flag('--gif', action='store_true', help='write the chains as a film, MODE.gif')
    flag = parser.add_argument_group('images and single modes').add_argument
    flag('--images', type=count, help='number of test images; default: 8, in evaluate 500')
    flag('--start', type=Path, metavar='FILE|FOLDER', help='your own images instead')
    flag('--data', help='where the data of the checkpoint are now')
    flag('--data-root', type=Path, help='where downloads and letterpress are now')
    flag('--iterations', type=count, default=60, help='reconstruct: steps of Adam')
    flag('--mask', default='left', help=f'inpaint: {", ".join(MASKS)}, or an image, white = holes')
    flag('--strengths', type=positive, nargs='+', default=[.2, .4, .8], help='denoise: noise added')
    flag('--data-weight', type=weight, default=.0003, help='denoise: pull to the noisy image')
    flag('--ckpt2', type=Path, help='compose: checkpoint of the second expert')
    flag('--weight', type=weight, default=.2, help='compose: w of the negation E1 - w E2')
    flag('--judge', type=Path, metavar='CKPT', help='evaluate: the independent classifier')
    args = parser.parse_args(argv)
    for name in [name for mode in MODES.values() for name in mode.flags]:
        if name not in MODES[args.mode].flags and getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name.replace("_", "-")}: mode {args.mode} does not use it')
    if args.mode == 'denoise' and args.data_weight > min(args.strengths) ** 2:
        parser.error('--data-weight: must be at most the square of each of --strengths')
    if args.mask not in MASKS and not os.path.isfile(args.mask):
        parser.error(f'--mask {args.mask}: no such image, and none of {", ".join(MASKS)}')
    if args.start and (args.images or args.data):
        parser.error('--start: all of its images are used; leave out --images and --data')
    if args.start and args.start.resolve().with_suffix('') == (args.out / args.mode).resolve():
        parser.error(f'--start {args.start}: would be overwritten; name another --out')
    args.count = args.count or (1 if args.classes and args.mode in ('chain', 'interpolate') else 8)
    args.images = args.images or MODES[args.mode].default_images
    return args


def main(argv=None):
    with user_mistakes(DataError):
        args = parse_args(argv)
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        check_apart(args.out, args.data or checkpoint['args']['data'], args.start)
        mode = MODES[args.mode]
        args.settings = chain_settings(checkpoint['sampler'], mode.kind,
                                       args.steps or mode.default_steps, args.step_size, args.noise)
        args.steps = args.settings['steps']
        x = mode.function(model, checkpoint, args)  # (N, C, H, W)
        with atomic_write(args.out / f'{args.mode}.npy') as file:
            np.save(file, x.cpu().numpy())
    print(f'{args.out / args.mode}.png, {args.out / args.mode}.npy')


if __name__ == '__main__':
    main()
