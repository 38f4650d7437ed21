"""Maximum likelihood of images at T = 1: do chains, E and p(y|x) belong together?

    python .github/lessons/joint.py --out runs/lessons        an hour on one core, minutes on a GPU

Digits (16 x 16) plus noise t have a density. t is a Student-t of scale S0 whose degrees of freedom
are the number of pixels, N, so it is nearly normal. Up to a constant its energy around an image at
distance d, the root mean square over the pixels, is N log(S0^2 + d^2). So the model is

    p(x, y) = softmax(g(x))[y] exp(-E(x)) / Z,      E(x) = N log(S0^2 + u(x)^2)

where the network learns u, the distance from the images, and g, the classes.

1. Matching: at x + s xi, with s from S0 / 2 to 1, dE/dx learns to be the gradient of the valley
   around x, and S0^2 + u^2 to be S0^2 + s^2. Between images it learns a mean of their
   valleys, which need not be the gradient of any log p. The cross-entropy of g is added.
2. Maximum likelihood, beside matching: GAP (mean E(x) - mean E(x')) is added, where x are noisy
   images, and x' persistent chains that follow exp(-E): the lectures' SGLD, at T = 1.
3. Such chains from unseen images: do their mean distance and energy stay as they are? If
   data were draws from exp(-E) / Z they would. But chains that stay are no proof.
4. log Z by annealed importance sampling (AIS, Neal 2001), by `hmc`. It starts in exact draws of the
   Student-t of scale 1, E_q(x) = N log(1 + |x|^2 / N), whose Z is known. Levels 0 to 1 turn E_q
   into N log(1 + u^2); levels 1 to 2 narrow the valleys from 1 to S0. The estimate of Z is right
   on average, so that of log Z is too low, and the more so, the more the weights differ. The way
   up, from the chains of step 3, gives a log Z that would be too high, were they exact draws.
"""
import argparse
import math
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, softplus
from tqdm import tqdm

sys.path.append(os.getcwd())  # the six files; run from their folder
from data import DataError, load_data, save_grid  # noqa: E402
from model import EnergyModel, choose_device, user_mistakes  # noqa: E402
from ood import reliability  # noqa: E402
from sampler import CudaGraph, hmc, randn, sgld  # noqa: E402
from train import px_step  # noqa: E402

S0 = .1  # scale of the noise
GAP = .02  # weight of the gap
BATCH, CHAINS, K = 64, 512, 20  # of an update; persistent chains; their steps in an update
STEP = .1  # eta / 2 in units of the squared width of the valleys
LENGTHS = [0, 100, 1000, 10000]  # steps after which chains are looked at
SHOWN, LEVELS = 64, 800  # chains of steps 3 and 4, and levels of AIS


class Valleys(EnergyModel):
    """u(x) is made of the first of K + 1 outputs; the others are g(x)."""

    def __init__(self, num_classes, channels):
        super().__init__(num_classes + 1, channels)
        torch.nn.init.zeros_(self.head.bias)

    def outputs(self, x):
        """u (B,) and g (B, K)."""
        logits = self.get_logits(x)  # (B, K + 1)
        far = x.square().mean(dim=(1, 2, 3)).clamp_min(1).sqrt() - 1  # (B,), 0 near images
        return far + softplus(10 * logits[:, 0]), logits[:, 1:]  # 10: u spans decades

    def energy(self, x, width=S0):
        """E(x), with other valleys than those of width S0 on the path of AIS."""
        return x[0].numel() * (width ** 2 + self.outputs(x)[0] ** 2).log()  # (B,)

    def path_energy(self, x, level):
        """Of the densities from the Student-t, level 0, to the model, level 2: (B,)."""
        if level >= 1:
            return self.energy(x, width_at(level))
        q = x[0].numel() * x.square().mean(dim=(1, 2, 3)).log1p()  # N log(1 + |x|^2 / N), (B,)
        return (1 - level) * q + level * self.energy(x, 1.)

    def denoise(self, x):
        """The middle of the valley, x - (S0^2 + u^2) dE/dx / 2."""
        x = x.detach().requires_grad_()
        energy = self.energy(x)
        gradient, = torch.autograd.grad(energy.sum(), x)  # (B, C, H, W)
        r2 = (energy / x[0].numel()).exp().view(-1, 1, 1, 1)  # S0^2 + u^2
        return (x - r2 * gradient / 2).detach()


def width_at(level):
    """Of the valleys: 1 up to level 1, then falling to S0."""
    return S0 ** max(0., level - 1)


def student(shape, scale, generator):
    """Exact draws of a Student-t of N degrees of freedom, (B, C, H, W)."""
    z = randn(shape, generator, generator.device)
    n = z[0].numel()
    chi2 = randn((len(z), n), generator, z.device).square().sum(1)  # (B,)
    return scale * z * (n / chi2).sqrt().view(-1, 1, 1, 1)


def log_z_student(n):
    """log Z of E(x) = n log(1 + |x|^2 / n) in n dimensions."""
    return math.lgamma(n / 2) - math.lgamma(n) + n / 2 * math.log(math.pi * n)


def matching_loss(model, x, y, generator):
    """How far dE/dx is from the gradient of the valley, and r = sqrt(S0^2 + u^2) from its size, on
    the scale of r; and the cross-entropy."""
    t = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    s = S0 / 2 * (2 / S0) ** t  # (B, 1, 1, 1), from S0 / 2 to 1
    xi = randn(x.shape, generator, x.device)  # (B, C, H, W)
    r = (S0 ** 2 + s ** 2).sqrt()
    noisy = (x + s * xi).requires_grad_()
    u, g = model.outputs(noisy)
    log_r = (S0 ** 2 + u ** 2).log() / 2  # (B,), E / 2N
    gradient, = torch.autograd.grad(x[0].numel() * log_r.sum(), noisy, create_graph=True)
    return (10 * (r * gradient - s / r * xi).square().mean()
            + (log_r - r.flatten().log()).square().mean() + .3 * cross_entropy(g, y))


def learn(model, x, y, updates, rate, chains, generator):
    """Adam, with a rate that falls to 0; by maximum likelihood, too, if there are `chains`."""
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0., .999))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1., (k + 1) / 100) * (1 - k / updates))
    sample, places = chain(model, generator), torch.arange(BATCH, device=x.device)
    bar, numbers = tqdm(range(updates), unit='update'), {}
    for update in bar:
        i = torch.randint(len(x), (BATCH,), generator=generator, device=x.device)
        loss = numbers['loss'] = matching_loss(model, x[i], y[i], generator)
        if chains is not None:
            slot = (update * BATCH + places) % len(chains)  # (B,)
            chains[slot] = x_synth = sample(chains[slot])  # (B, C, H, W)
            x_real = x[i] + student(x[i].shape, S0, generator)  # (B, C, H, W)
            numbers['gap'] = px_step(model.energy(x_real), model.energy(x_synth))
            loss = loss + GAP * numbers['gap']
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.)
        optimizer.step()
        decay.step()
        if update % 100 == 99:
            bar.set_postfix({key: f'{value.item():.2f}' for key, value in numbers.items()})


def chain(model, generator):
    """K steps of SGLD at T = 1, on a GPU as one CUDA graph: (B, C, H, W) -> (B, C, H, W)."""
    move = partial(sgld, model.energy, steps=K, step_size=STEP * S0 ** 2, clamp=None,
                   generator=generator)
    return CudaGraph(move, generator) if generator.device.type == 'cuda' else move


def anneal(model, x, levels, generator):
    """AIS of chains x through the levels: the log of the mean weight, which estimates log Z(last) -
    log Z(first), the last states, and the standard deviation of the log weights."""
    log_w = torch.zeros(len(x), device=x.device)
    for before, level in pairwise(levels):
        log_w += model.path_energy(x, before) - model.path_energy(x, level)
        x, _ = hmc(partial(model.path_energy, level=level), x, 1, STEP * width_at(level) ** 2,
                   clamp=None, generator=generator, leapfrog=5)
    return (log_w.logsumexp(0) - math.log(len(x))).item(), x, log_w.std()


def evaluate(model, x, y, train, generator):
    """Steps 3 and 4 with unseen noisy images x (N, C, H, W). Returns rows of 12 denoised states."""
    states = {}

    def look(name, x, y=None):
        clean = model.denoise(x)  # (B, C, H, W)
        distance = torch.cdist(clean.flatten(1), train.flatten(1)).amin(1) / x[0].numel() ** .5
        numbers = {'distance': distance.mean(), 'E': model.energy(x).mean()}
        if y is not None:
            numbers['label kept'] = (model.outputs(x)[1].argmax(1) == y).float().mean()
        states[name] = clean[:12]
        tell(name, numbers)

    g = model.outputs(x)[1]  # (N, K)
    tell('unseen images', {'accuracy': (g.argmax(1) == y).float().mean(),
                           'ECE': reliability(g.cpu(), y.cpu())[0]})
    chains, y, move = x[:SHOWN], y[:SHOWN], chain(model, generator)
    look('at the start', chains, y)
    for before, length in pairwise(LENGTHS):
        for _ in range(before, length, K):
            chains = move(chains)
        look(f'after {length} steps', chains, y)
    levels = torch.linspace(0, 2, LEVELS + 1).tolist()
    down, drawn, spread = anneal(model, student(chains.shape, 1., generator), levels, generator)
    look('AIS, from noise', drawn)
    up, _, spread_up = anneal(model, chains, levels[::-1], generator)
    log_z = log_z_student(x[0].numel())
    tell('log Z', {'down': log_z + down, 'spread of weights': spread, 'up': log_z - up,
                   'spread': spread_up})
    tell('log p', {'of unseen images, at most': -model.energy(x).mean() - log_z - down})
    return states


def tell(name, numbers):
    tqdm.write(f'{name:>18}  ' + '  '.join(f'{key} {value:.3f}' for key, value in numbers.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag('--out', type=Path, default='.', help='folder to write into')
    flag('--data', default='digits', help='as in train.py')
    flag('--size', type=int, default=16, help='of the images, in pixels')
    flag('--seed', type=int, default=0, help='random seed')
    flag('--updates', type=int, default=6000, help='of matching alone')
    flag('--likelihood', type=int, default=4000, help='further ones with the gap')
    flag('--device', type=choose_device, default='auto', help='cpu or cuda; auto: the fastest')
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)  # the initial weights
    generator = torch.Generator(args.device).manual_seed(args.seed)
    data = load_data(args.data, args.size, seed=args.seed)
    train, y = data.train.to(args.device).batch(slice(None))  # (N, C, H, W), (N,)
    test, y_test = data.test.to(args.device).batch(slice(None))
    test = test + student(test.shape, S0, generator)
    model = Valleys(len(data.class_names), train.shape[1]).to(args.device)
    noisy = train[torch.arange(CHAINS, device=train.device) % len(train)]  # (M, C, H, W)
    chains, rows = noisy + student(noisy.shape, S0, generator), {}
    for phase, updates, rate, start in [('matching', args.updates, 1e-3, None),
                                        ('likelihood', args.likelihood, 3e-4, chains)]:
        model.requires_grad_(True)
        learn(model, train, y, updates, rate, start, generator)
        model.requires_grad_(False)
        tqdm.write(f'after {updates} updates of {phase}:')
        states = evaluate(model, test, y_test, train, generator)
        rows |= {f'{phase}: {name}': state for name, state in states.items()}
    save_grid(torch.cat(list(rows.values())).cpu().clamp(-1, 1), args.out / 'joint.png', 12,
              'chains at T = 1 from unseen images, and from noise by AIS (denoised)', rows=rows)


if __name__ == '__main__':
    with user_mistakes(DataError):
        main()
