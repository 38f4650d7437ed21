"""Train an energy-based model (EBM) or a joint energy-based model (JEM) by maximum likelihood, with SGLD for the samples.

    python train.py                                  letterpress, a JEM, 60 epochs
    python train.py --data digits                    minutes on a laptop
    python train.py --data GLYPHS --epochs 60 --device cuda
    python train.py --resume                         go on with the run in this folder
    torchrun --nproc-per-node 4 train.py             a process a GPU, or on the CPU, sharing every batch

Writes best.pt, last.pt, log.csv, curves.png and samples/ into --out. best.pt is the epoch with the highest score on the
validation data: for a JEM the mean of val_auprc (macro AUPRC of p(y|x) over the classes) and val_auroc (the energy of
images against half-and-half mixtures of them and uniform noise); an EBM goes by val_auroc, a classifier by val_auprc.
"""
import argparse
import contextlib
import copy
import math
import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import NAMES, DataError, atomic_write, check_apart, load_data, same_data, save_figure, save_grid, write_csv
from model import (CheckpointError, CommandLine, EnergyModel, StopSignal, anywhere, average, fail, folder, gather, join_ranks,
                   leave_ranks, mistakes_told, rank, ranks, read_checkpoint, real, save_checkpoint, whole)
from sampler import Recorded, Reservoir, annealed, prior, sgld

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What `update` returns and the log averages over an epoch. loss_px is the energy gap E(data) - E(samples); saturated is
# the share of pixels at -1 or 1 in samples beyond that in data, energy_std how much the energies of both differ.
AVERAGES = ['loss', 'loss_px', 'loss_pyx', 'loss_reg', 'loss_matching', 'energy_real', 'energy_synth', 'energy_std',
            'train_accuracy', 'saturated', 'grad_norm']
ROUND, WHITE = .3, .5  # the radius of the energy's valleys at the bottom and the strongest noise there, in units of [-1, 1]
OUTPUTS = ['best.pt', 'last.pt', 'log.csv', 'curves.png']
COLUMNS = ['epoch', 'step', 'seconds', 'lr', *AVERAGES, 'val_accuracy', 'val_auprc', 'val_auroc', 'event']


# --- the two losses -----------------------------------------------------------------------------------------------------

def px_step(logits_real, logits_synth):
    """The contrastive term, whose gradient is that of -log p(x), and the size of the energies (course task 3.4).

        grad -log p(x) = grad E(x) - E_{x' ~ p}[grad E(x')]        so   loss = mean E(x_real) - mean E(x_synth)

    This is exact for x' ~ p. Chains with less noise than sqrt(2 * step_size) draw from a colder law, near the modes of p.

    Args:
        logits_real, logits_synth: f(x)[y] (B, K) of data and of chains.

    Returns:
        the mean energies of data and of chains, and the mean squares of both added up: without that L2 term only
        differences of energies would be held, and their level would drift (Du and Mordatch 2019).
    """
    e_real, e_synth = -logits_real.logsumexp(1), -logits_synth.logsumexp(1)  # (B, K) -> (B,)
    return e_real.mean(), e_synth.mean(), e_real.square().mean() + e_synth.square().mean()


def pyx_step(logits, y):
    """-log p(y|x) = cross-entropy of softmax f(x)[y] (course task 3.4): logits (B, K), labels (B,) -> scalar."""
    return F.cross_entropy(logits, y)


def matching_step(energy, x_real, away, slope):
    """How far the energy is from rising with the distance to the data, by `slope` for each unit of it: a scalar >= 0.

    At x + away let r be the distance from x (root mean square of `away` over the pixels). The wanted energy is a valley,
    slope * sqrt(r^2 + ROUND^2): round at the bottom, then rising at a constant slope. Only gradients are compared, so where
    data lie close together their valleys melt into one, as in denoising score matching (Vincent 2011, over many noise
    levels Li et al. 2019; on the way from x to noise equilibrium matching, Wang and Du 2025).

    Args:
        energy: callable, (B, C, H, W) -> (B,).
        x_real, away: images and ways to go from them, (B, C, H, W) both.
    """
    x = (x_real + away).requires_grad_()
    gradient, = torch.autograd.grad(energy(x).sum(), x, create_graph=True)  # (B, C, H, W)
    r = away.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # (B, 1, 1, 1)
    wanted = away / (r ** 2 + ROUND ** 2).sqrt()  # N / slope times the gradient of the valley, for N pixels
    return (gradient * x_real[0].numel() / slope - wanted).square().mean()


def ways_to_noise(x_real, kind, generator):
    """Ways (B, C, H, W) to go from images for `matching_step`. Half of them lead to a `prior` z, t (z - x) with t uniform in
    [0, 1], as chains do the other way; and all end in white noise of a standard deviation up to WHITE, or fine grain, which
    is a small part of those ways, would be learned last, and chains would leave it on the paper."""
    t, s = (torch.rand(len(x_real), 1, 1, 1, generator=generator, device=x_real.device) for _ in range(2))  # (B, 1, 1, 1)
    z = prior(kind, x_real.shape, generator, x_real.device)  # (B, C, H, W)
    white = torch.randn(x_real.shape, generator=generator, device=x_real.device)
    return (2 * t - 1).clamp_min(0) * (z - x_real) + WHITE * s * white


# --- one update: the algorithm box --------------------------------------------------------------------------------------

def update(run, x_real, y):
    """One step up log p(x, y) = log p(x) + log p(y|x), each with its weight; returns what the log averages.

    Algorithm 1 of JEM (Grathwohl et al. 2020): draw chains, move them by SGLD, contrast data with them, classify the data.
    What is added to it are the L2 term on the energies and `matching_step`, which keeps them such that chains can follow.
    With --pyx-weight 1, --alpha 0, --matching 0 and chains that sample exactly it would be maximum likelihood.
    """
    args = run.args
    x_synth = draw_samples(run, x_real, y) if args.px_weight else x_real[:0]  # a plain classifier has none

    images = torch.cat([x_real, x_synth])  # (2B, C, H, W), one pass through the network for both
    noise = torch.randn(images.shape, generator=run.generator, device=images.device)
    images = (images + args.data_noise * noise).clamp(-1, 1)  # equally noisy: no telling apart by that
    logits = run.model.get_logits(images)  # (2B, K)
    logits_real, logits_synth = logits[:len(y)], logits[-len(y):]  # (B, K) both
    e_real, e_synth, squares = px_step(logits_real, logits_synth)
    gap = e_real - e_synth
    loss_reg = args.alpha * squares
    loss_pyx = pyx_step(logits_real, y)

    loss_matching = torch.zeros_like(loss_pyx)
    if args.px_weight and args.matching:
        away = ways_to_noise(x_real, args.prior, run.generator)  # (B, C, H, W)
        loss_matching = args.matching * matching_step(lambda x: run.energy(x, y), x_real, away, args.slope)

    loss = args.px_weight * (gap + loss_reg + loss_matching) + args.pyx_weight * loss_pyx

    energy_std = logits.logsumexp(1).std(correction=0)  # (2B, K) -> (2B,) -> ()
    accuracy = (logits_real.argmax(1) == y).float().mean()
    at_limit = (images.abs() == 1).float().mean(dim=(1, 2, 3))  # (2B,)
    saturated = at_limit[-len(y):].mean() - at_limit[:len(y)].mean()
    numbers = torch.stack([loss, gap, loss_pyx, loss_reg, loss_matching, e_real, e_synth, energy_std, accuracy,
                           saturated]).detach()

    run.optimizer.zero_grad()
    loss.backward()
    average([numbers, *(weight.grad for weight in run.model.parameters())])
    grad_norm = clip_grad_norm_(run.model.parameters(), args.clip_norm)
    run.optimizer.step()
    run.average_weights()
    return torch.cat([numbers, grad_norm[None]])


def draw_samples(run, x_real, y):
    """Chains x' (B, C, H, W), moved by K steps of SGLD (course task 3.3)."""
    if run.args.init == 'data':  # contrastive divergence (Hinton 2002): chains start in the data and are forgotten
        return run.move(x_real, y)
    ring = y if run.args.conditional else torch.zeros_like(y)  # (B,)
    x, slot = run.reservoir.draw(ring, run.generator)
    x = run.move(x, y)
    run.reservoir.store(slot, x)
    return x


# --- a run and its state ------------------------------------------------------------------------------------------------

class Run:
    """Everything a run changes as it goes: saved in last.pt, so that a resumed run is the unbroken one, on a CPU bit by bit."""

    def __init__(self, args, data):
        device = args.device
        torch.manual_seed(args.seed)  # the initial weights
        self.args, self.signature = args, data.signature()
        self.generator = torch.Generator(device).manual_seed(args.seed + rank() * 10 ** 6)  # everything random afterwards
        channels, size = data.train.images.shape[1:3]
        num_classes = len(data.class_names) if args.model == 'jem' else 1
        self.model = EnergyModel(num_classes, channels, args.width, args.precision).to(device)
        self.ema = copy.deepcopy(self.model)  # the averaged weights, which are validated and saved
        # No momentum: what it remembers was said of chains that have moved on since.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, betas=(0., .999), fused=True)
        step_size = args.step_size  # by default one that moves pixels by .1, root mean square, at the slope of the valleys
        step_size = .1 * channels * size * size / args.slope if step_size is None else step_size
        self.sgld_settings = {'step_size': step_size, 'noise': args.noise, 'grad_clip': args.grad_clip}
        lengths = [args.batch_size // ranks()] * (num_classes if args.conditional else 1)
        if args.init == 'reservoir' and args.conditional:
            share = data.train.labels.bincount(minlength=num_classes) / len(data.train)  # (K,)
            # Rings as long as their class is frequent turn equally fast; a batch holds fewer than 16 of a rare class.
            lengths = (share * args.reservoir / ranks()).ceil().long().clamp_min(16).tolist()
        elif args.init == 'reservoir':
            lengths = [max(args.reservoir, args.batch_size) // ranks()]
        reinit = {'reservoir': args.reinit, 'noise': 1.}.get(args.init, 0.)
        self.reservoir = Reservoir(lengths, (channels, size, size), reinit, args.prior, self.generator, device)
        self.recorded = Recorded(self.walk, self.generator) if device.type == 'cuda' and args.graph else None
        self.epoch, self.position = 0, 0  # finished epochs, and updates done in the current one
        self.sums = torch.zeros(len(AVERAGES), device=device)  # of what `update` returned in the current epoch
        self.checked = self.sums.clone()  # the same when the guard last looked
        self.norms, self.trips, self.events = [], 0, []  # the guard's: lengths of gradients, how often it tripped and why
        self.seconds, self.best, self.rows = 0., -math.inf, []

    def energy(self, x, y):
        """E(x), or E(x, y) for --conditional: with y as frequent as in the data, x' ~ p(x|y) is x' ~ p(x), if p(y) is right."""
        return self.model.energy(x, y if self.args.conditional else None)  # (B, C, H, W), (B,) -> (B,)

    def walk(self, x, y):
        """K steps of SGLD from x (B, C, H, W), for labels y (B,)."""
        return sgld(lambda x: self.energy(x, y), x, self.args.sgld_steps, generator=self.generator, **self.sgld_settings)

    def move(self, x, y):
        """The same, on a GPU as a CUDA graph."""
        if not self.recorded:
            return self.walk(x, y)
        try:
            return self.recorded(x, y)
        except torch.OutOfMemoryError:
            raise  # another mistake
        except RuntimeError as error:
            reason = str(error.__context__ or error).split('\n')[0]
            fail(f'--graph: {reason}; leave the CUDA graph out with --no-graph')

    @torch.no_grad()
    def average_weights(self):
        """ema <- d ema + (1 - d) weights. (torch's AveragedModel makes the CPU wait for a GPU in every call.)"""
        for averaged, weight in zip(self.ema.parameters(), self.model.parameters()):
            averaged.lerp_(weight, 1 - self.args.ema)

    PARTS = ['model', 'ema', 'optimizer']
    VALUES = ['epoch', 'position', 'sums', 'checked', 'norms', 'trips', 'events', 'seconds', 'best',
              'rows']

    def state_dict(self):
        reservoir = {key: value.cpu() for key, value in self.reservoir.state_dict().items()}
        own = {'reservoir': reservoir, 'generator': self.generator.get_state(), 'device': self.args.device.type}
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS},
                **{name: getattr(self, name) for name in self.VALUES}, 'ranks': gather(own)}

    def load_state_dict(self, state):
        if [own['device'] for own in state['ranks']] == [self.args.device.type] * ranks():
            self.reservoir.load_state_dict(state['ranks'][rank()]['reservoir'])
            self.generator.set_state(state['ranks'][rank()]['generator'])
        else:
            say('another number of processes or kind of device than before: going on with other random numbers')
            self.reservoir.deal([own['reservoir'] for own in state['ranks']], rank(), ranks())
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.VALUES:
            value = state[name]
            setattr(self, name, value.to(self.args.device) if torch.is_tensor(value) else value)


def train(args, data):
    """The hand-written loop: epochs of updates, each epoch validated, logged and saved. Returns the exit status."""
    run = Run(args, data)
    if args.resume:
        resume(run, data)
    if rank() == 0:
        remove_files(args.out, old_run=args.overwrite)
    train_split, val_split = data.train.to(args.device), data.val.to(args.device)
    save_run(run, data)  # a folder that cannot be written is told now, not after an epoch
    if args.model == 'ebm':
        train_split.labels = torch.zeros_like(train_split.labels)  # one logit, no labels
    updates = len(train_split) // args.batch_size  # in an epoch; the few images that are left over change every time
    bar = tqdm(total=args.epochs * updates, initial=run.epoch * updates + run.position, unit='update', mininterval=1.,
               disable=rank() > 0)
    with bar, StopSignal() as stop:
        stopping = False
        while run.epoch < args.epochs and not stopping:
            started, trouble = time.monotonic(), ''
            if run.position == 0:
                run.sums, run.checked = torch.zeros_like(run.sums), torch.zeros_like(run.sums)
            order = shuffle(train_split, args.seed, run.epoch)
            for batch in order.split(args.batch_size)[run.position:updates]:  # (B,) positions in the training split
                set_learning_rate(run, updates)
                run.sums += update(run, *train_split.batch(batch[rank()::ranks()]))
                run.position += 1
                bar.update()
                stopping = anywhere(stop.asked)
                if stopping or run.position % CHECK_EVERY == 0 or run.position == updates:
                    trouble = check(run, bar)
                if stopping or trouble or run.position % SAVE_EVERY == 0:
                    break
            run.seconds += time.monotonic() - started
            if run.position == updates and not trouble:
                trouble = finish_epoch(run, data, val_split)
            if trouble:
                recover(run, trouble)
                bar.n = run.epoch * updates + run.position
            save_run(run, data)
    return stop.status


def shuffle(split, seed, epoch):
    """The order of the images in an epoch, the same in every process and after every resume."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(len(split), generator=generator).to(split.labels.device)  # (N,)


def set_learning_rate(run, updates):
    """A linear warm-up over the first updates, then a factor --lr-decay an epoch."""
    warmup = min(1., (run.epoch * updates + run.position + 1) / run.args.warmup)
    for group in run.optimizer.param_groups:
        group['lr'] = run.args.lr * warmup * run.args.lr_decay ** run.epoch * RETREAT ** run.trips


# --- the guard: what to do when training diverges -----------------------------------------------------------------------

CHECK_EVERY = 10  # updates; reading numbers makes the CPU wait for a GPU, so not every time
SAVE_EVERY = 500  # updates, and at the end of an epoch: what a trip, or a machine that is switched off, costs at most
RETREAT = .3  # factor on the learning rate after each trip
FLAT = 1e-6  # nats; fresh weights give energies that differ by some 1e-5, dead ones by what float32 rounds
MOST_TRIPS = 6  # a rate of .3 ** 6, a thousandth of the wanted one, has not helped either


def check(run, bar):
    """Show the numbers of the last updates, and look for divergence in them: returns what is wrong, or ''."""
    since = run.position - (run.position - 1) // CHECK_EVERY * CHECK_EVERY  # updates since the last regular look
    now = dict(zip(AVERAGES, ((run.sums - run.checked) / since).tolist()))
    accuracy = f' accuracy {now["train_accuracy"]:.3f}' if run.args.model == 'jem' else ''
    bar.set_postfix_str(f'epoch {run.epoch + 1} gap {now["loss_px"]:+.2f}{accuracy}', False)
    usual = np.median(run.norms) if len(run.norms) >= 20 else math.inf
    if run.position % CHECK_EVERY == 0:
        run.checked, run.norms = run.sums.clone(), [*run.norms[-99:], now['grad_norm']]
    signs = {'a number is not finite': not all(map(math.isfinite, now.values())),
             'the energy gap is beyond half of 1/alpha': abs(now['loss_px']) * run.args.alpha > .5,
             'chains stick to the limits of the pixel values': now['saturated'] > .5,
             'the energy is the same for all images': run.args.px_weight and now['energy_std'] < FLAT,
             'the gradient is 20 times as long as usual': now['grad_norm'] > 20 * usual}
    watched = signs if run.args.guard else [*signs][:1]  # without the guard a run may do anything but end in NaN
    return next((sign for sign in watched if signs[sign]), '')


def recover(run, reason):
    """Go back to last.pt, saved when all was well, with other random numbers, a smaller rate, and fresh chains for any
    that are broken."""
    event = f'{reason} (epoch {run.epoch + 1}, update {run.position})'
    if run.trips == MOST_TRIPS or not run.args.guard:
        if rank() == 0:
            write_csv([*run.rows, {'epoch': run.epoch + 1, 'event': f'stopped: {event}'}], COLUMNS, run.args.out / 'log.csv')
        raise FloatingPointError(f'--lr {run.args.lr:g}: training diverged, trip {run.trips + 1}: {event}; the state '
                                 f'before that is in {run.args.out / "last.pt"}; start anew with a lower --lr, or with the '
                                 'defaults of --sgld-steps, --matching, --slope, --step-size and --noise')
    kept, moved_on = {'trips': run.trips + 1, 'events': [*run.events, event], 'seconds': run.seconds}, run.generator.get_state()
    run.load_state_dict({**read_checkpoint(run.args.out / 'last.pt')['run'], **kept})
    run.generator.set_state(moved_on)
    run.reservoir.mend(run.generator)
    say(f'guard: {event}; back to epoch {run.epoch + 1}, update {run.position}, with a learning rate '
        f'{RETREAT ** run.trips:.2g} times as high')


# --- validation, logging, saving ----------------------------------------------------------------------------------------

@torch.no_grad()
def validate(run, split):
    """Accuracy and macro AUPRC of p(y|x) on the whole split, and the AUROC of its energies against what no data set needs
    to give: as many half-and-half mixtures of two of its images, and as many images of uniform noise. None if these are not
    finite."""
    model, logits, made_up = run.ema, [], []
    generator = torch.Generator(split.labels.device).manual_seed(run.args.seed)  # the same noise in every epoch
    index = torch.arange(len(split), device=split.labels.device)
    for part, partner in zip(index.split(500), index.roll(max(1, len(index) // 3)).split(500)):
        x, other = split.batch(part)[0], split.batch(partner)[0]  # (B, C, H, W) both
        noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
        logits.append(model.get_logits(x))  # (B, K)
        made_up += [model.energy((x + other) / 2), model.energy(noise)]  # (B,) each
    logits, y = torch.cat(logits), split.labels.cpu()  # (N, K), (N,)
    energy = torch.cat([-logits.logsumexp(1), *made_up]).cpu()  # (3N,)
    if not energy.isfinite().all():
        return None
    scores = {'val_accuracy': math.nan, 'val_auprc': math.nan,
              'val_auroc': float(roc_auc_score(np.repeat([0, 1], [len(y), 2 * len(y)]), energy))}
    if run.args.model == 'jem':
        probability = logits.cpu().double().softmax(1).numpy()  # (N, K); in float32 sure answers would all be 1
        auprc = [average_precision_score(y == label, probability[:, label]) for label in y.unique().tolist()]
        scores.update(val_accuracy=(logits.argmax(1).cpu() == y).float().mean().item(), val_auprc=float(np.mean(auprc)))
    return scores


def finish_epoch(run, data, val_split):
    """Validate the averaged weights, write the log, the curves and now and then samples, and keep the best checkpoint.
    Returns what is wrong, or ''."""
    args, scores = run.args, validate(run, val_split)
    if scores is None:
        return 'the energies of validation images are not finite'
    row = {**dict(zip(AVERAGES, (run.sums / run.position).tolist())), **scores, 'event': '; '.join(run.events)}
    if not args.px_weight:  # a plain classifier has no chains
        row.update(dict.fromkeys(['loss_px', 'loss_reg', 'energy_synth', 'saturated'], math.nan))
    run.epoch, run.position, run.events = run.epoch + 1, 0, []
    row.update(epoch=run.epoch, step=run.epoch * (len(data.train) // args.batch_size), seconds=run.seconds,
               lr=run.optimizer.param_groups[0]['lr'])
    run.rows.append(row)
    if rank() > 0:
        return ''
    write_csv(run.rows, COLUMNS, args.out / 'log.csv')
    if run.epoch % args.picture_every == 0 or run.epoch == args.epochs:
        plot_curves(run.rows, args)
        if args.px_weight:
            draw_grid(run, data)
    measures = {'val_auprc': args.model == 'jem', 'val_auroc': args.px_weight}
    score = float(np.mean([row[name] for name, counts in measures.items() if counts]))
    best = score >= run.best
    if best:
        run.best = score
        with atomic_write(args.out / 'best.pt') as file:
            save_checkpoint(file, run.ema, **checkpoint_facts(run, data))
    say(f'epoch {run.epoch}: gap {row["loss_px"]:+.2f}  val accuracy {row["val_accuracy"]:.4f}  '
        f'AUPRC {row["val_auprc"]:.4f}  AUROC {row["val_auroc"]:.4f}{"  best so far" if best else ""}')
    return ''


def draw_grid(run, data):
    """samples/epoch_NNN.png: eight chains from N(0, 0.01) for each of up to twelve classes, after 256 steps of E(x, y)."""
    args, model = run.args, run.ema
    settings = {**run.sgld_settings, **({'noise': annealed(256)} if args.matching else {})}  # what is shaped bears the heat
    labels = torch.arange(min(model.settings['num_classes'], 12), device=args.device)
    y = labels.repeat_interleave(8)  # (R,) -> (8R,)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    start = prior('gaussian', (len(y), *run.reservoir.chains.shape[1:]), generator, args.device)  # (8R, C, H, W)
    x = sgld(lambda x: model.energy(x, y), start, 256, generator=generator, **settings)
    save_grid(x, args.out / 'samples' / f'epoch_{run.epoch:03d}.png', 8, f'epoch {run.epoch}: 256 steps from noise',
              rows=[data.class_names[label] for label in labels] if len(labels) > 1 else None)


def plot_curves(rows, args):
    """curves.png: the energies and their gap, the losses, and what validation says, over the epochs."""
    panels = {'energy': ['energy_real', 'energy_synth', 'loss_px'], 'loss': ['loss_pyx', 'loss_matching', 'loss_reg'],
              'validation': ['val_accuracy', 'val_auprc', 'val_auroc']}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout='constrained')
    epochs = [row['epoch'] for row in rows]
    for ax, (title, names) in zip(axes, panels.items()):
        for name in names:
            ax.plot(epochs, [row[name] for row in rows], marker='.',
                    label='energy gap' if name == 'loss_px' else name.replace('_', ' '))
        ax.set(title=title, xlabel='epoch')
        ax.legend()
    if args.alpha and args.px_weight:  # where the L2 term stops the gap of chains that have lost
        axes[0].set_title(f'energy (bound of the gap: {-1 / args.alpha:g})')
    save_figure(figure, args.out / 'curves.png')


def checkpoint_facts(run, data):
    """What a checkpoint says beside its weights: all that generate.py and ood.py need to know."""
    args = vars(run.args)
    plain = {key: str(value) if isinstance(value, (Path, torch.device)) else value for key, value in args.items()}
    plain['data_root'] = os.path.realpath(args['data_root'])  # so that ood.py finds it from any folder
    return {'args': plain, 'data': args['data'], 'class_names': data.class_names if args['model'] == 'jem' else [],
            'class_counts': data.train.labels.bincount(minlength=len(data.class_names)).tolist(), 'signature': run.signature,
            'image_size': data.train.images.shape[-1], 'sampler': run.sgld_settings, 'epoch': run.epoch}


def say(text):
    """A line on the screen, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


def save_run(run, data):
    """last.pt: the checkpoint of the averaged weights plus the whole state of the run."""
    state = run.state_dict()
    if rank() == 0:
        with atomic_write(run.args.out / 'last.pt') as file:
            save_checkpoint(file, run.ema, **checkpoint_facts(run, data), run=state)


def resume(run, data):
    """Continue the run in last.pt with the very data that it began with."""
    path = run.args.out / 'last.pt'
    checkpoint, now = read_checkpoint(path), checkpoint_facts(run, data)
    if checkpoint['class_names'] != now['class_names'] or not same_data(checkpoint['signature'], now['signature']):
        raise CheckpointError(f'{path}: --data {run.args.data} is not what this run was trained on; restore the data, or '
                              'start anew with another --out')
    try:
        run.load_state_dict(checkpoint['run'])
        if not all(weight.isfinite().all() for weight in run.model.parameters()):
            raise ValueError('weights are not finite')
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f'{path}: holds no run that can go on here; start anew with another --out') from error


# --- command line -------------------------------------------------------------------------------------------------------

def build_parser():
    parser = CommandLine(__doc__)
    parser.add_argument('--data', default='letterpress', help='name or path of the data set, see data.py')
    parser.add_argument('--data-root', type=Path, default='.data', help='folder of downloads and of rendered letterpress')
    parser.add_argument('--image-size', type=whole(16), help='side of the images; the default is the data set\'s own')
    parser.add_argument('--out', type=folder, default='.', help='folder to write into')
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    parser.add_argument('--overwrite', action='store_true', help='start anew although --out holds a run')

    group = parser.add_argument_group('model and losses')
    group.add_argument('--model', choices=['jem', 'ebm'], default='jem', help='with or without the labels')
    group.add_argument('--width', type=whole(1), default=32, help='feature maps of the first convolution')
    group.add_argument('--px-weight', type=real(0), default=1., help='of -log p(x); 0 is a plain classifier')
    group.add_argument('--pyx-weight', type=real(0), default=3., help='of -log p(y|x)')
    group.add_argument('--alpha', type=real(0), default=.1, help='of the L2 term on both energies')
    group.add_argument('--matching', type=real(0), default=10., help='of the term that shapes the energy\'s valleys')
    group.add_argument('--slope', type=real(1e-6), default=40., help='of these valleys, per unit of pixel distance')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--epochs', type=whole(1), default=60, help='rounds through the training images')
    group.add_argument('--batch-size', type=whole(1), default=32, help='images, and chains, in an update')
    group.add_argument('--lr', type=real(1e-9), default=2e-3, help='learning rate of Adam')
    group.add_argument('--lr-decay', type=real(0, 1), default=.98, help='factor on the rate after each epoch')
    group.add_argument('--warmup', type=whole(1), default=100, help='updates over which the rate rises to --lr')
    group.add_argument('--clip-norm', type=real(1e-9), default=10., help='longest gradient of the weights')
    group.add_argument('--ema', type=real(0, 1), default=.99, help='of the averaged weights, which are validated and saved')
    group.add_argument('--data-noise', type=real(0), default=.03, help='standard deviation of the noise on data and samples')
    group.add_argument('--guard', action=argparse.BooleanOptionalAction, default=True,
                       help='on divergence go back to last.pt with a lower rate; --no-guard lets you watch')
    group.add_argument('--picture-every', type=whole(1), default=5, help='epochs between two pictures of samples and curves')

    group = parser.add_argument_group('sampling')
    group.add_argument('--conditional', action=argparse.BooleanOptionalAction,
                       help='chains follow E(x, y) for the labels of the batch instead of E(x); a JEM does by default')
    group.add_argument('--init', choices=['reservoir', 'persistent', 'noise', 'data'], default='reservoir',
                       help='where chains start: stored chains; a batch of them a class that never start afresh (with '
                       '--no-conditional: PCD); noise (short-run); data (CD)')
    group.add_argument('--prior', choices=['mixed', 'gaussian', 'uniform'], default='mixed', help='of fresh chains')
    group.add_argument('--reservoir', type=whole(1), default=2048, help='chains that --init reservoir stores: at least 16 a '
                       'class, the rest where classes are frequent')
    group.add_argument('--reinit', type=real(0, 1), default=.05, help='share of them that start afresh when they are drawn')
    group.add_argument('--sgld-steps', type=whole(1), default=20, help='K, steps an update')
    group.add_argument('--step-size', type=real(1e-9), help='default: .1 * pixels / slope, which moves them by '
                       'up to .1, root mean square')
    group.add_argument('--noise', type=real(0), default=.02, help='standard deviation of the noise of a step')
    group.add_argument('--grad-clip', type=real(0), help='clamps each element of dE/dx, e.g. at .03')
    group.add_argument('--graph', action=argparse.BooleanOptionalAction, default=True,
                       help='on a GPU, all steps of the chains as one CUDA graph; --no-graph is slower, for debugging')
    parser.add_shared_arguments()
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error('--resume and --overwrite exclude each other')
    if args.resume:
        args = resumed_args(parser, argv, args.out)
    if args.conditional is None:
        args.conditional = args.model == 'jem'
    if args.data not in NAMES and Path(args.data).is_dir():
        args.data = str(Path(args.data).resolve())  # so that ood.py finds it from any folder
    if not (args.px_weight or args.pyx_weight):
        parser.error('--px-weight 0 and --pyx-weight 0: nothing is left to learn; leave one of them out')
    if args.model == 'ebm' and (args.conditional or not args.px_weight):
        parser.error('--model ebm has no labels: leave out --conditional and --px-weight 0, or use --model jem')
    return args


FREE = ['epochs', 'data', 'data_root', 'out', 'resume', 'overwrite', 'picture_every', 'graph', 'device']  # on --resume


def resumed_args(parser, argv, out):
    """The arguments of the run in `out`; naming another value is a mistake, but for those in FREE."""
    if not (out / 'last.pt').exists():
        parser.error(f'--resume: no last.pt in {out}; start without --resume, or name the folder with --out')
    try:
        saved = read_checkpoint(out / 'last.pt')['args']
    except CheckpointError as error:
        parser.error(str(error))
    parser.set_defaults(**{key: value for key, value in saved.items() if key not in ('out', 'resume', 'overwrite', 'device')})
    args = parser.parse_args(argv)
    if args.epochs < saved['epochs']:
        parser.error(f'--epochs {args.epochs}: the run in {out} has {saved["epochs"]} to do; name at least as many')
    for key, value in saved.items():
        if key not in FREE and str(getattr(args, key)) != str(value):
            parser.error(f'--{key.replace("_", "-")}: the run in {out} has {value}, and --resume keeps that; leave the flag '
                         'out, or start anew with another --out')
    return args


def check_out(args):
    """A run in --out is neither overwritten nor continued unasked, nor is a picture of the user's own."""
    check_apart(args.out, args.data)
    there = [name for name in OUTPUTS if (args.out / name).exists()]
    if there and not (args.resume or args.overwrite):
        fail(f'--out {args.out}: {there[0]} is there already; go on with --resume, start anew with --overwrite, or name '
             'another --out')


def check_data(args, data):
    if args.batch_size % ranks():
        fail(f'--batch-size {args.batch_size}: not to be shared evenly by {ranks()} processes; make it a multiple')
    if args.batch_size > len(data.train):
        fail(f'--batch-size {args.batch_size}: more than the {len(data.train)} training images; make it smaller')
    if args.model == 'jem' and len(data.class_names) < 2:
        fail(f'--data {args.data}: one class only, and a JEM needs two; use --model ebm')


def remove_files(out, old_run):
    """Take away what a killed run left half written in `out` (`atomic_write` puts a dot before the name and a process number
    behind it), and all of an old run, so that no file of it is taken for one of the new run."""
    halves = [f'.{name}.[0-9]*' for name in OUTPUTS] + ['samples/.epoch_*.png.[0-9]*']
    for pattern in [*halves, *OUTPUTS, 'samples/epoch_*.png'] if old_run else halves:
        for path in out.glob(pattern):
            path.unlink()


@contextlib.contextmanager
def alone_in(out):
    """Keep other runs out of a folder for as long as this one lasts, where the system knows such locks (not on Windows)."""
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl and rank() == 0:
            lock = os.open(out, os.O_RDONLY)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f'--out {out}: another run is writing there; wait for it, or name another --out')
            except OSError:
                pass  # a file system without locks
        yield


def main(argv=None):
    with mistakes_told(DataError, FloatingPointError):
        args = parse_args(argv)
        join_ranks(args.device)
        check_out(args)
        for turn in range(ranks()):  # one after the other: the first may have to download or to print the letters
            if turn == rank():
                data = load_data(args.data, args.image_size, args.data_root, args.seed)
            anywhere(False)
        check_data(args, data)
        with alone_in(args.out):
            status = train(args, data)
        leave_ranks()
    if status:
        sys.exit(status)


if __name__ == '__main__':
    main()
