"""Maximum likelihood in the plane, where everything can be checked: the true density is known.

    python .github/lessons/plane.py --out runs/lessons        under a minute on one core

Points in the square [-1, 1]^2 (images of two pixels) come from eight Gaussians, two moons or two
rings. A small network learns E(x) by the loop of the lectures and nothing besides, at T = 1:

    x' <- x' - eta / 2 dE/dx' + sqrt(eta) xi                      SGLD, chains from a reservoir
    descent on mean E(x) - mean E(x')                             the gradient of -log p(x)

Here Z, the integral of exp(-E) over the square, is a sum over a grid. So the script can print what
nobody can know of images: the negative log-likelihood (NLL) of new points in nats, beside the least
possible one, the entropy of their true density; log Z by annealed importance sampling (AIS, Neal
2001), which bounds it from both sides in expectation; and how far chains that started
anywhere are from exp(-E) / Z (total variation, TV, beside that of as many exact draws). plane.png
shows, for each set, data, chains, both densities, and the field -dE/dx that moves the chains.
"""
import argparse
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_circles, make_moons
from torch import nn
from tqdm import tqdm

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import save_figure  # noqa: E402
from model import EnergyModel, user_mistakes  # noqa: E402
from sampler import Reservoir, hmc, prior, sgld  # noqa: E402
from train import px_step  # noqa: E402

SETS = ['gaussians', 'moons', 'rings']
SPREAD = .1  # standard deviation of the data around their centres
STEP = .001  # eta / 2
SIDE = torch.linspace(-.995, .995, 200)  # middles of cells
GRID = torch.cartesian_prod(SIDE, SIDE).view(-1, 1, 1, 2)  # (40000, 1, 1, 2)
CELL = .01 ** 2
CHAINS, LENGTH, LEVELS = 2000, 1000, 100  # of `measure`: chains, their steps, levels of AIS


def centres(name):
    """The data without their noise: points (M, 2)."""
    if name == 'gaussians':
        angle = torch.arange(8) * math.pi / 4
        return .7 * torch.stack([angle.cos(), angle.sin()], dim=1)  # (8, 2)
    if name == 'moons':
        points, _ = make_moons(2000, shuffle=False)
    else:
        points, _ = make_circles(2000, shuffle=False, factor=.5)
    points = torch.tensor(points - points.mean(0), dtype=torch.float32)  # (2000, 2)
    return .7 * points / points.abs().max()


def draw_data(points, count, generator):
    """Images x ~ p(x), (N, 1, 1, 2): one of the points (M, 2) plus N(0, SPREAD^2)."""
    pick = torch.randint(len(points), (count,), generator=generator)
    noise = SPREAD * torch.randn(count, 2, generator=generator)
    return (points[pick] + noise).view(-1, 1, 1, 2)


def log_density(x, points):
    """log p(x) of images (N, 1, 1, 2): the mean of a Gaussian around each of the points."""
    square = (torch.cdist(x.flatten(1), points) / SPREAD) ** 2  # (N, M)
    return (-square / 2).logsumexp(1) - math.log(len(points) * 2 * math.pi * SPREAD ** 2)


def perceptron():
    """An EnergyModel, T = 1, of points. Without the factor 20 on the first layer, it would take
    much longer to learn anything as narrow as a mode (spectral bias, Rahaman et al. 2019)."""
    model = EnergyModel(width=16)  # its head takes 4 * 16 features
    model.features = nn.Sequential(nn.Flatten(), nn.Linear(2, 64), nn.SiLU(),  # (B, 64)
                                   nn.Linear(64, 64), nn.SiLU())
    for parameter in model.features[1].parameters():
        parameter.data *= 20
    return model


def learn(points, name, updates, generator):
    """The loop of the lectures: an energy, and the chains that were its negative examples."""
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, betas=(0., .999))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1., .01, updates)
    reservoir = Reservoir([4096], (1, 1, 2), .01, 'uniform', generator)
    one_ring = torch.zeros(256, dtype=torch.long)  # there are no classes
    bar = tqdm(range(updates), name, unit='update')
    for update in bar:
        x_real = draw_data(points, 256, generator)
        start, slot = reservoir.draw(one_ring, generator)
        x_synth = sgld(model.energy, start, 10, STEP, generator=generator)
        reservoir.store(slot, x_synth)
        gap = px_step(model.energy(x_real), model.energy(x_synth))
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
        decay.step()
        if update % 50 == 0:
            bar.set_postfix(gap=f'{gap.item():.3f}')
    return model.requires_grad_(False), reservoir.chains


def anneal(energy, x, betas, generator):
    """log of the mean weight of chains x (N, 1, 1, 2) that are led through all exp(-beta E).
    From beta = 0 to 1 its expectation is at most log(Z / 4); backward, from draws of exp(-E) / Z,
    at most log(4 / Z). 4 is the area of the square."""
    log_w = torch.zeros(len(x))
    for before, beta in pairwise(betas):
        log_w -= (beta - before) * energy(x)
        x = hmc(lambda x: beta * energy(x), x, 1, STEP, generator=generator, leapfrog=5)[0]
    return (log_w.logsumexp(0) - math.log(len(x))).item()


def misplaced(x, log_p):
    """Total variation between points (N, 1, 1, 2) and exp(log_p), (40000,), on 10 x 10 cells."""
    p = CELL * log_p.exp().view(10, 20, 10, 20).sum((1, 3))  # (40000,) -> (10, 10)
    counts = torch.histogramdd(x.flatten(1), 10, range=[-1., 1.] * 2).hist  # (10, 10)
    return (counts / len(x) - p).abs().sum().item() / 2


def measure(model, points, generator):
    """What the grid tells of a learned energy: log p (40000,), the states of `hmc` from anywhere,
    and a row of the table."""
    test = draw_data(points, 10000, generator)
    log_z = (-model.energy(GRID)).logsumexp(0).item() + math.log(CELL)
    log_p = -model.energy(GRID) - log_z  # (40000,)
    start = prior('uniform', (CHAINS, 1, 1, 2), generator)
    langevin = sgld(model.energy, start, LENGTH, STEP, generator=generator)
    hamilton, _ = hmc(model.energy, start, LENGTH // 5, STEP, generator=generator, leapfrog=5)
    exact = GRID[log_p.exp().multinomial(CHAINS, replacement=True, generator=generator)]
    betas = torch.linspace(0, 1, LEVELS + 1).tolist()
    return log_p, hamilton, {
        'NLL': model.energy(test).mean().item() + log_z,
        'entropy': -log_density(test, points).mean().item(),
        'log Z': log_z,
        'by AIS from below': math.log(4) + anneal(model.energy, start, betas, generator),
        'from above': math.log(4) - anneal(model.energy, exact, betas[::-1], generator),
        'TV of SGLD': misplaced(langevin, log_p),
        'of HMC': misplaced(hamilton, log_p),
        'of exact draws': misplaced(exact, log_p)}


def draw_row(axes, name, points, model, chains, hamilton, log_p, generator):
    """Data, chains of SGLD and HMC, both densities, and the field -dE/dx over the energy."""
    box = {'extent': (-1, 1, -1, 1), 'origin': 'lower'}
    axes[0].set_ylabel(name)
    for ax, x in zip(axes, [draw_data(points, 2000, generator), chains[:2000], hamilton]):
        ax.scatter(*x.flatten(1).T, s=1)
    for ax, log in zip(axes[3:], [log_density(GRID, points), log_p]):
        ax.imshow(log.exp().view(200, 200).T.numpy(), vmin=0, vmax=log_p.exp().max(), **box)
    x = GRID.view(200, 200, 1, 1, 2)[5::10, 5::10].flatten(0, 1).requires_grad_()  # (400, 1, 1, 2)
    field, = torch.autograd.grad(-model.energy(x).sum(), x)  # (400, 1, 1, 2)
    field = field / field.norm(dim=3, keepdim=True).clamp_min(1e-6).sqrt()  # to see short ones
    axes[5].imshow(-log_p.view(200, 200).T.numpy(), cmap='Greys_r', **box)
    axes[5].quiver(*x.detach().flatten(1).T.numpy(), *field.flatten(1).T.numpy(), color='tab:red')
    for ax in axes:
        ax.set(xlim=(-1, 1), ylim=(-1, 1), aspect='equal', xticks=[], yticks=[])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default='.', help='folder to write into')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    parser.add_argument('--updates', type=int, default=1500, help='updates for each set')
    args = parser.parse_args(argv)
    figure = Figure(figsize=(14, 7.4), layout='constrained')
    axes = figure.subplots(len(SETS), 6, squeeze=False)
    for ax, title in zip(axes[0], ['data', 'chains of the reservoir', 'HMC from anywhere',
                                   'p(x) of the data', 'exp(-E(x)) / Z, learned',
                                   '-dE/dx, over E (dark: low)']):
        ax.set_title(title)
    for name, row_of_axes in zip(SETS, axes):
        torch.manual_seed(args.seed)  # the initial weights
        generator = torch.Generator().manual_seed(args.seed)
        points = centres(name)
        model, chains = learn(points, name, args.updates, generator)
        log_p, hamilton, row = measure(model, points, generator)
        print(f'{name}:', ', '.join(f'{key} {value:.3f}' for key, value in row.items()))
        draw_row(row_of_axes, name, points, model, chains, hamilton, log_p, generator)
    save_figure(figure, args.out / 'plane.png')


if __name__ == '__main__':
    with user_mistakes():
        main()
