"""Train an energy-based model (EBM) or joint energy-based model (JEM) with SGLD (course task 3.4).

    python train.py --data GLYPHS                    a JEM, 60 epochs; without --data: letterpress
    python train.py --resume                         go on with the run in this folder
    torchrun --nproc-per-node 4 train.py             one process a GPU, each with a share of a batch

Writes best.pt, last.pt, log.csv, updates.csv, curves.png and samples/ into --out. best.pt has the
best score, the mean of val_auprc (macro AUPRC of softmax f; not for an EBM) and val_auroc (E(x);
not for a classifier). Once chains run, only epochs with them count."""
from model import (CheckpointError, CommandLine, EnergyModel, average, choose_device, fail,
                   load_model, number, rank, ranks, save_checkpoint, user_mistakes)  # before torch
import argparse
import copy
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import (NAMES, DataError, atomic_write, check_apart, load_data, save_figure, save_grid,
                  to_float, write_csv)
from sampler import CudaGraph, chain_settings, make_reservoir, prior, randn, sgld, temperature

WARMUP, CLIP_NORM, EMA = 100, 10., .99  # updates of warm-up, greatest gradient, decay of averages
ROUND, WHITE = .3, .5  # radius of a valley's round bottom, strongest noise: `matching_step`
RETREAT, MOST_DROPS = .3, 4  # of the guard: a drop multiplies the rate by .3; the most drops
PROGRESS = ['epoch', 'step', 'seconds', 'lr']  # log.csv: these, event, then NUMBERS and SCORES
NUMBERS = ['energy_real', 'energy_synth', 'loss_px', 'loss_pyx', 'loss_matching', 'loss_reg',
           'loss', 'grad_norm']  # loss_matching and loss_reg include --matching and --alpha
SCORES = ['val_accuracy', 'val_auprc', 'val_auroc', 'energy_noise', 'score']


def parse_args(argv=None):
    parser = CommandLine(__doc__)
    switch, count = argparse.BooleanOptionalAction, number(int, 1)
    weight, share = number(float, 0, 1e9), number(float, 0, 1)
    flag = parser.add_argument
    flag('--data', default='letterpress', help='name or path of the data set, see data.py')
    flag('--data-root', type=os.path.realpath, default='.data', help='downloads and letterpress')
    flag('--image-size', type=number(int, 16, 4096), help='default: that of the data set')
    flag('--out', type=Path, default='.', help='folder to write into')
    flag = parser.add_mutually_exclusive_group().add_argument
    flag('--resume', action='store_true', default=None, help='go on with the run in --out')
    flag('--overwrite', action='store_true', help='delete the run in --out and start anew')
    flag = parser.add_argument_group('model and losses').add_argument
    flag('--model', choices=['jem', 'ebm'], default='jem', help='with or without the labels')
    flag('--width', type=count, default=32, help='feature maps of the first convolution')
    flag('--px-weight', type=weight, default=1., help='weight of p(x) terms; 0: classifier')
    flag('--pyx-weight', type=weight, default=3., help='weight of the cross-entropy')
    flag('--contrast', type=weight, default=1., help='weight of the gap and its L2; 0: no chains')
    flag('--chains-after', type=number(int, 0), help='epochs before the first chains; default: 2/3')
    flag('--alpha', type=weight, default=.1, help='weight of the L2 term beside the gap')
    flag('--matching', type=weight, default=10., help='weight of the matching term, on dE/dx')
    flag('--slope', type=number(float, 1e-6, 1e9), default=40., help='slope of E far from images')
    flag('--data-noise', type=weight, default=.03, help='noise on data and samples')
    flag = parser.add_argument_group('optimisation').add_argument
    flag('--epochs', type=count, default=60, help='passes through the training images')
    flag('--batch-size', type=count, default=32, help='images, and chains, in an update')
    flag('--lr', type=number(float, 1e-12, 1e38), default=2e-3, help='greatest rate of Adam')
    flag('--guard', action=switch, default=True, help='go back when an epoch diverges')
    flag('--picture-every', type=count, default=5, help='epochs between two pictures')
    flag = parser.add_argument_group('sampling').add_argument
    flag('--conditional', action=switch, help='chains follow E(x, y), not E(x); default of a JEM')
    flag('--init', choices=['reservoir', 'persistent', 'noise', 'data'], default='reservoir',
         help='where chains start; persistent ones never start afresh, see sampler.py')
    flag('--prior', choices=['mixed', 'gaussian', 'uniform'], default='mixed', help='chain starts')
    flag('--reservoir', type=count, default=2048, help='stored chains; more if a batch needs more')
    flag('--reinit', type=share, default=.05, help='share of chains that start afresh')
    flag('--anneal-every', type=number(int, 0), help='1 in N updates from noise; default 3; 0 off')
    flag('--sgld-steps', type=count, default=20, help='K, SGLD steps in an update')
    flag('--step-size', type=number(float, 1e-9), help='default: .1 * pixels / slope')
    flag('--noise', type=weight, default=.02, help='standard deviation in an SGLD step')
    flag('--grad-clip', type=number(float, 1e-9), help='clamps each element of dE/dx, e.g. at .03')
    args = parser.parse_args(argv)
    if args.resume:  # the flags of the run in --out; a few may change later
        later = {'epochs', 'picture_every', 'guard', 'data', 'data_root'}
        checkpoint = load_model(args.out / 'last.pt')[1]
        here = {'resume', 'overwrite', 'out', 'device'}  # these count for this command alone
        saved = {key: value for key, value in checkpoint['args'].items() if key not in here}
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.resume = checkpoint  # instead of True
        if args.epochs < checkpoint['epoch']:
            parser.error(f'--epochs {args.epochs}: this run has {checkpoint["epoch"]}; name more')
        for key in [key for key in saved if saved[key] != getattr(args, key) and key not in later]:
            parser.error(f'--{key.replace("_", "-")}: this run has {saved[key]}; leave it out')
    args.conditional = args.model == 'jem' if args.conditional is None else args.conditional
    if args.chains_after is None:  # without the matching term nothing else would shape dE/dx
        args.chains_after = 2 * args.epochs // 3 if args.matching else 0
    if args.anneal_every is None and not args.resume:  # a run older than this flag goes on without
        args.anneal_every = 3 if args.matching and args.init == 'reservoir' else 0
    if not args.px_weight:
        args.contrast = args.matching = 0.
    if args.contrast and args.chains_after >= args.epochs:
        parser.error('--chains-after: --epochs must be more; for no chains use --contrast 0')
    if args.model == 'ebm' and (args.conditional or not args.px_weight):
        parser.error('--model ebm has no labels: leave out --conditional and --px-weight 0')
    if not args.contrast + args.matching + args.pyx_weight * (args.model == 'jem'):
        parser.error('--px-weight, --contrast, --matching, --pyx-weight: all 0; leave one out')
    if args.data not in NAMES and os.path.isdir(args.data):
        args.data = os.path.realpath(args.data)  # so that ood.py finds it from every folder
    return args


# --- the losses ---------------------------------------------------------------------------------

def px_step(energy_real, energy_synth):
    """The energy gap, (B,) and (B,) -> scalar. For x' ~ p, held fixed, its gradient over weights is

        grad (-T log p(x)) = grad E(x) - mean over x' of grad E(x'),  p(x) = exp(-E(x) / T) / Z"""
    return energy_real.mean() - energy_synth.mean()


def l2_step(energy_real, energy_synth):
    """Mean square energies: px_step fixes only their differences (Du and Mordatch 2019)."""
    return energy_real.square().mean() + energy_synth.square().mean()


def pyx_step(logits, y):
    """Cross-entropy of softmax f(x)[y], (B, K) and (B,) -> scalar: -log p(y|x) for T = 1. For T < 1
    it is at least -T log p(y|x), as T logsumexp(f / T) grows with T."""
    return F.cross_entropy(logits, y)


def matching_step(energy, x_real, away, slope):
    """Mean square of (dE/dx - dV/dx) * pixels / slope at x_real + away (B, C, H, W). V is a valley
    around each image: slope * sqrt(r^2 + ROUND^2) at the distance r (root mean square of pixels).
    Far off dV/dx is a direction, not a score, as in equilibrium matching (Wang and Du 2025)."""
    x = (x_real + away).requires_grad_()
    gradient, = torch.autograd.grad(energy(x).sum(), x, create_graph=True)  # (B, C, H, W)
    r = away.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # (B, 1, 1, 1)
    wanted = away / (r ** 2 + ROUND ** 2).sqrt()  # dV/dx * pixels / slope
    return (gradient * x_real[0].numel() / slope - wanted).square().mean()


def ways_to_noise(x_real, kind, generator):
    """Displacements (B, C, H, W) for `matching_step`: half of them lead a part of the way to the
    prior; all get white noise up to WHITE, without which fine grain survives in the samples."""
    t, s = x_real.new_empty(2, len(x_real), 1, 1, 1).uniform_(generator=generator)  # (B, 1, 1, 1)
    z = prior(kind, x_real.shape, generator, x_real.device)  # (B, C, H, W)
    white = randn(x_real.shape, generator, x_real.device)
    return (2 * t - 1).clamp_min(0) * (z - x_real) + WHITE * s * white


# --- the loop -----------------------------------------------------------------------------------

def train(args, data, old_run=()):
    """After Algorithm 1 of JEM (Grathwohl et al. 2020), with an L2 and a matching term. What a run
    changes is in `state` and `history`, saved after each epoch: a resumed run is the same run."""
    device, split, val_split = args.device, data.train.to(args.device), data.val.to(args.device)
    num_classes = len(data.class_names) if args.model == 'jem' else 1
    if args.model == 'ebm':  # one logit, no labels
        split.labels, val_split.labels = 0 * split.labels, 0 * val_split.labels
    ring = split.labels if args.conditional else torch.zeros_like(split.labels)  # (N,)
    image_shape, batch = split.images.shape[1:], args.batch_size // ranks()
    torch.manual_seed(args.seed)  # the initial weights
    generator = torch.Generator(device).manual_seed(args.seed + 10 ** 6 * rank())  # all the rest
    sampler = {'steps': args.sgld_steps, 'step_size': args.step_size, 'noise': args.noise,
               'grad_clip': args.grad_clip, 'matching': args.matching, 'slope': args.slope,
               'pixels': image_shape.numel()}
    model = EnergyModel(num_classes, image_shape[0], args.width,
                        temperature(sampler) if args.px_weight else 1., args.precision).to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)  # means over the updates: what is saved
    weights, averages = list(model.parameters()), list(averaged.parameters())
    # No momentum: it would average gradients from samples that are out of date.
    optimizer = torch.optim.Adam(weights, args.lr, betas=(0., .999), fused=True)
    reservoir = make_reservoir(args.init, ring, batch, args.reservoir // ranks(), image_shape,
                               args.reinit, args.prior, generator)
    state = {'model': model, 'averaged': averaged, 'optimizer': optimizer, 'reservoir': reservoir,
             'generator': generator}
    history = dict(epoch=0, step=0, seconds=0., drops=0., epochs=[], updates=[])
    facts = {'args': {**vars(args), 'resume': None, 'out': str(args.out), 'device': str(device)},
             'data': data.describe(), 'sampler': sampler}  # for generate.py and ood.py

    energy = model.energy if args.conditional else lambda x, y: model.energy(x)

    def move(kind, x, y):
        return sgld(partial(energy, y=y), x, generator=generator, **chain_settings(sampler, kind))

    cold, annealed = partial(move, 'training'), partial(move, 'sampling')
    if device.type == 'cuda':
        cold, annealed = CudaGraph(cold, generator), CudaGraph(annealed, generator)
    if args.resume:
        load_run(args.resume, state, history, args)
    for path in old_run:  # only now: a model too large for the memory has failed above
        path.unlink()
    save_run(state, history, args, facts)
    total = args.epochs * (len(split) // args.batch_size)
    with tqdm(total=total, initial=history['step'], unit='update', disable=rank() > 0) as bar:
        while history['epoch'] < args.epochs:
            started, measured = time.monotonic(), []
            contrast = args.contrast * (history['epoch'] >= args.chains_after)
            for index in batches(len(split), args, history['epoch']):
                x_real, y = split.batch(index)  # (B, C, H, W), (B,)
                # cross-entropy: the classifier
                logits = model.get_logits(perturb(x_real, args, generator))  # (B, K)
                loss_pyx = pyx_step(logits, y)
                loss = args.pyx_weight * loss_pyx
                numbers = {'loss_pyx': loss_pyx}
                if contrast:
                    # x' (B, C, H, W): SGLD (task 3.3). A stored chain follows p(x|y), but keeps to
                    # one shape. Annealed ones reach many: E rises where they end too often.
                    if args.anneal_every and (history['step'] + 1) % args.anneal_every == 0:
                        x_synth = annealed(prior('gaussian', x_real.shape, generator, device), y)
                    else:
                        start, slot = reservoir.draw(ring[index], generator)  # (B, C, H, W), (B,)
                        x_synth = cold(x_real if args.init == 'data' else start, y)
                        reservoir.store(slot, x_synth)
                    # -T log p(x): data against samples, and the size of the energies
                    energy_real = model.energy_of_logits(logits)  # (B, K) -> (B,)
                    energy_synth = model.energy(perturb(x_synth, args, generator))  # (B,)
                    loss_px = px_step(energy_real, energy_synth)
                    loss_reg = args.alpha * l2_step(energy_real, energy_synth)
                    loss = loss + args.px_weight * contrast * (loss_px + loss_reg)
                    numbers |= {'loss_px': loss_px, 'loss_reg': loss_reg,
                                'energy_real': energy_real.mean(),
                                'energy_synth': energy_synth.mean()}
                if args.matching:  # dE/dx leads back to the data
                    away = ways_to_noise(x_real, args.prior, generator)  # (B, C, H, W)
                    numbers['loss_matching'] = args.matching * matching_step(
                        partial(energy, y=y), x_real, away, args.slope)
                    loss = loss + args.px_weight * numbers['loss_matching']
                remaining = 1 - history['step'] / total  # the rate falls to 0 in the last third
                factor = min(1., (history['step'] + 1) / WARMUP, 3 * remaining)
                history['lr'] = args.lr * factor * RETREAT ** history['drops']
                optimizer.param_groups[0]['lr'] = history['lr']
                # descent on the weighted sum. For T = 1: -log p(x, y) = -log p(x) - log p(y|x)
                optimizer.zero_grad()
                loss.backward()
                average([weight.grad for weight in weights])  # over the ranks
                grad_norm = torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
                optimizer.step()
                for mean, weight in zip(averages, weights):  # mean <- EMA mean + (1 - EMA) weight
                    mean.lerp_(weight.detach(), 1 - EMA)
                numbers |= {'loss': loss, 'grad_norm': grad_norm}
                measured.append(torch.stack(list(numbers.values())).detach())  # (L,)
                average(measured[-1:])
                history['step'] += 1
                bar.update()
                if history['step'] % 10 == 0:
                    row = dict(zip(numbers, torch.stack(measured[-10:]).mean(0).tolist()))
                    history['updates'].append({'step': history['step'], **row})
                    bar.set_postfix({k: row[k] for k in ('loss_px', 'loss_pyx') if k in row})
            row = dict(zip(numbers, torch.stack(measured).mean(0).tolist()))
            history['seconds'] += time.monotonic() - started
            row |= validate(averaged, val_split, args)  # levels the classes of `averaged`, too
            trouble = find_trouble(row, history, args)
            history['epoch'] += 1
            log_epoch(row, trouble, state, history, args, data, facts)
            if trouble:
                go_back(trouble, state, history, args)
                bar.n = history['step']
            else:  # each good epoch takes back a quarter of a drop
                history['drops'] = max(0., history['drops'] - .25)
            save_run(state, history, args, facts)


def batches(count, args, epoch):
    """Shuffled positions, (B / ranks,) for each rank, the same after --resume."""
    generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
    order = torch.randperm(count, generator=generator).to(args.device)  # (N,)
    for batch in order.split(args.batch_size)[:count // args.batch_size]:
        yield batch[rank()::ranks()]


def perturb(x, args, generator):
    """The same noise and bounds for data and samples, or the energy could tell them apart by it."""
    return (x + args.data_noise * randn(x.shape, generator, x.device)).clamp(-1, 1)  # (B, C, H, W)


# --- after an epoch: validate, log, draw ----------------------------------------------------------

@torch.no_grad()
def validate(model, split, args):
    """First shift the bias of `model` (below). Then return accuracy and macro AUPRC of softmax f,
    and the AUROC of E(x) against mixtures of two images and uniform noise."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import
    x, y = to_float(split.images), split.labels.cpu()  # (N, C, H, W), (N,)
    generator = torch.Generator(args.device).manual_seed(args.seed)  # the same noise every epoch
    noise = prior('uniform', x.shape, generator, args.device)  # (N, C, H, W)
    images = torch.cat([x, (x + x.roll(max(1, len(x) // 3), 0)) / 2, noise])  # (3N, C, H, W)
    logits = torch.cat([model.get_logits(part).cpu() for part in images.split(500)])  # (3N, K)
    f_y = logits[:len(y)].gather(1, y[:, None])  # f(x)[y], (N, 1)
    for k in range(logits.shape[1]) if args.px_weight else []:
        # The losses hardly fix this bias: make the median of E(x, y) over images of class y 0.
        level = (f_y[y == k] if k in y else f_y).median()  # of all images if it has none here
        logits[:, k] -= level
        model.head.bias[k] -= level
    energy, y = model.energy_of_logits(logits), y.numpy()  # (3N,), (N,)
    if not energy.isfinite().all():
        return {'val_auroc': math.nan}
    auroc = float(roc_auc_score(np.repeat([0, 1, 1], len(y)), energy))
    scores = {'score': auroc, 'val_auroc': auroc, 'energy_noise': energy[2 * len(y):].mean().item()}
    if args.model == 'jem':
        p = logits[:len(y)].double().softmax(1).numpy()  # (N, K); in float32 many p would tie at 1
        auprc = np.mean([average_precision_score(y == k, p[:, k]) for k in np.unique(y)]).item()
        scores |= {'val_accuracy': (p.argmax(1) == y).mean().item(), 'val_auprc': auprc,
                   'score': (auprc + auroc) / 2 if args.px_weight else auprc}
    return scores


def log_epoch(row, trouble, state, history, args, data, facts):
    """Write the logs and pictures of an epoch, and best.pt if its score is the highest."""
    row |= {key: history[key] for key in PROGRESS}
    row['event'] = trouble or history.pop('event', '')  # of an epoch that was undone
    history['epochs'].append(row)
    if rank() > 0:
        return
    rivals = [old for old in history['epochs'] if 'loss_px' in old] or history['epochs']
    best = not trouble and row['score'] == max(old['score'] for old in rivals)
    if best:
        with atomic_write(args.out / 'best.pt') as file:
            save_checkpoint(file, state['averaged'], **facts, epoch=row['epoch'])
    write_csv(history['epochs'], [*PROGRESS, 'event', *NUMBERS, *SCORES], args.out / 'log.csv')
    write_csv(history['updates'], ['step', *NUMBERS], args.out / 'updates.csv')
    if row['event'] or row['epoch'] % args.picture_every == 0 or row['epoch'] in (1, args.epochs):
        plot_curves(history, args)
        if args.px_weight:
            draw_samples(state, history, args, data, facts)
    shown = [f'{key} {row[key]:.4g}' for key in ['epoch', 'loss_px', *SCORES] if key in row]
    tqdm.write('  '.join([*shown, row['event'], 'best so far' if best else '']))


def plot_curves(history, args):
    """Energies and losses every ten updates, and the validation scores of every epoch."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(12, 3.5), layout='constrained')
    axes, updates = figure.subplots(1, 3), history['updates']
    for ax, rows, names in [(axes[0], updates, ['energy_real', 'energy_synth', 'loss_px']),
                            (axes[1], updates, ['loss_pyx', 'loss_matching', 'loss_reg']),
                            (axes[2], history['epochs'], SCORES[:3])]:
        for name in names:
            ax.plot([r['step'] for r in rows], [r.get(name, math.nan) for r in rows], label=name)
        ax.set_xlabel('update')
        ax.legend()
    axes[0].set_title(f'loss_px saturates at -1 / alpha = -1 / {args.alpha:g}')
    save_figure(figure, args.out / 'curves.png')


def draw_samples(state, history, args, data, facts):
    """Eight fresh chains a row, on their right eight stored ones; a row is a class of E(x, y)."""
    model, reservoir, device = state['averaged'], state['reservoir'], args.device
    rows = torch.arange(min(len(data.class_names), 12) if args.conditional else 8, device=device)
    y, ring = (rows.repeat_interleave(8), rows) if args.conditional else (None, 0 * rows)
    generator = torch.Generator(device).manual_seed(args.seed)
    start = prior('gaussian', (8 * len(rows), *reservoir.chains.shape[1:]), generator, device)
    fresh = sgld(partial(model.energy, y=y), start, generator=generator,
                 **chain_settings(facts['sampler'], 'sampling'))  # (8R, C, H, W)
    place = torch.arange(8 * len(rows), device=device).view(-1, 8) % reservoir.lengths[ring, None]
    stored = reservoir.chains[reservoir.first[ring, None] + place]  # (R, 8) -> (R, 8, C, H, W)
    x = torch.cat([fresh.unflatten(0, stored.shape[:2]), stored], dim=1)  # (R, 16, C, H, W)
    save_grid(x.flatten(0, 1), args.out / 'samples' / f'epoch_{history["epoch"]:03d}.png', 16,
              f'epoch {history["epoch"]}: chains from noise; on the right stored ones',
              rows=data.class_names[:len(rows)] if args.conditional else ())


# --- safety and start: the guard, saving, resuming ------------------------------------------------

def find_trouble(row, history, args):
    """Why an epoch has diverged, or ''. The gap saturates at -1/alpha if chains cannot follow."""
    if not all(map(math.isfinite, row.values())) or row.get('loss_px') == 0:
        return 'a number is not finite, or all energies are equal'
    gaps = [update.get('loss_px', 0.) for update in history['updates'][-5:]]  # rows of updates.csv
    saturated = history['step'] > 5 * WARMUP and abs(np.mean(gaps)) * args.alpha > .95
    return 'energy gap saturated at 1/alpha (see --no-guard)' if args.guard and saturated else ''


def go_back(trouble, state, history, args):
    """Go back to the epoch before, which is in last.pt, with a lower rate, or give up."""
    drops, event = history['drops'] + 1, f'{trouble} in epoch {history["epoch"]}'
    if drops > MOST_DROPS or not args.guard:
        raise FloatingPointError(f'training diverged: {event}; last.pt holds the epoch before; '
                                 f'--overwrite it with an --lr below {args.lr:g}')
    load_run(load_model(args.out / 'last.pt')[1], state, history, args)
    history.update(drops=drops, event=f'{event}: back with a lower rate')


def save_run(state, history, args, facts):
    """last.pt: a checkpoint of the averaged weights, and all that --resume needs."""
    of_rank = {'reservoir': state['reservoir'].state_dict(), 'device': args.device.type,
               'generator': state['generator'].get_state()}
    of_ranks = [of_rank] * ranks()
    if ranks() > 1:
        dist.gather_object(of_rank, of_ranks if rank() == 0 else None)
    if rank() == 0:
        run = {name: state[name].state_dict() for name in ('model', 'averaged', 'optimizer')}
        with atomic_write(args.out / 'last.pt') as file:
            save_checkpoint(file, state['averaged'], **facts, epoch=history['epoch'],
                            run={**run, 'ranks': of_ranks, 'history': history})


def load_run(checkpoint, state, history, args):
    """Go on from last.pt: exactly, if there are as many ranks on the same kind of device."""
    try:
        run = checkpoint['run']
        for name in ('model', 'averaged', 'optimizer'):
            state[name].load_state_dict(run[name])
        history.update(run['history'])
        of_rank = run['ranks'][rank() % len(run['ranks'])]
        state['reservoir'].load_state_dict(of_rank['reservoir'])
        if len(run['ranks']) == ranks() and of_rank['device'] == args.device.type:
            state['generator'].set_state(of_rank['generator'])
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f'{args.out}/last.pt: no run ({error}); use --overwrite') from error


def check(args, data):
    """Refuse what cannot work; returns the files of an old run that --overwrite deletes."""
    if args.batch_size % ranks() or args.batch_size > len(data.train):
        fail(f'--batch-size: a multiple of {ranks()} processes, at most {len(data.train)} images')
    if args.model == 'jem' and len(data.class_names) < 2:
        fail(f'--data {args.data} has one class only, and a JEM needs two; use --model ebm')
    check_apart(args.out, args.data)
    if args.epochs * len(data.train) < 500 * args.batch_size and not args.resume and rank() == 0:
        print('fewer than 500 updates are few to learn from; raise --epochs or lower --batch-size')
    names = ['last.pt', 'best.pt', 'log.csv', 'updates.csv', 'curves.png', 'samples/epoch_*.png']
    there = [path for name in names for path in args.out.glob(name)]
    if there and not args.resume and not args.overwrite:
        fail(f'--out: {there[0]} exists; use --resume, --overwrite, or another --out')
    return there if args.overwrite and rank() == 0 else []


def main(argv=None):
    with user_mistakes(DataError, FloatingPointError, argparse.ArgumentTypeError):
        args = parse_args(argv)
        if args.device.type == 'cuda':  # CUDA graphs are recorded on the current GPU
            gpu = os.environ.get('LOCAL_RANK', args.device.index or 0)  # torchrun: one a process
            args.device = choose_device(f'cuda:{gpu}')
            torch.cuda.set_device(args.device)
        if 'LOCAL_RANK' in os.environ:
            dist.init_process_group('cpu:gloo,cuda:nccl' if args.device.type == 'cuda' else 'gloo')
        for turn in range(ranks()):  # rank 0 goes first: it may have to download or render the data
            if turn == rank():
                data = load_data(args.data, args.image_size, args.data_root, args.seed,
                                 like=args.resume and args.resume['data'])
            if ranks() > 1:
                dist.barrier()
        train(args, data, check(args, data))
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
