"""COMET: Unsupervised Learning of Compositional Energy Concepts (Du et al. 2021).

    python .github/lessons/comet.py --out runs/lessons          about a minute on one core

An encoder gives each image three latents of one number, z_1, z_2, z_3, and one network g gives the
energy of each. An image is where their sum is low, found by K = 4 steps from noise x_0. No labels.

    E(x, z_k) = 1/2 |g(x, z_k)|^2                    bounded below; the same g for all parts
    x_{t+1}   = x_t - eta d/dx sum_k E(x_t, z_k)     t = 0 ... K - 1
    loss      = mean (x_K - x)^2                     its gradient runs back through all steps

Measured, seeds 0 to 2, 1,000 new images: PSNR 32.2, 31.2 and 33.5 dB, of the mean image 17. A part
from another image moves one factor .96 to 1.00 of the way and the others .03 or less; a mixture of
latents moves one by .34 to .88 and others by up to .40. This data set is easy: a disc and a ring
that move in x and y stay mixed; a low loss is no evidence for the factors (see the README here).
"""
import argparse
import os
import sys

import torch
from torch import nn
from tqdm import tqdm

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import save_grid  # noqa: E402
from model import swish_cnn, user_mistakes  # noqa: E402
from sampler import prior, sgld  # noqa: E402


def render(factors):
    """Places of an upright and of a lying bar, light: (N, 3) in [-1, 1] -> (N, 1, 16, 16)."""
    at = torch.linspace(-1, 1, 16)
    bars = torch.exp(-((at - .7 * factors[:, :2, None]) / .4) ** 2)  # (N, 2, 16), smooth profiles
    light = .3 * factors[:, 2, None, None] - .4  # (N, 1, 1)
    return (.5 * bars[:, 0, None, :] + .5 * bars[:, 1, :, None] + light)[:, None]


class Comet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(swish_cnn(1, 16), nn.Linear(64, 64), nn.SiLU(),
                                    nn.Linear(64, 3))  # (B, 3)
        self.of_x = nn.Sequential(nn.Flatten(), nn.Linear(256, 256))
        self.of_z = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 128), nn.SiLU(),
                                  nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 256))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(256, 256))

    def energies(self, x, h):
        """E(x, z_k) of all parts, h = of_z(z): (B, 1, 16, 16), (B, 3, 256) -> (B, 3)."""
        return self.out(self.of_x(x)[:, None] + h).square().sum(2) / 2  # g is (B, 3, 256)

    def generate(self, z, start, differentiable=False):
        """K steps down the sum of the energies of the parts z (B, 3)."""
        h = self.of_z(z)  # (B, 3, 256), the same in all steps
        return sgld(lambda x: self.energies(x, h).sum(1), start, steps=4, step_size=.2, noise=0.,
                    clamp=None, differentiable=differentiable)  # (B, 1, 16, 16)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--updates', type=int, default=1200)
    parser.add_argument('--out', default='.')
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    x_train = render(2 * torch.rand(8192, 3) - 1)  # (8192, 1, 16, 16)
    model = Comet()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for _ in (bar := tqdm(range(args.updates))):
        x = x_train[torch.randint(len(x_train), (64,))]  # (64, 1, 16, 16)
        x_synth = model.generate(model.encode(x), prior('gaussian', x.shape), differentiable=True)
        loss = (x_synth - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), .1)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f'{loss:.4f}')

    model.requires_grad_(False)
    factors = 2 * torch.rand(1000, 3) - 1  # of new images
    x = render(factors)  # (N, 1, 16, 16)
    z, start = model.encode(x), prior('gaussian', x.shape)  # (N, 3), (N, 1, 16, 16)
    result = model.generate(z, start)
    error = torch.stack([(result - x).square().mean(), (x.mean(0) - x).square().mean()])
    print('PSNR {:.1f} dB, of the mean image {:.1f} dB'.format(*10 * torch.log10(4 / error)))
    # The change of each image if one factor alone came from the image before it.
    way = torch.stack([render(torch.where(row, factors.roll(1, 0), factors)) - x
                       for row in torch.eye(3).bool()])  # (factor, N, 1, 16, 16)
    mixture = torch.linalg.qr(torch.randn(3, 3)).Q  # a control: other coordinates of the latents
    for name, q in ('mixture', mixture), ('part', torch.eye(3)):
        step = (z.roll(1, 0) - z) @ q  # (N, 3), in the coordinates q: one of them is exchanged
        mixed = torch.stack([model.generate(z + step[:, k:k + 1] * q[:, k], start)
                             for k in range(3)])  # (part, N, 1, 16, 16)
        moved = torch.einsum('pnchw,fnchw->pf', mixed - result, way)
        moved /= way.square().sum((1, 2, 3, 4))  # (part, factor): 0 it stays, 1 it arrives
        print(f'one {name} from another image moves bar 1, bar 2 and the light by')
        print(*['  {:5.2f} {:5.2f} {:5.2f}'.format(*row) for row in moved.tolist()], sep='\n')

    h = model.of_z(z[:10])  # (10, 3, 256)
    gradient = torch.func.jacrev(lambda x: model.energies(x, h).sum(0))(start[:10])  # (3, 10, ...)
    rows = [x[:10], result[:10], *-.4 * gradient, x.roll(1, 0)[:10], *mixed[:, :10]]
    names = ['image', 'reconstruction', *[f'-dE/dx of part {k}' for k in (1, 2, 3)],
             'other image', *[f'part {k} from it' for k in (1, 2, 3)]]
    save_grid(torch.cat(rows), f'{args.out}/comet.png', 10, __doc__.split('\n')[0], names)


if __name__ == '__main__':
    with user_mistakes():
        main()
