"""A density of images at T = 1, and its log-likelihood in nats, which needs log Z.

    python .github/lessons/density.py --out runs/lessons        some minutes on one core

Digits (16 x 16) plus noise N(0, s^2) have a density in R^256 for each s, and no clamp is needed. The
model tilts q, the Gaussian with the mean and the covariance of these data (Xie et al. 2016 tilt
white noise):

    p(x; s) = exp(-E(x, s)) / Z(s),    E(x, s) = -log q(x; s) - (1 - s / S) f(x, s)

So p(.; S) is q with Z(S) = 1, and p(.; .1) is the density that is measured.

1. Denoising score matching (Vincent 2011): (s dE/dx - xi)^2 at x + s xi, with log s uniform from
   log .1 to log S. With this weight of s it bounds a likelihood (Song et al. 2021).
2. Then CONTRAST times the contrastive term, mean E(x, s) - mean E(x', s), is added: the gradient of
   -log p(x; s). Chains x' start as draws of q at s = S and move by the lectures' law at T = 1
   (`noise=None`), while s falls to .1.
3. log Z(.1) by annealed importance sampling (AIS, Neal 2001) along the noise levels, by `hmc`. Down
   from S its expectation is at most log Z; up from .1 it is at least log Z if the start is exact.
   Nobody has exact draws: chains that started in unseen images and moved for long stand in for them.
4. log p(x) of unseen images beside Gaussians and kernel densities, all at the noise .1.
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
from tqdm import tqdm

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import load_data, save_figure, to_float  # noqa: E402
from model import EnergyModel  # noqa: E402
from sampler import hmc, sgld  # noqa: E402
from train import px_step  # noqa: E402

S0, S = .1, 5.  # standard deviations of the noise: of the images, and where the path starts
STEP = .05  # eta / 2 of SGLD, times s^2
SCALE = 100.  # of f, so that the last layer learns as fast as the others
CONTRAST = .1  # weight of the contrastive term
LENGTHS = [0, 100, 1000, 10000]  # steps after which chains are looked at
CHAINS, LEVELS = 64, 500  # chains of all kinds, and noise levels of AIS


class TiltedGaussian(EnergyModel):
    """Energies of points x (B, 256) at noise levels s, a number or (B, 1)."""

    def __init__(self, images):
        super().__init__(width=64)  # its head takes 4 * 64 features
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(512, 256), nn.SiLU(),  # (B, 256)
                                      nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU())
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

    def energy_of_u(self, u, s):
        """The energy of the law that u = whiten(x, s) has, with the same Z: (B, 256) -> (B,)."""
        clean = u * self.variance / (self.variance + s ** 2).sqrt() @ self.axes.T + self.mean
        level = torch.as_tensor(s).log().expand_as(clean)  # (B, 256)
        # The network sees the clean image that is to be expected given x under q, and log s.
        f = SCALE * self.get_logits(torch.stack([clean, level], 1).view(-1, 2, 16, 16))  # (B, 1)
        tilt = (1 - s / S) * f
        return u.square().sum(1) / 2 + 128 * math.log(2 * math.pi) - tilt.squeeze(1)

    def energy(self, x, s=S0):
        spread = (self.variance + s ** 2).log().sum(-1) / 2  # log |dx/du|, () or (B,)
        return self.energy_of_u(self.whiten(x, s), s) + spread

    def denoise(self, x):
        """The mean of the clean image given x at s = .1, x - s^2 dE/dx (Tweedie's formula)."""
        x = x.detach().requires_grad_()
        gradient, = torch.autograd.grad(self.energy(x).sum(), x)  # (B, 256)
        return (x - S0 ** 2 * gradient).detach()


def matching_loss(model, x, generator):
    """Denoising score matching, summed over the pixels, at one random level for each image."""
    t = (torch.rand(len(x), 1, generator=generator) + torch.arange(len(x))[:, None]) / len(x)
    s = S0 * (S / S0) ** t  # (B, 1), evenly spread
    xi = torch.randn(x.shape, generator=generator)
    noisy = (x + s * xi).requires_grad_()
    gradient, = torch.autograd.grad(model.energy(noisy, s).sum(), noisy, create_graph=True)
    return (s * gradient - xi).square().sum(1).mean()


def learn(model, images, updates, generator, contrast=0.):
    """AdamW whose rate falls to 0; with `contrast`, chains and the gap of their energies besides."""
    optimizer = torch.optim.AdamW(model.parameters(), .001 if contrast else .003, weight_decay=1.)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1., .01, updates)
    u = torch.randn(CHAINS, 256, generator=generator)
    rung = 4 * torch.arange(CHAINS)  # where each chain is on its way down the levels
    bar = tqdm(range(updates), 'contrast' if contrast else 'matching', unit='update')
    for update in bar:
        x = images[torch.randperm(len(images), generator=generator)[:256]]  # (B, 256)
        loss = matching_loss(model, x, generator)
        numbers = {'matching': f'{loss.item():.2f}'}
        if contrast:
            s = S * (S0 / S) ** (rung / (4 * CHAINS - 1))[:, None]  # (C, 1)
            # SGLD of x / s, so that one step size fits all levels
            start = model.colour(u, s) / s
            x_synth = s * sgld(lambda v: model.energy(s * v, s), start, 5, STEP, clamp=None,
                               generator=generator)
            x_real = x[:CHAINS] + s * torch.randn(CHAINS, 256, generator=generator)
            gap = px_step(model.energy(x_real, s), model.energy(x_synth, s))
            loss = loss + contrast * gap
            numbers['gap'] = f'{gap.item():.2f}'
            u = model.whiten(x_synth, s)
            rung = (rung + 1) % (4 * CHAINS)
            u[rung == 0] = torch.randn(256, generator=generator)  # afresh at the top
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if update % 50 == 0:
            bar.set_postfix(numbers)


def anneal(energy, x, levels, move):
    """AIS of chains x ~ exp(-energy(x, levels[0])) through all levels; `move(x, s)` must leave the
    law at s as it is. Returns the logs of the mean weight up to each level, which are estimates of
    log Z(s) / Z(levels[0]), and the last state."""
    log_w, path = torch.zeros(len(x)), [0.]
    for before, s in pairwise(levels):
        log_w += energy(x, before) - energy(x, s)
        x = move(x, s)
        path.append((log_w.logsumexp(0) - math.log(len(x))).item())
    return path, x


def log_kernels(x, centres, variance, axes):
    """log density of x (N, 256): the mean of Gaussians at the centres, all of this covariance plus
    that of the noise."""
    deviation = variance.clamp_min(0).add(S0 ** 2).sqrt()  # (256,), along the axes (256, 256)
    square = torch.cdist(x @ axes / deviation, centres @ axes / deviation) ** 2  # (N, M)
    log_z = math.log(len(centres)) + 128 * math.log(2 * math.pi) + deviation.log().sum()
    return (-square / 2).logsumexp(1) - log_z


def baselines(train, y, val, test):
    """log p of the test images, (N,) each. The h of each law is the best one for `val`."""
    variance, axes = torch.linalg.eigh(train.T.cov())

    def classes(x, h):
        """A Gaussian for each class; h is the share of the common covariance in its own."""
        parts = []
        for k in range(10):
            own = train[y == k]
            covariance = (1 - h) * own.T.cov() + h * train.T.cov()
            log_p = log_kernels(x, own.mean(0)[None], *torch.linalg.eigh(covariance))
            parts.append(log_p + math.log(len(own) / len(train)))
        return torch.stack(parts).logsumexp(0)

    laws = {'Gaussian': lambda x, h: log_kernels(x, train.mean(0)[None], variance, axes),
            'Gaussian a class': classes,
            'round kernels': lambda x, h: log_kernels(x, train, h ** 2 * torch.ones(256), axes),
            'shaped kernels': lambda x, h: log_kernels(x, train, h ** 2 * variance, axes)}
    grid = [.1 * i for i in range(1, 10)]
    return {name: law(test, max(grid, key=lambda h: law(val, h).mean().item()))
            for name, law in laws.items()}


def evaluate(model, test, train, generator):
    """Chains from the first test images at the law's own noise, and log Z from both sides."""
    x, states = test[:CHAINS], []

    def look(name, x):
        states.append(model.denoise(x))
        distance = torch.cdist(states[-1], train).amin(1).mean() / 16  # root mean square of pixels
        tell(name, distance=distance, E=model.energy(x).mean())

    def move(u, s):
        """HMC of x, which is nowhere narrower than s. As u, q is the same law at all levels."""
        x, _ = hmc(partial(model.energy, s=s), model.colour(u, s), 1, .1 * s ** 2, clamp=None,
                   generator=generator, leapfrog=5)
        return model.whiten(x, s)

    for before, length in pairwise([0] + LENGTHS):
        x = sgld(model.energy, x, length - before, STEP * S0 ** 2, clamp=None, generator=generator)
        look(f'after {length} steps', x)
    levels = (S * (S0 / S) ** torch.linspace(0, 1, LEVELS + 1)).tolist()
    start = torch.randn(CHAINS, 256, generator=generator)  # u of draws from q(.; S)
    down, drawn = anneal(model.energy_of_u, start, levels, move)
    up, _ = anneal(model.energy_of_u, model.whiten(x, S0), levels[::-1], move)
    look('last state of AIS', model.colour(drawn, S0))
    tell('log Z', below=down[-1], above=-up[-1])
    return torch.stack(states), levels, down, [value - up[-1] for value in up[::-1]]


def tell(name, **numbers):
    tqdm.write(f'{name:>20}  ' + '  '.join(f'{key} {value:.3f}' for key, value in numbers.items()))


def draw(states, levels, down, up, log_p, path):
    """Chains and samples as images, both paths of log Z, and a bar for each law."""
    figure = Figure(figsize=(12, 5), layout='constrained')
    axes = figure.subplot_mosaic('iiz;iib')
    rows = [f'{steps:,} steps' for steps in LENGTHS] + ['samples']
    grid = states[:, :12].unflatten(2, (16, 16)).transpose(1, 2)  # (R, 16, 12, 16)
    axes['i'].imshow(grid.flatten(2).flatten(0, 1), cmap='gray', vmin=-1, vmax=1)
    axes['i'].set_yticks([16 * i + 8 for i in range(len(rows))], rows)
    axes['i'].set(xticks=[], title='chains at T = 1 from unseen images; last states of AIS from noise')
    axes['z'].plot(levels, down, label='down from noise: at most log Z')
    axes['z'].plot(levels, up, '--', label='up from the chains')
    axes['z'].set(xscale='log', xlabel='noise level s', title='log Z(s) by AIS')
    axes['z'].legend()
    for i, (name, value) in enumerate(log_p.items()):
        axes['b'].barh(i, value.mean())
        axes['b'].text(2, i, f'{name}: {value.mean():.1f}', va='center')
    axes['b'].invert_yaxis()
    axes['b'].set(yticks=[], title='mean log p(x) of unseen images, in nats')
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
    val, test = (x + S0 * torch.randn(x.shape, generator=generator) for x in (val, test))
    log_p = baselines(train, data.train.labels, val, test)
    model = TiltedGaussian(train)
    for name, updates, contrast in [('matching', args.updates, 0.),
                                    ('with contrast', args.updates // 3, CONTRAST)]:
        learn(model.requires_grad_(True), train, updates, generator, contrast)
        model.requires_grad_(False)
        tell(name, E=model.energy(test).mean())
        states, levels, down, up = evaluate(model, test, train, generator)
        # The greater log Z gives the smaller log p: no credit for what AIS cannot tell.
        log_p[name] = -model.energy(test) - max(down[-1], up[-1])
    for name, value in log_p.items():
        lead = value - log_p['Gaussian a class']  # (N,)
        tell(name, log_p=value.mean(), bits_a_pixel=-value.mean() / 256 / math.log(2),
             lead=lead.mean(), error=lead.std() / len(lead) ** .5)
    draw(states, levels, down, up, log_p, args.out / 'density.png')


if __name__ == '__main__':
    main()
