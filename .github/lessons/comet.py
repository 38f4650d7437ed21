"""COMET: images fall into parts, each with an energy of its own, and no label says which.

    python .github/lessons/comet.py --out runs/lessons

An encoder gives each image three latents of two numbers each, z_1, z_2, z_3. One network gives the
energy of a part. An image is where the sum of the energies is low, found by K steps from noise x_0:

    E(x, z_k) = 1/2 |g(x, z_k)|^2                        bounded below; one g for all parts
    x_{t+1}   = x_t - eta d/dx sum_k E(x_t, z_k)         t = 0 ... K - 1
    loss      = |x_K - x|^2                              its gradient runs back through all steps

(Du, Li, Sharma, Tenenbaum, Mordatch: Unsupervised Learning of Compositional Energy Concepts, 2021.)
"""
import argparse
import os
import sys
from itertools import permutations
from pathlib import Path

import torch
from sklearn.neural_network import MLPRegressor
from torch import nn
from tqdm import tqdm

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import save_grid  # noqa: E402
from model import swish_cnn  # noqa: E402
from sampler import prior, sgld  # noqa: E402

SIDE, PARTS, DIM, WIDTH = 16, 3, 2, 256
STEPS, STEP_SIZE = 4, .2
FACTORS = ['disc', 'ring', 'light']  # two numbers each: x and y of the centre; level and slope


def make_images(count, generator):
    """Images (N, 1, S, S) and their factors (N, 3, 2), independent and uniform on [-1, 1]."""
    factors = 2 * torch.rand(count, 3, 2, generator=generator) - 1
    at = torch.arange(SIDE) - (SIDE - 1) / 2  # (S,), the middle is 0
    x, y = (4.5 * factors[..., None, None]).unbind(2)  # (N, 3, 1, 1) each
    distance = torch.hypot(at - x, at[:, None] - y)  # (N, 3, S, S)
    disc = torch.sigmoid(1.5 * (3 - distance[:, 0]))  # (N, S, S)
    ring = torch.exp(-(distance[:, 1] - 3.5) ** 2)
    light = .2 * (x[:, 2] + y[:, 2] * at[:, None] / at[-1]) / 4.5  # (N, S, 1)
    return (.7 * disc + .7 * ring + light - .5)[:, None], factors


class Comet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(swish_cnn(1, 16), nn.Linear(64, 64), nn.SiLU(),  # (B, 64)
                                    nn.Linear(64, PARTS * DIM), nn.Unflatten(1, (PARTS, DIM)))
        self.of_z = nn.Sequential(nn.Linear(DIM, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH),
                                  nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.of_x = nn.Sequential(nn.Flatten(), nn.Linear(SIDE ** 2, WIDTH))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def energies(self, x, z):
        """E(x, z_k) of each part: (B, 1, S, S), (B, 3, 2) -> (B, 3)."""
        g = self.out(self.of_x(x)[:, None] + self.of_z(z))  # (B, 3, WIDTH)
        return g.square().sum(2) / 2

    def generate(self, z, start, differentiable=False):
        """K steps down the sum of the energies of the parts z (B, 3, 2)."""
        return sgld(lambda x: self.energies(x, z).sum(1), start, STEPS, STEP_SIZE, noise=0.,
                    clamp=None, differentiable=differentiable)


def exchange(model, z, start, factors, read, owner):
    """Take one part after the other from the image before; owner (3, 2) tells to which part each
    number of the latents belongs. Returns images (3, N, 1, S, S), how far each factor moves to that
    of the image before (3, 3), 0 it stays, 1 it arrives, and the part of each factor."""
    images = torch.stack([model.generate(torch.where(owner == k, z.roll(1, 0), z), start)
                          for k in range(PARTS)])
    way = factors.roll(1, 0) - factors  # (N, 3, 2)
    before = read(model.generate(z, start))
    step = torch.stack([read(x) - before for x in images])  # (part, N, factor, 2)
    moved = (step * way).sum((1, 3)) / way.square().sum((0, 2))  # (part, factor)
    order = list(max(permutations(range(PARTS)), key=lambda p: moved[list(p)].trace()))
    return images[order], moved[order], order


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--updates', type=int, default=2000)
    parser.add_argument('--out', type=Path, default='runs/lessons')
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x_train, factors_train = make_images(8192, generator)
    x_test, factors = make_images(1000, generator)

    model = Comet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    bar = tqdm(range(args.updates))
    for _ in bar:
        x = x_train[torch.randint(len(x_train), (64,), generator=generator)]  # (64, 1, S, S)
        start = prior('gaussian', x.shape, generator)
        x_synth = model.generate(model.encode(x), start, differentiable=True)
        loss = (x_synth - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(psnr=f'{psnr(loss):.1f}')

    model.requires_grad_(False)
    start = prior('gaussian', x_test.shape, generator)
    z = model.encode(x_test)  # (N, 3, 2)
    result = model.generate(z, start)
    print(f'PSNR of 1,000 new images {psnr((result - x_test).square().mean()):.1f} dB, '
          f'mean image {psnr((x_train.mean(0) - x_test).square().mean()):.1f} dB')

    judge = MLPRegressor(hidden_layer_sizes=256, random_state=args.seed, max_iter=30)
    judge.fit(x_train.flatten(1), factors_train.flatten(1))

    def read(x):
        return torch.tensor(judge.predict(x.flatten(1))).view(-1, 3, 2).float()

    print('judge R2', 1 - (read(x_test) - factors).square().mean((0, 2)) / factors.var((0, 2)))
    print('on reconstr', 1 - (read(result) - factors).square().mean((0, 2)) / factors.var((0, 2)))
    part = torch.arange(PARTS)[:, None].expand(PARTS, DIM)  # (3, 2)
    shuffled = torch.stack([part[:, 0], part[:, 0].roll(1)], dim=1)
    for name, owner in ('shuffled', shuffled), ('parts', part):
        images, moved, order = exchange(model, z, start, factors, read, owner)
        print(name, (moved * 100).round(), moved.trace() / 3, (moved.sum() - moved.trace()) / 6)
    x = start[:8].clone().requires_grad_()
    e = model.energies(x, z[:8, order]).sum(0)
    gradients = [-torch.autograd.grad(e_k, x, retain_graph=True)[0] for e_k in e]
    rows = torch.cat([x_test[:8], result[:8], *gradients, x_test.roll(1, 0)[:8], *images[:, :8]])
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.out / 'net.pt')
    save_grid(rows, args.out / 'comet.png', 8, 'COMET',
              rows=['image', 'reconstruction', *FACTORS, 'donor', *FACTORS])


def psnr(error):
    return 10 * torch.log10(4 / error).item()


if __name__ == '__main__':
    main()
