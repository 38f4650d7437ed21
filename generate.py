"""Draw images from a trained energy: short-run SGLD is the generator x = M(z, xi) of noise z (course task 3.5).

    python generate.py --ckpt best.pt                              64 samples, of classes as frequent as in the data
    python generate.py --ckpt best.pt --classes a b c              eight of p(x|y) for each class
    python generate.py --ckpt best.pt --mode chain --classes a b   what the chain does on its way from noise, with energies
    python generate.py --ckpt best.pt --mode inpaint --mask left   fill in the left halves of test images
    python generate.py --ckpt best.pt --mode concepts --start FILE the gradient of the energy at an image of yours

Every mode is the one sampler, `draw`, with another start, another energy or a mask:

    samples      from noise                         inpaint   only the missing pixels of an image move
    chain        the states on the way from noise   denoise   energy and squared distance to a noisy image, added up
    interpolate  from mixtures of two noises        compose   energies of two experts: product, mixture, negation
    reconstruct  the noise that becomes an image    concepts  no chain: dE/dx, what the energy looks at
                                                    evaluate  samples before an independent classifier

Each writes one picture, MODE.png, and its images as MODE.npy, float32 (N, C, H, W) in [-1, 1], into --out. Image i has a
random stream of its own, seeded by --seed and i, so it is the same image however many are drawn beside it.
"""
import os
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from data import (DataError, atomic_write, check_apart, load_data, load_images, save_gif, save_grid, to_float,
                  write_csv)
from model import CommandLine, energy_of_logits, fail, load_model, number, user_mistakes
from sampler import chain_settings, prior, randn, sgld

CHUNK = 32  # chains that run together, to bound memory; always as many, since convolutions of fewer may round differently

# Last states x (N, C, H, W), the energies at steps 0 ... K, curve (K + 1, N), and the states {step: (N, C, H, W)} asked for.
Chains = namedtuple('Chains', 'x curve states')


# --- the one sampler ----------------------------------------------------------------------------------------------------

def draw(energy, start, streams, checkpoint, args, kind='sampling', given=(), free=None, keep=()):
    """Run `args.steps` steps of SGLD from every start, CHUNK chains at a time, with a progress bar; returns `Chains`.

    Args:
        energy: callable (x, *given) -> (B,); `given` are tensors (N, ...) of which it gets the rows of the chunk.
        start: (N, C, H, W).
        streams: a torch.Generator for each image.
        free: bool (N, 1, H, W), the pixels that move; None is all.
        kind: of `chain_settings`, which decides step and noise.
        keep: the steps whose states are wanted.
    """
    settings = chain_settings(checkpoint['sampler'], kind, args.steps, args.step_size, args.noise)
    count, frames = len(start), {round(step) for step in np.linspace(0, args.steps, 60)} if args.gif else set()
    free = torch.ones_like(start, dtype=torch.bool) if free is None else free
    streams = streams + [torch.Generator(args.device)] * (-count % CHUNK)
    tensors = [pad(tensor) for tensor in (start, free, *given)]
    with tqdm(total=args.steps * (len(streams) // CHUNK), desc=args.mode, unit='step') as bar:
        parts = [draw_chunk(energy, *(tensor[at:at + CHUNK] for tensor in tensors), keep=frames | {*keep},
                            bar=bar, generator=streams[at:at + CHUNK], **settings) for at in range(0, count, CHUNK)]
    xs, curves, states = zip(*parts)
    states = {step: torch.cat([part[step] for part in states])[:count] for step in states[0]}
    if args.gif:
        save_gif([states[step] for step in sorted(frames)], args.out / f'{args.mode}.gif')
    return Chains(torch.cat(xs)[:count], torch.cat(curves, dim=1)[:, :count], states)


def draw_chunk(energy, start, free, *given, keep, bar, steps, **settings):
    """The chains of one chunk: last states (B, C, H, W), energies (steps + 1, B), and the states at the steps in `keep`."""
    curve, states = [], {}

    def watch(k, x, e):
        bar.update(k > 0)
        curve.append(e)
        if k in keep:
            states[k] = x

    def energy_of(x):
        return energy(x, *given)

    x = sgld(energy_of, start, steps, callback=watch, free=free, **settings)
    watch(steps, x, energy_of(x))
    return x, torch.stack(curve), states  # K + 1 times (B,) -> (K + 1, B)


def pad(tensor):
    """Repeat the last row until (N, ...) fills its chunks."""
    return torch.cat([tensor, tensor[-1:].expand(-len(tensor) % CHUNK, *tensor.shape[1:])])


def start_noise(count, checkpoint, args):
    """A random stream for each of `count` images and, drawn from it, its noise z ~ N(0, 0.01), (count, C, H, W)."""
    # SeedSequence mixes the two numbers well; torch's generator on the CPU would look at the low 32 bits of a seed only.
    seeds = [int(np.random.SeedSequence([args.seed, i]).generate_state(1)[0]) for i in range(count)]
    streams = [torch.Generator(args.device).manual_seed(seed) for seed in seeds]
    return streams, prior('gaussian', (count, *image_shape(checkpoint)), streams, args.device)


def image_shape(checkpoint):
    return tuple(checkpoint['data']['image_shape'])  # (C, H, W)


# --- energies -----------------------------------------------------------------------------------------------------------

def guided(model, args):
    """The energy of a model: E(x), or where labels are given that of classifier-free guidance (Ho and Salimans 2022),

        E(x) + w (E(x, y) - E(x)) = E(x) - w log p(y|x),

    which is E(x, y) for w = 1, and asks for ever clearer members of the class for w > 1.
    """
    def energy(x, y=None):
        if y is None or args.guidance == 1:
            return model.energy(x, y)
        return (1 - args.guidance) * model.energy(x) + args.guidance * model.energy(x, y)
    return energy


# Energies (B,) of two experts composed (Du et al. 2020, "Compositional visual generation with energy based models").
# E + E is E at half the temperature.
COMPOSITIONS = {'1': lambda e1, e2, w: e1,
                '2': lambda e1, e2, w: e2,
                '1 and 2': lambda e1, e2, w: e1 + e2,  # product of experts
                '1 or 2': lambda e1, e2, w: -torch.logaddexp(-e1, -e2),  # mixture of experts
                '1 not 2': lambda e1, e2, w: e1 - w * e2}  # negation


def composed(first, second, weight):
    """Energy (x, kind) -> (B,): of image i under the composition number kind[i] of two energies."""
    def energy(x, kind):
        e1, e2 = first(x), second(x)  # (B,) both
        e = torch.stack([compose_two(e1, e2, weight) for compose_two in COMPOSITIONS.values()], dim=1)  # (B, 5)
        return e.gather(1, kind[:, None]).squeeze(1)  # (B, 5) -> (B, 1) -> (B,)
    return energy


def expert(model, checkpoint, name, args):
    """E(x), or E(x, y) of the class `name`, as a function of x alone."""
    if name is None:
        return model.energy
    y, energy = class_labels([name], checkpoint, args.device), guided(model, args)  # (1,)
    return lambda x: energy(x, y.expand(len(x)))  # (1,) -> (B,)


# --- modes: each draws one picture and returns its images ----------------------------------------------------------------

def samples(model, checkpoint, args):
    """A grid of samples: a row for each of `--classes`, or `--count` rows of eight of any."""
    given, streams, z = start_samples(8 * args.count, args.count, checkpoint, args)
    x = draw(guided(model, args), z, streams, checkpoint, args, given=given).x
    save_grid(x, args.out / 'samples.png', args.count if args.classes else 8, f'{args.steps} steps of SGLD from noise',
              rows=class_names(given[0][::args.count], checkpoint) if args.classes else None)
    return x


def chain(model, checkpoint, args):
    """The states of a few chains at steps 0, 1, 2, 4, ... K with the energy below each, a chain a row, and the mean energy
    over the steps (course task 3.5)."""
    given, streams, z = start_samples(args.count, 1, checkpoint, args)
    shown = sorted({0, *(2 ** i for i in range(args.steps.bit_length())), args.steps})
    chains = draw(guided(model, args), z, streams, checkpoint, args, 'training', given, keep=shown)
    x = torch.stack([chains.states[k] for k in shown], dim=1).flatten(0, 1)  # (N, S, ...) -> (N * S, ...)
    e = chains.curve[shown].T.flatten()  # (K + 1, N) -> (S, N) -> (N * S,)
    save_grid(x, args.out / 'chain.png', len(shown), 'SGLD from noise: step, and the energy below each state',
              rows=class_names(given[0], checkpoint) if given else None, heads=shown,
              captions=[f'{value:.2f}' for value in e.tolist()],
              curve=('mean energy', chains.curve.mean(1).cpu()))  # (K + 1, N) -> (K + 1,)
    return x


def interpolate(model, checkpoint, args):
    """Samples between two samples: chains without noise from z = sqrt(rho) z1 + sqrt(1 - rho) z2, which is N(0, 0.01) for
    every rho (Nijkamp et al. 2019, "Learning non-convergent non-persistent short-run MCMC", section 5)."""
    given, streams, z = start_samples(2 * args.count, 2, checkpoint, args)
    given, streams = [y[::2] for y in given], streams[::2]  # (2P,) -> (P,): both ends of a path are of one class
    rho = torch.linspace(1, 0, 9, device=args.device).view(-1, 1, 1, 1)  # (9, 1, 1, 1)
    z = mix_noise(z[0::2, None], z[1::2, None], rho).flatten(0, 1)  # (P, 1, C, H, W) -> (P, 9, C, H, W) -> (P * 9, C, H, W)
    x = draw(guided(model, args), z, streams * 9, checkpoint, args, 'descent', [y.repeat_interleave(9) for y in given]).x
    save_grid(x, args.out / 'interpolate.png', 9, 'from one sample (rho = 1) to another (rho = 0), without noise',
              rows=class_names(given[0], checkpoint) if given else None, heads=[f'{r:.3g}' for r in rho.flatten().tolist()])
    return x


def mix_noise(z1, z2, rho):
    return rho.sqrt() * z1 + (1 - rho).sqrt() * z2  # of the same variance as z1 and z2


def reconstruct(model, checkpoint, args):
    """Find the noise that the chain turns into a given image: Adam on |M(z) - x|^2 through all the steps of a chain without
    noise (Nijkamp et al. 2019, section 5). The graph of a step is built when its gradient is due: memory holds one."""
    x, given = given_images(checkpoint, args)  # (N, C, H, W)
    streams, z = start_noise(len(x), checkpoint, args)
    energy, settings = guided(model, args), chain_settings(checkpoint['sampler'], 'descent', 1, args.step_size)
    found = z.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([found], lr=.03)
    for _ in tqdm(range(args.iterations), desc='reconstruct', unit='iteration'):
        optimizer.zero_grad()
        for part in (slice(at, at + CHUNK) for at in range(0, len(x), CHUNK)):
            step = partial(sgld, lambda x: energy(x, *(y[part] for y in given)), differentiable=True, **settings)
            state = found[part]
            for _ in range(args.steps):
                state = recompute(step, state, use_reentrant=True)  # the kind that builds no graph on the way forward
            (state - x[part]).square().sum().backward()
        optimizer.step()
    found = found.detach()
    start, end = draw(energy, torch.cat([z, found]), streams * 2, checkpoint, args, 'descent',
                      [y.repeat(2) for y in given]).x.chunk(2)  # (2N, C, H, W) -> (N, C, H, W) each
    columns = {'image': x, 'z found': found, 'M(first z)': start, 'M(z found)': end, 'error': (end - x).abs() - 1}
    title = f'{args.iterations} steps of Adam through {args.steps} of SGLD; PSNR in dB'
    return save_columns(columns, ['M(first z)', 'M(z found)'], title, args)


def inpaint(model, checkpoint, args):
    """Fill in missing pixels by SGLD on them alone, `--count` times from different noises; the known ones stay as they are.

    Baselines: the mean colour of the known pixels, and the plain noise that the chains start from."""
    x, given = given_images(checkpoint, args)  # (N, C, H, W)
    streams, z = start_noise(len(x) * args.count, checkpoint, args)
    missing = missing_pixels(streams[::args.count], checkpoint, args)  # (N, 1, H, W)
    z = z[:, :1].sign() if args.mask == 'salt-and-pepper' else z  # (N * count, 1 or C, H, W)
    free = missing.repeat_interleave(args.count, 0)  # (N, 1, H, W) -> (N * count, 1, H, W)
    start = torch.where(free, z, x.repeat_interleave(args.count, 0))  # (N * count, C, H, W)
    given = [label.repeat_interleave(args.count) for label in given]  # (N,) -> (N * count,)
    done = draw(guided(model, args), start, streams, checkpoint, args, 'training', given, free).x  # (N * count, C, H, W)
    done = done.unflatten(0, (-1, args.count))  # (N, count, C, H, W)

    known = x * ~missing
    mean = known.sum((2, 3), keepdim=True) / (~missing).sum((2, 3), keepdim=True).clamp_min(1)  # (N, C, 1, 1)
    completions = {f'SGLD {i + 1}': done[:, i] for i in range(args.count)}  # (N, C, H, W) each
    columns = {'image': x, 'noise': start[::args.count], 'mean fill': torch.where(missing, mean, x), **completions,
               'SGLD mean': torch.where(missing, done.mean(1), x)}  # a mean of equal numbers may round
    title = f'missing pixels ({args.mask}) filled in; PSNR on those, in dB'
    return save_columns(columns, [name for name in columns if name != 'image'], title, args, missing)


def missing_pixels(streams, checkpoint, args):
    """What `--mask` takes away from images with these random streams: bool (N, 1, H, W)."""
    size = checkpoint['data']['image_shape'][-1]
    at = torch.arange(size, device=args.device)
    inner = (at >= size // 4) & (at < size - size // 4)  # (W,)
    if args.mask in ('random', 'salt-and-pepper'):  # three quarters of N(0, 1) lie below .674
        limit = .674 if args.mask == 'random' else 0.
        return randn((len(streams), 1, size, size), streams, args.device) < limit
    if args.mask == 'left':
        missing = (at < size // 2).expand(size, -1)  # (W,) -> (H, W)
    elif args.mask == 'centre':
        missing = inner[:, None] & inner  # (H, 1) and (W,) -> (H, W)
    else:
        missing = load_images(args.mask, size, 1)[0][0, 0].to(args.device) > 127  # (1, 1, H, W) -> (H, W)
        if not missing.any():
            fail(f'--mask {args.mask}: all of one colour; make it white where pixels are missing and black where they are not')
    return missing.expand(len(streams), 1, -1, -1)  # (H, W) -> (N, 1, H, W)


def denoise(model, checkpoint, args):
    """Take Gaussian noise of known strengths s from images: chains without noise from the noisy image y along the sum of

        E(x) + w / (2 s^2) |x - y|^2  =  w [E(x) / w + |x - y|^2 / (2 s^2)]

    by Bayes' rule the energy of p(x|y) for a prior at temperature w. w is --data-weight over the step size, so each step
    pulls x back by --data-weight / s^2 of its distance to y, whatever the step size.

    Baselines: the noisy image as it is, and total variation, which needs no training."""
    x, given = given_images(checkpoint, args)  # (N, C, H, W)
    streams, _ = start_noise(len(x) * len(args.strengths), checkpoint, args)
    s = torch.tensor(args.strengths, device=args.device).repeat_interleave(len(x)).view(-1, 1, 1, 1)  # (S * N, 1, 1, 1)
    y = x.repeat(len(args.strengths), 1, 1, 1)  # (S * N, C, H, W)
    y = y + s * randn(y.shape, streams, args.device)
    step_size = chain_settings(checkpoint['sampler'], 'descent', 1, args.step_size)['step_size']
    weight = args.data_weight / step_size / s.flatten() ** 2  # (S * N,)

    def posterior(x, y, weight, *label):
        return guided(model, args)(x, *label) + weight / 2 * (x - y).square().sum((1, 2, 3))

    given = [y, weight, *(label.repeat(len(args.strengths)) for label in given)]  # (S * N, ...) each
    done = draw(posterior, y.clamp(-1, 1), streams, checkpoint, args, 'descent', given).x  # (S * N, C, H, W)
    columns = {'image': x}
    for strength, *parts in zip(args.strengths, *(part.split(len(x)) for part in (y, total_variation(y, s), done))):
        columns |= {f'{name} {strength:g}': part.clamp(-1, 1) for name, part in zip(('noise', 'TV', 'SGLD'), parts)}
    return save_columns(columns, list(columns)[1:], 'Gaussian noise taken away; PSNR in dB', args)


def total_variation(y, s):
    """Denoise by gradient descent on (|u - y|^2 + 1.75 s * sum |grad u|) / 2 (Rudin, Osher and Fatemi 1992), (B, C, H, W). On
    validation images weights of 2 s for GLYPHS and 1.5 s for MNIST were best, by up to .25 dB."""
    def objective(u):  # (B, C, H, W) -> (B,)
        across, down = u[..., :-1, 1:] - u[..., :-1, :-1], u[..., 1:, :-1] - u[..., :-1, :-1]  # (B, C, H - 1, W - 1)
        length = (across.square() + down.square() + 1e-4).sqrt()
        return ((u - y).square().sum((1, 2, 3)) + 1.75 * s.flatten() * length.sum((1, 2, 3))) / 2

    return sgld(objective, y, 800, step_size=.004, noise=0., clamp=None)  # the same descent, another energy


def compose(model, checkpoint, args):
    """Two experts, alone and composed, from the same noises: E(x, y) of two classes, or the energies of two checkpoints."""
    names = args.classes or ([None, None] if args.ckpt2 else [])
    if len(names) != 2:
        fail('--mode compose: name two classes with --classes, or a second checkpoint with --ckpt2, or both')
    others = load_model(args.ckpt2, args.device, args.precision) if args.ckpt2 else (model, checkpoint)
    if image_shape(others[1]) != image_shape(checkpoint):
        fail(f'--ckpt2 {args.ckpt2}: images {image_shape(others[1])}, but --ckpt {image_shape(checkpoint)}; name one alike')
    experts = [expert(*pair, name, args) for pair, name in zip([(model, checkpoint), others], names)]

    kind = torch.arange(len(COMPOSITIONS), device=args.device).repeat_interleave(args.count)  # (5 * count,)
    starts = [start_noise(args.count, checkpoint, args) for _ in COMPOSITIONS]  # the same five times
    streams, z = [stream for part, _ in starts for stream in part], torch.cat([z for _, z in starts])  # (5 * count, C, H, W)
    x = draw(composed(*experts, args.weight), z, streams, checkpoint, args, given=(kind,)).x
    texts = [f'{e1:.1f} {e2:.1f}' for e1, e2 in zip(*(energy(x).tolist() for energy in experts))]
    runs = [path.resolve().parent.name for path in (args.ckpt, args.ckpt2 or args.ckpt)]
    rows = [*(f'{i}: {name or run}' for i, (name, run) in enumerate(zip(names, runs), 1)), *list(COMPOSITIONS)[2:]]
    save_grid(x, args.out / 'compose.png', args.count, 'E1 and E2 below each image', rows=rows, captions=texts)
    return x


def concepts(model, checkpoint, args):
    """What each energy looks at: the gradients of E(x) and of E(x, y) for the three most likely classes, or `--classes`.
    Red: brighter there is less likely; blue: brighter is more likely. Returns the gradients, (N * columns, C, H, W)."""
    x = given_images(checkpoint, args)[0].requires_grad_(True)  # (N, C, H, W)
    logits = model.get_logits(x)  # (N, K)
    y = logits.topk(min(3, logits.shape[1])).indices  # (N, 3)
    if args.classes:
        y = class_labels(args.classes, checkpoint, args.device).expand(len(x), -1)  # (R,) -> (N, R)
    y = y if checkpoint['class_names'] else y[:, :0]
    e = torch.stack([energy_of_logits(logits), *(energy_of_logits(logits, label) for label in y.T)], dim=1)  # (N, 1 + R)
    gradients = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in e.T]  # (N, C, H, W) each
    x = x.detach()
    shown = torch.stack([x.expand(-1, 3, -1, -1), *(heat_map(x, g) for g in gradients)], dim=1)  # (N, 2 + R, 3, H, W)
    texts = [f'{name}: {value:.2f}' if name else '' for labels, row in zip(y, e.tolist())
             for name, value in zip(['', 'E(x)', *class_names(labels, checkpoint)], [0., *row])]
    heads = ['image', 'of E(x)', *['of E(x, y)'] * (e.shape[1] - 1)]
    save_grid(shown.flatten(0, 1), args.out / 'concepts.png', len(heads), 'dE/dx: red, a brighter pixel raises the energy',
              heads=heads, captions=texts)
    return torch.stack(gradients, dim=1).flatten(0, 1)  # (N, 1 + R, C, H, W) -> (N * (1 + R), C, H, W)


def heat_map(x, gradient):
    """Positive gradients in red and negative ones in blue over pale images: (N, C, H, W) both -> (N, 3, H, W)."""
    heat = gradient.sum(1, keepdim=True)  # (N, C, H, W) -> (N, 1, H, W)
    heat = (heat / heat.abs().flatten(1).quantile(.99, dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)).clamp(-1, 1)
    colour = torch.cat([heat.sign(), -torch.ones_like(heat), -heat.sign()], dim=1)  # (N, 3, H, W), red or blue
    return (.7 + .3 * x.mean(1, keepdim=True)).lerp(colour, heat.abs())


def evaluate(model, checkpoint, args):
    """Let an independent classifier, `--judge`, compare samples with as many test images of the same classes: how often it
    sees the class that was asked for, the Frechet distance of the features, and the share of distinct samples. Beside them
    the same of further test images: what real ones reach. evaluate.png begins with the samples it likes least."""
    if not checkpoint['class_names']:
        fail(f'--mode evaluate: {args.ckpt} is a plain EBM, without classes that a judge could agree with; evaluate a JEM')
    judge = load_judge(checkpoint, args)
    test = trained_data(checkpoint, args).test
    first, second = paired_halves(test.labels, args.images, args.seed)  # (N,) both
    (real, y), (other, _) = (test.batch(index) for index in (first, second))
    streams, z = start_noise(len(y), checkpoint, args)
    x = draw(guided(model, args), z, streams, checkpoint, args, given=(y.to(args.device),)).x  # (N, C, H, W)

    seen = {name: judge_features(judge, images.to(args.device))
            for name, images in (('real', real), ('samples', x), ('more real', other))}
    features_real = seen['real'][0]
    distances = nearest(features_real, y)  # (N,)
    alike = distances.masked_fill(distances.isinf(), torch.nan).nanquantile(.05).nan_to_num(0.)  # no farther, they count as one
    rows = []
    for name in ('samples', 'more real'):
        features, logits = seen[name]
        rows.append({'images': name, 'agreement': (logits.argmax(1) == y).float().mean().item(),
                     'frechet': frechet_distance(features, features_real),
                     'distinct': (nearest(features, y) > alike).float().mean().item(), 'n': len(y)})
        print(f'{name:>9}: ' + '  '.join(f'{key} {value:.3f}' for key, value in list(rows[-1].items())[1:4]))
    write_csv(rows, list(rows[0]), args.out / 'evaluate.csv')
    confidence = seen['samples'][1].softmax(1).gather(1, y[:, None]).squeeze(1)  # (N, K) -> (N,)
    order = confidence.argsort()[:64]
    names = class_names(y[order], checkpoint)
    save_grid(x.cpu()[order], args.out / 'evaluate.png', 8,
              'the samples that the judge likes least: class asked for, its p(y|x)',
              captions=[f'{name}: {p:.2f}' for name, p in zip(names, confidence[order].tolist())])
    return x


def paired_halves(labels, count, seed):
    """Positions of two disjoint random sets of at most `count` images each with the very same labels (N,), pair by pair: a
    Frechet distance would count another mixture of classes as well."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, at random within a class
    sizes = labels.bincount().tolist()
    pairs = torch.cat([part[:len(part) // 2 * 2].view(-1, 2) for part in order.split(sizes)])  # (P, 2), an odd one left out
    if len(pairs) < 2 or count < 2:
        fail('--images: evaluate compares at least two samples with two pairs of test images of one class')
    picked = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
    return pairs[picked].unbind(1)  # (N,) both


def load_judge(checkpoint, args):
    """The classifier at `--judge`, checked for knowing the same classes from the same split of the same data."""
    if not args.judge:
        fail('--mode evaluate: name an independent classifier with --judge; python train.py --px-weight 0 --width 48 on the '
             'same data makes one')
    judge, facts = load_model(args.judge, args.device, args.precision)
    if args.judge.samefile(args.ckpt):
        fail(f'--judge {args.judge}: is --ckpt itself, and samples are not judged by the model that drew them; name another')
    if facts['class_names'] != checkpoint['class_names'] or facts['data'] != checkpoint['data']:
        fail(f'--judge {args.judge}: not trained on the data of {args.ckpt}; train it with the same --data and --seed '
             f'{checkpoint["args"]["seed"]}')
    return judge


def judge_features(judge, x):
    """Last features (N, D), as float64, and logits (N, K) of images (N, C, H, W)."""
    features = torch.cat([judge.features(part) for part in x.split(256)])  # (N, D)
    return features.cpu().double(), judge.head(features).cpu()  # (N, D), (N, K); mps has no float64


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D) (Heusel et al. 2017)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()  # (D, D)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()  # the trace of the root
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def nearest(features, labels):
    """Distance from each image to the nearest other one of its class, (N,); infinite where there is none."""
    distance = torch.cdist(features, features)  # (N, N)
    strange = (labels[:, None] != labels).fill_diagonal_(True)  # (N, N)
    return distance.masked_fill(strange, torch.inf).amin(1)


# Mode: its function, its default number of SGLD steps, that of test images, and the flags that not every mode has a use for.
CHAINS, IMAGES = ['classes', 'guidance', 'steps', 'step_size', 'gif'], ['start', 'images']
MODES = {'samples': (samples, 256, 0, [*CHAINS, 'noise', 'count']),
         'chain': (chain, 256, 0, [*CHAINS, 'noise', 'count']),
         'interpolate': (interpolate, 256, 0, [*CHAINS, 'count']),
         'reconstruct': (reconstruct, 32, 8, [*CHAINS, *IMAGES, 'iterations']),
         'inpaint': (inpaint, 48, 8, [*CHAINS, *IMAGES, 'noise', 'count', 'mask']),
         'denoise': (denoise, 24, 8, [*CHAINS, *IMAGES, 'strengths', 'data_weight']),
         'compose': (compose, 256, 0, [*CHAINS, 'noise', 'count', 'ckpt2', 'weight']),
         'concepts': (concepts, 0, 8, [*IMAGES, 'classes']),
         'evaluate': (evaluate, 256, 500, [*CHAINS[1:], 'noise', 'images', 'judge'])}
MASKS = ['left', 'centre', 'random', 'salt-and-pepper']


# --- what the modes share -------------------------------------------------------------------------------------------------

def start_samples(count, per_class, checkpoint, args):
    """Labels as a tuple of one tensor (N,), streams and noises of `per_class` images for each of `--classes`, or else of
    `count` images with labels as frequent as in the training data, so that x ~ p(x|y) is x ~ p(x). No labels, an empty
    tuple, for a model whose chains follow E(x)."""
    if args.classes:
        y = class_labels(args.classes, checkpoint, args.device).repeat_interleave(per_class)  # (R,) -> (R * per_class,)
        return (y,), *start_noise(len(y), checkpoint, args)
    streams, z = start_noise(count, checkpoint, args)
    if not checkpoint['args']['conditional']:
        return (), streams, z
    shares = torch.tensor(checkpoint['data']['class_counts']['train'], dtype=torch.float, device=args.device)  # (K,)
    return (torch.cat([shares.multinomial(1, generator=stream) for stream in streams]),), streams, z


def trained_data(checkpoint, args):
    """The data that the checkpoint was trained on, from where they lie now."""
    flags = checkpoint['args']
    return load_data(args.data or flags['data'], None, args.data_root or flags['data_root'], flags['seed'], checkpoint['data'])


def given_images(checkpoint, args):
    """Images to work on, (N, C, H, W) in [-1, 1]: those of --start, or --images of the test split, evenly taken. With them,
    where chains follow E(x, y), a tuple of their labels (N,): the one of --classes, else those of the test split."""
    channels, size, _ = image_shape(checkpoint)
    told = class_labels(args.classes, checkpoint, args.device) if args.classes and args.mode != 'concepts' else None
    if told is not None and len(told) > 1:
        fail(f'--classes: the mode {args.mode} takes one, the class of all images')
    if args.start:
        x, y = to_float(load_images(args.start, size, channels)[0].to(args.device)), told
    else:
        test = trained_data(checkpoint, args).test
        index = torch.linspace(0, len(test) - 1, min(args.images, len(test))).long()
        x, y = test.to(args.device).batch(index.to(args.device))
        y = told if told is not None else y if checkpoint['args']['conditional'] else None
    return x, () if y is None else (y.expand(len(x)),)


def save_columns(columns, scored, title, args, where=None):
    """Draw up to eight images, each with what became of it, print PSNRs, and return all, (N * columns, C, H, W). `columns`
    is {name: (N, C, H, W)}, the images first; those in `scored` are compared with them over the pixels `where`."""
    x = next(iter(columns.values()))
    scores = {name: psnr(columns[name], x, where) for name in scored}  # (N,) each
    for name, score in scores.items():
        print(f'{name:<14}{score.mean():6.2f} dB, mean over {len(x)} images')
    stacked = torch.stack(list(columns.values()), dim=1)  # (N, columns, C, H, W)
    captions = [f'{scores[name][i]:.1f}' if name in scores else '' for i in range(min(8, len(x))) for name in columns]
    save_grid(stacked[:8].flatten(0, 1), args.out / f'{args.mode}.png', len(columns), title, heads=list(columns),
              captions=captions)
    return stacked.flatten(0, 1)


def psnr(y, x, where=None):
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over the pixels `where` (N, 1, H, W): -> (N,)."""
    where = torch.ones_like(x) if where is None else where.expand_as(x).float()
    mse = ((y - x).square() * where).sum((1, 2, 3)) / where.sum((1, 2, 3))  # (N, C, H, W) -> (N,)
    return 10 * (4 / mse).log10()  # the peak is 2


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


def class_names(labels, checkpoint):
    return [checkpoint['class_names'][label] for label in labels.tolist()]


# --- command line -------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    parser.add_argument('--mode', choices=list(MODES), default='samples', help='what to draw, see above')
    parser.add_argument('--classes', nargs='+', metavar='CLASS', help='names or numbers of classes, for E(x, y); '
                        'without them those of the data, as frequent')
    parser.add_argument('--guidance', type=number(float, 0), default=1., help='w of E(x) + w (E(x, y) - E(x)): 0 '
                        'tells the chains of no class')
    parser.add_argument('--count', type=number(int, 1, 10_000), default=8,
                        help='samples a class, rows of eight, chains, or completions')
    parser.add_argument('--steps', type=number(int, 1), help='SGLD steps; the default is that of the mode: '
                        + ', '.join(f'{name} {steps}' for name, (_, steps, *_) in MODES.items() if steps))
    parser.add_argument('--step-size', type=number(float, 1e-9), help='instead of the checkpoint\'s own')
    parser.add_argument('--noise', type=number(float, 0), help='of every step, e.g. .02 as in training; by default the noise of '
                       'chains from noise falls from .5 to 0 (annealing)')
    parser.add_argument('--gif', action='store_true', help='write the chains as a film, too: MODE.gif')
    parser.add_argument('--out', type=Path, default='.', help='folder to write into')

    group = parser.add_argument_group('images to work on')
    group.add_argument('--start', type=Path, metavar='FILE|FOLDER', help='your own instead of test images; name their class '
                       'with --classes, or they are taken along E(x)')
    group.add_argument('--images', type=number(int, 1), help='how many test images; default: 8, and 500 in evaluate')
    group.add_argument('--judge', type=Path, metavar='CKPT', help='independent classifier for evaluate')
    group.add_argument('--data', help='the checkpoint\'s data, where they lie elsewhere now')
    group.add_argument('--data-root', type=Path, help='folder of downloads and of rendered letterpress, as in the training')

    group = parser.add_argument_group('single modes')
    group.add_argument('--mask', default='left', metavar='MASK', help='of inpaint: left, centre, random (three quarters), '
                       'salt-and-pepper (half), or an image that is white where pixels are missing')
    group.add_argument('--strengths', type=number(float, .001), nargs='+', default=[.2, .4, .8], metavar='S', help='of the noise to '
                       'take away, in units of pixel value')
    group.add_argument('--data-weight', type=number(float, 0), default=.0003, help='of denoise: a step pulls x back to the noisy '
                       'image by this over S^2 of the distance')
    group.add_argument('--iterations', type=number(int, 1), default=60, help='of Adam in reconstruct')
    group.add_argument('--ckpt2', type=Path, help='second expert of compose')
    group.add_argument('--weight', type=number(float, 0), default=.2, help='w of the negation E1 - w E2 in compose')
    args = parser.parse_args(argv)
    _, steps, images, uses = MODES[args.mode]
    for name in sorted({name for *_, flags in MODES.values() for name in flags}.difference(uses)):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name.replace("_", "-")}: the mode {args.mode} has no use for it; leave the flag out')
    mask = None if args.mask in MASKS else Path(args.mask)
    outputs = [os.path.realpath(args.out / f'{args.mode}{end}') for end in ('.png', '.npy', '.gif')]
    for flag, path in {'--start': args.start, '--mask': mask}.items():
        if path and os.path.realpath(path) in outputs:
            parser.error(f'{flag} {path}: would be overwritten by what this command writes; rename it, or name another --out')
    if mask and not mask.is_file():
        parser.error(f'--mask {args.mask}: no such image, and none of {", ".join(MASKS)}')
    args.steps, args.images = args.steps or steps, args.images or images
    return args


def main(argv=None):
    with user_mistakes(DataError):
        args = parse_args(argv)
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        check_apart(args.out, args.data or checkpoint['args']['data'], args.start)
        x = MODES[args.mode][0](model, checkpoint, args)
        if not x.isfinite().all():
            fail(f'--mode {args.mode}: the images are not finite; use a smaller --step-size, --noise or --guidance')
        with atomic_write(args.out / f'{args.mode}.npy') as file:
            np.save(file, x.cpu().numpy())
    print(f'{args.out / args.mode}.png, {args.out / args.mode}.npy')


if __name__ == '__main__':
    main()
