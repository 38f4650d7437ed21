"""A density of images at T = 1, and its log-likelihood in nats, which needs log Z.

    python .github/lessons/density.py --out runs/lessons        four minutes on one core

Digits (16 x 16) plus noise N(0, s^2) have a density in R^256 for each s; no clamp is needed. The
model tilts q, the Gaussian with the mean and the covariance of these data (Xie et al. 2016 tilt
white noise), and has a class y:

    p(x, y; s) = exp(-E(x, s)) / Z(s) softmax(g(x, s))[y]
    E(x, s) = -log q(x; s) - (1 - s / S) f(x, s)

So p(x; S) is q with Z(S) = 1, and p(x; .1) is the density that is measured.

1. Denoising score matching (Vincent 2011): (s dE/dx - xi)^2 at x + s xi, log s uniform between
   log .1 and log S, and the cross-entropy of g there (without it nothing was learned, one run).
2. Chains of the lectures' SGLD at T = 1 (`noise=None`) from unseen images: do they stay?
3. log Z(.1) by annealed importance sampling (AIS, Neal 2001) along the noise levels, by `hmc`. Down
   from S its expectation is at most log Z; up from .1 it is at least log Z if the start is exact.
   Nobody has exact draws: the chains of step 2 stand in for them.
4. log p(x) of unseen images beside Gaussians and kernel densities, all at the noise .1.

Measured on 270 unseen images, seeds 0 to 2: 150.0 to 151.4 nats, where the Gaussian has 146.6 to
147.5 and a Gaussian per class 160.2 to 160.7. The model loses; see the README of the lessons.
"""
import argparse
import math
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import DataError, load_data, save_figure, to_float  # noqa: E402
from model import user_mistakes  # noqa: E402
from sampler import hmc, sgld  # noqa: E402

S0, S = .1, 5.  # standard deviations of the noise: of the images, and where the path starts
STEP = .05  # eta / 2 of SGLD, times s^2
SCALE = 100.  # of f, so that the last layer learns as fast as the others
LENGTHS = [0, 100, 1000, 10000]  # steps after which chains are looked at
GRID = [.1 * i for i in range(1, 10)]  # bandwidths of the other densities
CHAINS, LEVELS = 64, 500  # chains of all kinds, and noise levels of AIS


class TiltedGaussian(nn.Module):
    """Energies of points x (B, 256) at noise levels s, a number or (B, 1)."""

    def __init__(self, images):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(512, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
                                     nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1 + 10))
        for parameter in self.parameters():
            parameter.data *= 2  # else nothing is learned in the first few hundred updates
        self.mean = images.mean(0)  # (256,)
        self.variance, self.axes = torch.linalg.eigh(images.T.cov())  # (256,), (256, 256)

    def whiten(self, x, s):
        """u, on the principal axes of the data: N(0, I) if x ~ q(.; s)."""
        return (x - self.mean) @ self.axes / (self.variance + s ** 2).sqrt()  # (B, 256)

    def colour(self, u, s):
        """x of u, the inverse of `whiten`."""
        return u * (self.variance + s ** 2).sqrt() @ self.axes.T + self.mean  # (B, 256)

    def outputs(self, u, s):
        """f and g, (B, 11), of log s and the Wiener filter's estimate of the clean image."""
        clean = self.colour(u * self.variance / (self.variance + s ** 2), s)  # (B, 256)
        level = torch.as_tensor(s).log().expand_as(clean)  # (B, 256)
        return self.network(torch.cat([clean, level], dim=1))

    def energy_of_u(self, u, s):
        """The energy of u = whiten(x, s), whose density has the same Z: (B, 256) -> (B,)."""
        tilt = (1 - s / S) * SCALE * self.outputs(u, s)[:, :1]  # (B, 1)
        return u.square().sum(1) / 2 + 128 * math.log(2 * math.pi) - tilt.squeeze(1)

    def energy(self, x, s=S0):
        spread = (self.variance + s ** 2).log().sum(-1) / 2  # log |dx/du|, () or (B,)
        return self.energy_of_u(self.whiten(x, s), s) + spread

    def denoise(self, x):
        """The mean of the clean image given x at s = .1, x - s^2 dE/dx (Tweedie's formula)."""
        x = x.detach().requires_grad_()
        gradient, = torch.autograd.grad(self.energy(x).sum(), x)  # (B, 256)
        return (x - S0 ** 2 * gradient).detach()


def matching_loss(model, x, y, generator):
    """Denoising score matching, summed over the pixels, and the cross-entropy, at random levels."""
    t = (torch.rand(len(x), 1, generator=generator) + torch.arange(len(x))[:, None]) / len(x)
    s = S0 * (S / S0) ** t  # (B, 1), evenly spread
    xi = torch.randn(x.shape, generator=generator)
    noisy = (x + s * xi).requires_grad_()
    gradient, = torch.autograd.grad(model.energy(noisy, s).sum(), noisy, create_graph=True)
    logits = model.outputs(model.whiten(noisy, s), s)[:, 1:]  # (B, 10)
    return (s * gradient - xi).square().sum(1).mean() + cross_entropy(logits, y)


def learn(model, images, labels, updates, generator):
    """AdamW; its rate falls linearly to a hundredth."""
    optimizer = torch.optim.AdamW(model.parameters(), .003, weight_decay=1.)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1., .01, updates)
    bar = tqdm(range(updates), unit='update')
    for update in bar:
        i = torch.randperm(len(images), generator=generator)[:256]
        loss = matching_loss(model, images[i], labels[i], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if update % 50 == 0:
            bar.set_postfix(loss=f'{loss.item():.2f}')


def anneal(energy, x, levels, move):
    """AIS of chains x ~ exp(-energy(x, levels[0])) through all levels; `move(x, s)` must leave the
    density at s as it is. Returns the logs of the mean weight up to each level, which estimate
    log Z(s) / Z(levels[0]), the last state, and the standard deviation of the last log weights."""
    log_w, path = torch.zeros(len(x)), [0.]  # (N,)
    for before, s in pairwise(levels):
        log_w += energy(x, before) - energy(x, s)
        x = move(x, s)
        path.append((log_w.logsumexp(0) - math.log(len(x))).item())
    return path, x, log_w.std()


def log_kernels(x, centres, variance, axes):
    """Parzen windows: log density of x (N, 256), the mean of Gaussians at the centres (M, 256),
    each with this covariance plus that of the noise."""
    deviation = variance.clamp_min(0).add(S0 ** 2).sqrt()  # (256,), along the axes (256, 256)
    square = torch.cdist(x @ axes / deviation, centres @ axes / deviation) ** 2  # (N, M)
    log_z = math.log(len(centres)) + 128 * math.log(2 * math.pi) + deviation.log().sum()
    return (-square / 2).logsumexp(1) - log_z


def baselines(train, y, val, test):
    """log p of the test images, (N,) each. The h of each density is the best one for `val`."""
    variance, axes = torch.linalg.eigh(train.T.cov())

    def classes(x, h):
        """A Gaussian per class; its covariance shrinks by h to the common one (Friedman 1989)."""
        parts = []
        for k in range(10):
            own = train[y == k]
            covariance = (1 - h) * own.T.cov() + h * train.T.cov()
            log_p = log_kernels(x, own.mean(0)[None], *torch.linalg.eigh(covariance))
            parts.append(log_p + math.log(len(own) / len(train)))
        return torch.stack(parts).logsumexp(0)

    fits = {'Gaussian': lambda x, h: log_kernels(x, train.mean(0)[None], variance, axes),
            'Gaussian per class': classes,
            'round kernels': lambda x, h: log_kernels(x, train, h ** 2 * torch.ones(256), axes),
            'shaped kernels': lambda x, h: log_kernels(x, train, h ** 2 * variance, axes)}
    return {name: fit(test, max(GRID, key=lambda h: fit(val, h).mean().item()))
            for name, fit in fits.items()}


def evaluate(model, test, y, train, generator):
    """Chains from the first test images at T = 1, and log Z from both sides."""
    x, states = test[:CHAINS], []

    def look(name, points, labels=None):
        """Distance to training images (root mean square of pixels), E, share with its label."""
        clean = model.denoise(points)  # (B, 256)
        states.append(clean[:12])
        distance = torch.cdist(clean, train).amin(1).mean() / 16
        numbers = {'distance': distance, 'E': model.energy(points).mean()}
        if labels is not None:
            g = model.outputs(model.whiten(points, S0), S0)[:, 1:]  # (B, 10)
            numbers['label kept'] = (g.argmax(1) == labels).float().mean()
        tell(name, numbers)

    def move(u, s):
        """A step of HMC in x, whose density is nowhere narrower than s. AIS weighs u: as u, q is
        N(0, I) at all levels."""
        x, _ = hmc(partial(model.energy, s=s), model.colour(u, s), 1, .1 * s ** 2, clamp=None,
                   generator=generator, leapfrog=5)
        return model.whiten(x, s)

    look('all unseen images', test, y)
    for before, length in pairwise([0] + LENGTHS):
        x = sgld(model.energy, x, length - before, STEP * S0 ** 2, clamp=None, generator=generator)
        look(f'after {length} steps', x, y[:CHAINS])
    levels = (S * (S0 / S) ** torch.linspace(0, 1, LEVELS + 1)).tolist()
    start = torch.randn(CHAINS, 256, generator=generator)  # u of draws from q(.; S)
    down, drawn, spread = anneal(model.energy_of_u, start, levels, move)
    up, _, _ = anneal(model.energy_of_u, model.whiten(x, S0), levels[::-1], move)
    look('last state of AIS', model.colour(drawn, S0))
    tell('log Z', {'from below': down[-1], 'from above': -up[-1], 'spread of weights': spread})
    states = torch.stack(states[1:])  # (R, 12, 256)
    return states, levels, down, [value - up[-1] for value in up[::-1]]


def tell(name, numbers):
    tqdm.write(f'{name:>20}  ' + '  '.join(f'{key} {value:.3f}' for key, value in numbers.items()))


def draw(states, levels, down, up, log_p, path):
    """Chains and samples as images, both paths of log Z, and a bar for each density."""
    figure = Figure(figsize=(12, 5), layout='constrained')
    axes = figure.subplot_mosaic('iiz;iib')
    rows = [f'{steps:,} steps' for steps in LENGTHS] + ['AIS, from noise']
    grid = pad(states.unflatten(2, (16, 16)), (0, 2, 0, 2), value=1.)  # (R, 12, 18, 18)
    grid = grid.transpose(1, 2).flatten(2).flatten(0, 1)  # (18 R, 18 * 12)
    axes['i'].imshow(grid.numpy(), cmap='gray', vmin=-1, vmax=1)
    axes['i'].set_yticks([18 * i + 8 for i in range(len(rows))], rows)
    axes['i'].set(xticks=[], title='chains at T = 1 from unseen images, '
                                   'and last states of AIS (all denoised)')
    axes['z'].plot(levels, down, label='down from noise')
    axes['z'].plot(levels, up, '--', label='up from the chains')
    axes['z'].set(xscale='log', xlabel='noise level s', title='log Z(s) by AIS')
    axes['z'].legend()
    bars = axes['b'].barh(list(log_p), [value.mean().item() for value in log_p.values()])
    axes['b'].bar_label(bars, fmt='%.1f', label_type='center')
    axes['b'].set(title='log p(x) of unseen images, nats')
    save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default='.', help='folder to write into')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    parser.add_argument('--updates', type=int, default=1000, help='updates of matching')
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)  # the initial weights
    generator = torch.Generator().manual_seed(args.seed)
    data = load_data('digits', seed=args.seed)
    train, val, test = (to_float(split.images).flatten(1)  # (N, 256)
                        for split in (data.train, data.val, data.test))
    y = data.train.labels
    val, test = (x + S0 * torch.randn(x.shape, generator=generator) for x in (val, test))
    log_p = baselines(train, y, val, test)
    model = TiltedGaussian(train)
    learn(model, train, y, args.updates, generator)
    model.requires_grad_(False)
    states, levels, down, up = evaluate(model, test, data.test.labels, train, generator)
    log_p['tilted Gaussian'] = -model.energy(test) - max(down[-1], up[-1])  # the less favourable
    for name, value in log_p.items():
        lead = value - log_p['Gaussian per class']  # (N,)
        tell(name, {'log p': value.mean(), 'bits a pixel': -value.mean() / 256 / math.log(2),
                    'lead': lead.mean(), '+-': lead.std() / len(lead) ** .5})
    draw(states, levels, down, up, log_p, args.out / 'density.png')


if __name__ == '__main__':
    with user_mistakes(DataError):
        main()
