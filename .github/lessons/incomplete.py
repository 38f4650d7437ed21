"""Learning from incomplete data: the hidden pixels of the training images are recovered meanwhile.

    python .github/lessons/incomplete.py --out runs/lessons

Of every training image some pixels are hidden for good: they are NaN, and so would be whatever read
one. Two Langevin dynamics follow the same energy (Xie, Lu, Zhu and Wu 2016):

    a <- a - s dE/dx(a) + noise       of all pixels, from noise: samples
    b <- b - s dE/dx(b) + noise       of the hidden pixels, from the incomplete image: recovery

If b follows p(hidden pixels | visible pixels) and a follows p, the gradient of -T log p(visible
pixels) is the mean of grad E(b) less that of grad E(a). So training descends E(b) - E(a), and the
cross-entropy of b. The matching term of train.py is taken around b, but for dE/dx of the visible
pixels only: for that of hidden ones it would learn its own guesses.
"""
import os
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import trange

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import DataError, load_data, save_grid  # noqa: E402
from generate import psnr  # noqa: E402
from model import CommandLine, EnergyModel, number, user_mistakes  # noqa: E402
from sampler import Reservoir, chain_settings, prior, sgld, temperature  # noqa: E402
from train import l2_step, matching_step, px_step, pyx_step, ways_to_noise  # noqa: E402


def hidden_pixels(mask, shape):
    """Bool (N, C, H, W): of each image half of the pixels or, by a coin, the left or right half; or
    of all images the left half or the centre. What no image shows cannot be learned."""
    row, column = (torch.linspace(-1, 1, side) for side in shape[2:])  # (H,), (W,)
    masks = {'random': torch.rand(shape[0], 1, *shape[2:]) < .5,  # (N, 1, H, W)
             'half': column * torch.randn(shape[0], 1, 1, 1) < 0,  # (N, 1, 1, W)
             'left': column < 0,
             'centre': (row[:, None].abs() < .5) & (column.abs() < .5)}  # (H, W)
    return masks[mask].expand(shape)


def learn(x, y, model, sampler, updates):
    """From images x (N, C, H, W), NaN where hidden, and labels y (N,). Returns recovered images, x
    without NaN, after a third, two thirds and all of the updates."""
    optimizer = torch.optim.Adam(model.parameters(), betas=(0., .999))
    reservoir = Reservoir([128] * (int(y.max()) + 1), x.shape[1:], device=x.device)
    settings, stages = chain_settings(sampler, 'training'), {}
    recovered = torch.where(x.isnan(), prior('gaussian', x.shape, device=x.device), x)
    for step in (bar := trange(1, updates + 1)):
        i = torch.arange(32 * step, 32 * step + 32, device=x.device) % len(x)  # (B,)
        energy, hidden = partial(model.energy, y=y[i]), x[i].isnan()  # E(x, y); (B, C, H, W)
        # a: Langevin dynamics of all pixels, from stored chains that began in noise
        start, slot = reservoir.draw(y[i])  # (B, C, H, W), (B,)
        a = sgld(energy, start, **settings)
        reservoir.store(slot, a)
        # b: Langevin dynamics of the hidden pixels, from the image as it was recovered last
        b = recovered[i] = sgld(energy, recovered[i], free=hidden, **settings | {'steps': 5})
        # descent on E(b) - E(a), on the cross-entropy of b, and on the matching term around b
        logits = model.get_logits(b)  # (B, K)
        e_b, e_a = model.energy_of_logits(logits), model.energy(a)  # (B,), (B,)
        away = ways_to_noise(b, 'mixed', None)  # (B, C, H, W)
        noisy = b + away  # in all pixels, but the loss sees dE/dx of the visible ones only
        loss = px_step(e_b, e_a) + .1 * l2_step(e_b, e_a) + 3 * pyx_step(logits, y[i])
        loss = loss + 10 * matching_step(lambda x: energy(torch.where(hidden, noisy, x)), b,
                                         away.masked_fill(hidden, 0), sampler['slope'])
        optimizer.param_groups[0]['lr'] = 4e-3 * min(step / 200, .5, 1 - step / (updates + 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(gap=px_step(e_b, e_a).item(), loss=loss.item(), refresh=False)
        if step in (updates // 3, updates * 2 // 3, updates):
            stages[f'update {step}'] = recovered.clone()
    return stages


def main(argv=None):
    parser = CommandLine(__doc__)
    flag = parser.add_argument
    flag('--data', default='digits', help='name or path of the data set, see data.py')
    flag('--data-root', default='.data', help='folder of downloads and of the letterpress')
    flag('--mask', choices=['random', 'half', 'left', 'centre'], default='random', help='hidden')
    flag('--updates', type=number(int, 3), default=1200, help='of the weights')
    flag('--out', type=Path, default='.', help='folder to write into')
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    with user_mistakes(DataError):
        data = load_data(args.data, data_root=args.data_root, seed=args.seed)
        original, y = data.train.to(args.device).batch(torch.randperm(len(data.train)))
        hidden = hidden_pixels(args.mask, original.shape).to(args.device)  # (N, C, H, W)
        seen = original.masked_fill(hidden, torch.nan)  # training gets no more than this
        sampler = {'steps': 20, 'step_size': None, 'noise': .02, 'grad_clip': None,
                   'matching': 10., 'slope': 40., 'pixels': seen[0].numel()}  # as train.py
        model = EnergyModel(len(data.class_names), seen.shape[1],
                            temperature=temperature(sampler), precision=args.precision)
        stages = learn(seen, y, model.to(args.device), sampler, args.updates)
        test, labels = data.test.to(args.device).batch(slice(None))
        hits = model.requires_grad_(False).get_logits(test).argmax(1) == labels  # (M,)
        mean = torch.where(hidden, seen.nanmean((1, 2, 3), keepdim=True), seen)
        fills = {'mean fill': mean, **stages}
        scores = [f'{name} {psnr(x, original, hidden).mean():.2f}' for name, x in fills.items()]
        title = f'Hidden pixels: PSNR {", ".join(scores)} dB; test accuracy {hits.float().mean():.4f}'
        sample = sgld(partial(model.energy, y=y[:8]), 0 * original[:8],
                      **chain_settings(sampler, 'sampling', 128))
        columns = {'original': original, 'seen': seen.nan_to_num(0), **fills, 'sample': sample}
        grid = torch.stack([x[:8] for x in columns.values()], dim=1).flatten(0, 1)
        save_grid(grid, args.out / 'incomplete.png', len(columns), title, heads=list(columns))
    print(title)


if __name__ == '__main__':
    main()
