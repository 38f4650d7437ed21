"""Learning from incomplete data: hidden pixels of the training images are recovered in training.

    python .github/lessons/incomplete.py --out runs/lessons              two minutes on one core

The hidden pixels of the training images are NaN, so any code that used one would give NaN. Two
Langevin dynamics follow one energy (Xie, Zhu and Wu 2017):

    a <- a - s dE/dx(a) + noise       of all pixels, from noise: samples
    b <- b - s dE/dx(b) + noise       of the hidden pixels, from the incomplete image: recovery

If a follows p and b follows p given the visible pixels, -T log p(visible pixels) has the gradient
mean grad E(b) - mean grad E(a). Here the matching term of train.py does most of the work, around b
and for dE/dx at visible pixels, as hidden ones hold the model's own guesses: 21.5 of 23.3 dB are
there (seed 0) before any a is drawn. In the last third of the updates the gap, E(b) - E(a) times
.1, joins.

Digits, 1,257 images, seeds 0 to 2: 23.2 dB for random (mean fill 10.0, total variation 20.0). Seed
0 has 15.3 for half, where the mean of the class has 17.1 and a model of complete images 18.4.
"""
import os
import sys
from functools import partial

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import DataError, check_apart, load_data, save_grid  # noqa: E402
from generate import psnr  # noqa: E402
from model import CommandLine, EnergyModel, number, user_mistakes  # noqa: E402
from sampler import Reservoir, chain_settings, prior, sgld, temperature  # noqa: E402
from train import CLIP_NORM, l2_step, matching_step, px_step, pyx_step, ways_to_noise  # noqa: E402


def hidden_pixels(mask, shape):
    """Bool (N, C, H, W). left and centre are hidden in all images, so nobody can learn them."""
    row, column = (torch.linspace(-1, 1, side) for side in shape[2:])  # (H,), (W,)
    masks = {'random': torch.rand(shape[0], 1, *shape[2:]) < .5,  # (N, 1, H, W)
             'half': column * torch.randn(shape[0], 1, 1, 1) < 0,  # a half, (N, 1, 1, W)
             'left': column < 0,
             'centre': (row[:, None].abs() < .5) & (column.abs() < .5)}  # (H, W)
    return masks[mask].expand(shape)


def learn(x, y, model, sampler, updates):
    """Recover x (N, C, H, W), NaN where hidden: x after each third of the updates. y: labels."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0., .999))
    reservoir = Reservoir([128] * (int(y.max()) + 1), x.shape[1:], device=x.device)
    settings, stages = chain_settings(sampler, 'training'), {}
    recovered = torch.where(x.isnan(), prior('gaussian', x.shape, device=x.device), x)
    for step in (bar := trange(1, updates + 1)):
        i = torch.arange(32 * step, 32 * step + 32, device=x.device) % len(x)  # (B,)
        hidden = x[i].isnan()  # (B, C, H, W)
        energy = partial(model.energy, y=y[i])  # E(x, y)
        # b: Langevin dynamics of the hidden pixels, from the image as it was recovered last
        b = sgld(energy, recovered[i], free=hidden, **settings | {'steps': 5})  # (B, C, H, W)
        recovered[i] = b
        logits = model.get_logits(b)  # (B, K)
        loss = 3 * pyx_step(logits, y[i])
        # the matching term around b: all pixels get noise, but x holds the visible ones only
        away = ways_to_noise(b, 'mixed', None)  # (B, C, H, W)
        moved = b + away
        loss += 10 * matching_step(lambda v: energy(torch.where(hidden, moved, v)), b,
                                   away.masked_fill(hidden, 0), sampler['slope'])
        if step > updates * 2 // 3:  # before, low E(b) would keep wrong pixels where they are
            # a: Langevin dynamics of all pixels, from stored chains that began in noise
            start, slot = reservoir.draw(y[i])  # (B, C, H, W), (B,)
            a = sgld(energy, start, **settings)
            reservoir.store(slot, a)
            e_b, e_a = model.energy_of_logits(logits), model.energy(a)  # (B,), (B,)
            loss += .1 * (px_step(e_b, e_a) + .1 * l2_step(e_b, e_a))
        optimizer.param_groups[0]['lr'] = 4e-3 * min(step / 200, .5, 1 - step / (updates + 1))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        bar.set_postfix(loss=loss.item(), refresh=False)
        if step in (updates // 3, updates * 2 // 3, updates):
            stages[f'update {step}'] = recovered.clone()
    return stages


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument('--data', default='digits', help='name or path of the data set')
    parser.add_argument('--data-root', default='.data', help='folder of downloads')
    parser.add_argument('--mask', choices=['random', 'half', 'left', 'centre'], default='random')
    parser.add_argument('--updates', type=number(int, 3), default=800, help='of the weights')
    parser.add_argument('--out', default='.', help='folder to write into')
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    check_apart(args.out, args.data)
    data = load_data(args.data, data_root=args.data_root, seed=args.seed)
    original, y = data.train.to(args.device).batch(torch.randperm(len(data.train)))
    hidden = hidden_pixels(args.mask, original.shape).to(args.device)  # (N, C, H, W)
    seen = original.masked_fill(hidden, torch.nan)  # training gets no more than this
    sampler = {'steps': 20, 'step_size': None, 'noise': .02, 'grad_clip': None, 'matching': 10.,
               'slope': 40., 'pixels': seen[0].numel()}  # as train.py
    model = EnergyModel(len(data.class_names), seen.shape[1], 32, temperature(sampler),
                        args.precision).to(args.device)
    stages = learn(seen, y, model, sampler, args.updates)
    test, labels = data.test.to(args.device).batch(slice(None))
    model.requires_grad_(False)
    hits = model.get_logits(test).argmax(1) == labels  # (M,)
    mean = torch.where(hidden, seen.nanmean((1, 2, 3), keepdim=True), seen)
    columns = {'original': original, 'seen': seen.nan_to_num(0), 'mean fill': mean, **stages}
    scores = [f'{head} {psnr(columns[head], original, hidden).mean():.2f}' for head in columns][2:]
    title = f'hidden pixels in dB: {", ".join(scores)}\ntest accuracy {hits.float().mean():.4f}'
    columns['sample'] = sgld(partial(model.energy, y=y[:8]), torch.zeros_like(original[:8]),
                             **chain_settings(sampler, 'sampling'))
    grid = torch.stack([x[:8] for x in columns.values()], dim=1).flatten(0, 1)
    save_grid(grid, f'{args.out}/incomplete.png', len(columns), title, heads=list(columns))
    print(title)


if __name__ == '__main__':
    with user_mistakes(DataError):
        main()
