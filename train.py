"""Train an energy-based model (EBM) or a joint energy-based model (JEM) by maximum likelihood, with SGLD for the samples.

    python train.py                                  letterpress, a JEM, 60 epochs
    python train.py --data digits                    minutes on a laptop
    python train.py --data GLYPHS --epochs 60 --device cuda
    python train.py --resume                         go on with the run in this folder

Writes best.pt, last.pt, log.csv, curves.png and samples/ into --out. best.pt is the epoch with the highest score on the
validation data: for a JEM the mean of val_auprc (macro AUPRC of p(y|x) over the classes) and val_auroc (the energy of
validation images against half-and-half mixtures of two of them); for an EBM val_auroc alone.
"""
import argparse
import math
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data import DataError, atomic_write, load_data, save_figure, save_grid, write_csv
from model import CheckpointError, CommandLine, EnergyModel, fail, read_checkpoint, real, save_checkpoint, whole
from sampler import Reservoir, prior, sgld

AVERAGES = ['loss', 'loss_px', 'loss_pyx', 'loss_reg', 'energy_real', 'energy_synth', 'grad_norm', 'train_accuracy']  # what `update` returns, averaged over an epoch
COLUMNS = ['epoch', 'step', 'seconds', 'lr', *AVERAGES, 'val_accuracy', 'val_auprc', 'val_auroc', 'event']


# --- the two losses -----------------------------------------------------------------------------------------------------

def px_step(logits_real, logits_synth):
    """The contrastive term, whose gradient is that of -log p(x), and the size of the energies (course task 3.4).

        grad -log p(x) = grad E(x) - E_{x' ~ p}[grad E(x')]        so   loss = mean E(x_real) - mean E(x_synth)

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


def steepness(logits_real, x_real):
    """mean |dE/dx|^2 over the data: the zero-centred gradient penalty R1 (Mescheder et al. 2018).

    Data and chains pull at the energy as data and generator pull at a discriminator, and there this penalty is what makes
    training converge: near the data the energy stays as smooth as the chains are fast.
    """
    gradient, = torch.autograd.grad(logits_real.logsumexp(1).sum(), x_real, create_graph=True)  # (B, C, H, W)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


# --- one update: the algorithm box --------------------------------------------------------------------------------------

def update(run, x_real, y):
    """One step of maximum likelihood on log p(x, y) = log p(x) + log p(y|x); returns what the log averages.

    Algorithm 1 of JEM (Grathwohl et al. 2020): draw chains, move them by SGLD, contrast them with the data, classify the data.
    """
    args = run.args
    noise = torch.randn(x_real.shape, generator=run.generator, device=x_real.device)
    x_real = (x_real + args.data_noise * noise).clamp(-1, 1)  # noise and bounds as the chains have: no telling by those
    x_synth = draw_samples(run, x_real, y)

    smooth = args.px_weight and args.smoothness
    x_real.requires_grad_(smooth > 0)
    logits_real, logits_synth = run.model.get_logits(torch.cat([x_real, x_synth])).split(len(y))  # (2B, K) -> (B, K) twice
    e_real, e_synth, squares = px_step(logits_real, logits_synth)
    gap = e_real - e_synth
    regulariser = args.alpha * squares
    if smooth:
        regulariser = regulariser + smooth / 2 * steepness(logits_real, x_real)
    loss_pyx = pyx_step(logits_real, y)

    run.gap.lerp_(gap.detach(), .05)
    pace = (1 + run.gap).clamp(0, 1) if args.paced else 1.  # learn only as fast as the chains follow
    loss = pace * (args.px_weight * gap + args.pyx_weight * loss_pyx) + args.px_weight * regulariser

    run.optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_norm)
    run.optimizer.step()
    run.ema.update_parameters(run.model)

    accuracy = (logits_real.argmax(1) == y).float().mean()
    return torch.stack([loss, gap, loss_pyx, regulariser, e_real, e_synth, grad_norm, accuracy]).detach()


def draw_samples(run, x_real, y):
    """Chains x' (B, C, H, W), moved by K steps of SGLD along E(x) or E(x, y) (course task 3.3)."""
    args = run.args
    if not args.px_weight:
        return x_real  # a plain classifier needs no samples
    label = y if args.conditional else None  # the labels of the batch: y ~ p(y), then x' ~ p(x|y), is x' ~ p(x)
    ring = y if args.conditional else torch.zeros_like(y)
    x, slot = (x_real, None) if args.init == 'data' else run.reservoir.draw(ring, run.generator)
    x = sgld(lambda x: run.model.energy(x, label), x, args.sgld_steps, generator=run.generator, **run.sgld_settings)
    if args.init != 'data':  # contrastive divergence (Hinton 2002) forgets its chains
        run.reservoir.store(slot, x)
    return x


# --- a run and its state ------------------------------------------------------------------------------------------------

class Run:
    """Everything a run changes as it goes: saved in last.pt, so that a resumed run is the unbroken one, bit by bit."""

    def __init__(self, args, data):
        device = args.device
        torch.manual_seed(args.seed)  # the initial weights
        self.args = args
        self.generator = torch.Generator(device).manual_seed(args.seed)  # everything random afterwards
        channels, size = data.train.images.shape[1:3]
        num_classes = len(data.class_names) if args.model == 'jem' else 1
        self.model = EnergyModel(num_classes, channels, args.width, args.precision).to(device)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, betas=(0., .999))  # no momentum: the
        # energy that it would remember belongs to chains that have moved on
        self.sgld_settings = {'step_size': args.step_size, 'noise': args.noise, 'grad_clip': args.grad_clip,
                              'pixel_step': args.pixel_step}
        slots = args.reservoir if args.init == 'reservoir' else args.batch_size
        share = data.train.labels.bincount(minlength=num_classes) / len(data.train) if args.conditional else torch.ones(1)  # (R,): rings as
        lengths = (share * slots).ceil().long().clamp_min(16).tolist()  # long as their class is frequent turn equally fast
        reinit = {'reservoir': args.reinit, 'noise': 1.}.get(args.init, 0.)
        self.reservoir = Reservoir(lengths, (channels, size, size), reinit, args.prior, self.generator, device)
        self.gap = torch.zeros((), device=device)  # running mean of the energy gap
        self.epoch, self.position = 0, 0  # finished epochs, and updates done in the current one
        self.order = torch.zeros(0, dtype=torch.long, device=device)  # of the images in the current epoch
        self.sums = torch.zeros(len(AVERAGES), device=device)  # of what `update` returned in the current epoch
        self.seconds, self.best, self.rows = 0., -math.inf, []

    PARTS = ['model', 'ema', 'optimizer', 'reservoir']
    VALUES = ['gap', 'epoch', 'position', 'order', 'sums', 'seconds', 'best', 'rows']

    def state_dict(self):
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS},
                **{name: getattr(self, name) for name in self.VALUES}, 'generator': self.generator.get_state()}

    def load_state_dict(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.VALUES:
            value = state[name]
            setattr(self, name, value.to(self.args.device) if torch.is_tensor(value) else value)
        self.generator.set_state(state['generator'])


def train(args, data):
    """The hand-written loop: epochs of updates, each epoch validated, logged and saved. Returns the exit status."""
    run = Run(args, data)
    if args.resume:
        resume(run, data)
    train_split, val_split = data.train.to(args.device), data.val.to(args.device)
    if args.model == 'ebm':
        train_split.labels.zero_()  # one logit, no labels
    updates = len(train_split) // args.batch_size  # in an epoch; the few images that are left over change every time
    bar = tqdm(total=args.epochs * updates, initial=run.epoch * updates + run.position, unit='update', mininterval=1.)
    with bar, StopSignal() as stop:
        while run.epoch < args.epochs and not stop.asked:
            started = time.monotonic()
            if run.position == 0:
                run.order = torch.randperm(len(train_split), generator=run.generator, device=args.device)
                run.sums.zero_()
            for batch in run.order.split(args.batch_size)[run.position:updates]:  # (B,) positions in the training split
                set_learning_rate(run, updates)
                run.sums += update(run, *train_split.batch(batch))
                run.position += 1
                show_progress(bar, run)
                if stop.asked:
                    break
            run.seconds += time.monotonic() - started
            if run.position == updates:
                finish_epoch(run, data, val_split)
            save_run(run, data)
    return stop.status


def set_learning_rate(run, updates):
    """A linear warm-up over the first updates, then a factor --lr-decay an epoch."""
    warmup = min(1., (run.epoch * updates + run.position + 1) / run.args.warmup)
    for group in run.optimizer.param_groups:
        group['lr'] = run.args.lr * warmup * run.args.lr_decay ** run.epoch


def show_progress(bar, run):
    """Move the bar; every tenth update also its numbers, since reading them makes the CPU wait for a GPU."""
    bar.update()
    if run.position % 10 == 0:
        means = dict(zip(AVERAGES, (run.sums / run.position).tolist()))
        bar.set_postfix_str(f'epoch {run.epoch + 1} gap {run.gap.item():+.2f} accuracy {means["train_accuracy"]:.3f}', False)


# --- validation, logging, saving ----------------------------------------------------------------------------------------

@torch.no_grad()
def validate(model, split, num_classes):
    """Accuracy and macro AUPRC of p(y|x), and AUROC of the energy against mixtures (x_i + x_j) / 2, on the whole split."""
    index = torch.arange(len(split), device=split.labels.device)
    logits, mixed = [], []
    for part, partner in zip(index.split(500), index.roll(len(index) // 2).split(500)):
        x, other = split.batch(part)[0], split.batch(partner)[0]  # (B, C, H, W) both
        logits.append(model.get_logits(x))  # (B, K)
        mixed.append(model.energy((x + other) / 2))  # (B,)
    logits, y = torch.cat(logits), split.labels.cpu()  # (N, K), (N,)
    energy = torch.cat([-logits.logsumexp(1), torch.cat(mixed)]).cpu()  # (2N,)
    auroc = roc_auc_score(np.repeat([0, 1], len(y)), energy)
    if num_classes == 1:
        return math.nan, math.nan, float(auroc)
    probability = logits.softmax(1).cpu().numpy()  # (N, K)
    auprc = np.mean([average_precision_score(y == label, probability[:, label]) for label in y.unique().tolist()])
    return (logits.argmax(1).cpu() == y).float().mean().item(), float(auprc), float(auroc)


def finish_epoch(run, data, val_split):
    """Validate the averaged weights, write the log, the curves and now and then samples, and keep the best checkpoint."""
    args, model = run.args, run.ema.module
    row = dict(zip(AVERAGES, (run.sums / run.position).tolist()))
    accuracy, auprc, auroc = validate(model, val_split, model.settings['num_classes'])
    run.epoch, run.position = run.epoch + 1, 0
    row.update(epoch=run.epoch, step=run.epoch * (len(data.train) // args.batch_size), seconds=run.seconds,
               lr=run.optimizer.param_groups[0]['lr'], val_accuracy=accuracy, val_auprc=auprc, val_auroc=auroc, event='')
    run.rows.append(row)
    write_csv(run.rows, COLUMNS, args.out / 'log.csv')
    if run.epoch % args.picture_every == 0 or run.epoch == args.epochs:
        plot_curves(run.rows, args)
        if args.px_weight:
            draw_grid(run, data)
    score = auroc if args.model == 'ebm' else (auprc + auroc) / 2
    if score >= run.best:
        run.best = score
        with atomic_write(args.out / 'best.pt') as file:
            save_checkpoint(file, model, **checkpoint_facts(run, data))
    tqdm.write(f'epoch {run.epoch}: gap {row["loss_px"]:+.2f}  val accuracy {accuracy:.4f}  AUPRC {auprc:.4f}  '
               f'AUROC against mixtures {auroc:.4f}{"  (best)" if score >= run.best else ""}')


def draw_grid(run, data):
    """samples/epoch_NNN.png: eight chains from N(0, 0.01) for each of up to twelve classes, after 256 steps of E(x, y)."""
    args, model = run.args, run.ema.module
    labels = torch.arange(min(model.settings['num_classes'], 12), device=args.device)
    y = labels.repeat_interleave(8)  # (R,) -> (8R,)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    start = prior('gaussian', (len(y), *run.reservoir.chains.shape[1:]), generator, args.device)  # (8R, C, H, W)
    x = sgld(lambda x: model.energy(x, y), start, 256, generator=generator, **run.sgld_settings)
    save_grid(x, args.out / 'samples' / f'epoch_{run.epoch:03d}.png', 8, f'epoch {run.epoch}: 256 steps from noise',
              rows=[data.class_names[label] for label in labels] if len(labels) > 1 else None)


def plot_curves(rows, args):
    """curves.png: the energies and their gap, the losses, and what validation says, over the epochs."""
    panels = {'energy': ['energy_real', 'energy_synth', 'loss_px'], 'loss': ['loss_pyx', 'loss_reg'],
              'validation': ['val_accuracy', 'val_auprc', 'val_auroc']}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout='constrained')
    epochs = [row['epoch'] for row in rows]
    for ax, (title, names) in zip(axes, panels.items()):
        for name in names:
            ax.plot(epochs, [row[name] for row in rows], label=name.replace('_', ' '), marker='.')
        ax.set(title=title, xlabel='epoch')
        ax.legend()
    if args.alpha and args.px_weight:
        axes[0].axhline(-1 / args.alpha, linestyle=':', color='grey')  # where the L2 term stops a sampler that has lost
        axes[0].set_ylim(bottom=max(-1 / args.alpha, axes[0].get_ylim()[0]) - .5)
    save_figure(figure, args.out / 'curves.png')


def checkpoint_facts(run, data):
    """What a checkpoint says beside its weights: all that generate.py and ood.py need to know."""
    args = vars(run.args)
    plain = {key: str(value) if isinstance(value, (Path, torch.device)) else value for key, value in args.items()}
    return {'args': plain, 'data': args['data'], 'class_names': data.class_names if args['model'] == 'jem' else [],
            'image_size': data.train.images.shape[-1], 'sampler': run.sgld_settings, 'epoch': run.epoch}


def save_run(run, data):
    """last.pt: the checkpoint of the averaged weights plus the whole state of the run."""
    with atomic_write(run.args.out / 'last.pt') as file:
        save_checkpoint(file, run.ema.module, **checkpoint_facts(run, data), run=run.state_dict())


def resume(run, data):
    """Continue the run in last.pt: only --epochs, the machine's flags and the folder may differ from its own."""
    path = run.args.out / 'last.pt'
    checkpoint = read_checkpoint(path)
    if 'run' not in checkpoint:
        raise CheckpointError(f'{path}: holds no state of a run; train anew with --overwrite or another --out')
    free = {'epochs', 'out', 'data_root', 'device', 'resume', 'overwrite', 'picture_every'}
    now = checkpoint_facts(run, data)['args']
    changed = [f'--{key.replace("_", "-")} {checkpoint["args"].get(key)}' for key in now
               if key not in free and now[key] != checkpoint['args'].get(key)]
    if changed:
        raise CheckpointError(f'{path}: belongs to a run with {" ".join(changed)}; use these, or another --out')
    run.load_state_dict(checkpoint['run'])


class StopSignal:
    """Ctrl-C and SIGTERM let the update in progress finish, so that what is saved is whole; a second one ends at once."""

    def __enter__(self):
        self.status, self.before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.status = 128 + number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def asked(self):
        return self.status != 0


# --- command line -------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument('--data', default='letterpress', help='name or path of the data set, see data.py')
    parser.add_argument('--data-root', type=Path, default='.data', help='folder of downloads and of the rendered letterpress')
    parser.add_argument('--image-size', type=whole(16), help='side of the images; the default is the data set\'s own')
    parser.add_argument('--out', type=Path, default='.', help='folder to write into')
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    parser.add_argument('--overwrite', action='store_true', help='start anew although --out holds a run')

    group = parser.add_argument_group('model and losses')
    group.add_argument('--model', choices=['jem', 'ebm'], default='jem', help='with or without the labels')
    group.add_argument('--width', type=whole(1), default=32, help='feature maps of the first convolution')
    group.add_argument('--px-weight', type=real(0), default=1., help='of -log p(x); 0 is a plain classifier')
    group.add_argument('--pyx-weight', type=real(0), default=1., help='of -log p(y|x)')
    group.add_argument('--alpha', type=real(0), default=.1, help='of the L2 term on both energies')
    group.add_argument('--smoothness', type=real(0), default=1., help='of the gradient penalty on the data')
    group.add_argument('--paced', action=argparse.BooleanOptionalAction, default=True,
                       help='slow the two terms down while the energy gap is negative, that is, while chains lag behind')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--epochs', type=whole(1), default=60, help='rounds through the training images')
    group.add_argument('--batch-size', type=whole(1), default=64, help='images, and chains, in an update')
    group.add_argument('--lr', type=real(0), default=1e-3, help='learning rate of Adam')
    group.add_argument('--lr-decay', type=real(0, 1), default=.97, help='factor on the rate after each epoch')
    group.add_argument('--warmup', type=whole(1), default=100, help='updates over which the rate rises to --lr')
    group.add_argument('--clip-norm', type=real(0), default=10., help='longest gradient of the weights')
    group.add_argument('--ema', type=real(0, 1), default=.99, help='of the averaged weights, which are validated and saved')
    group.add_argument('--data-noise', type=real(0), default=.03, help='standard deviation of the noise on the data')
    group.add_argument('--picture-every', type=whole(1), default=5, help='epochs between two pictures of samples and curves')

    group = parser.add_argument_group('sampling')
    group.add_argument('--conditional', action=argparse.BooleanOptionalAction,
                       help='chains follow E(x, y) for the labels of the batch instead of E(x); a JEM does by default')
    group.add_argument('--init', choices=['reservoir', 'persistent', 'noise', 'data'], default='reservoir',
                       help='where chains start: stored chains, always the same chains, noise (short-run), data (CD)')
    group.add_argument('--prior', choices=['mixed', 'gaussian', 'uniform'], default='mixed', help='of fresh chains')
    group.add_argument('--reservoir', type=whole(1), default=2048, help='stored chains, dealt out to the classes')
    group.add_argument('--reinit', type=real(0, 1), default=.05, help='share of the drawn chains that start afresh')
    group.add_argument('--sgld-steps', type=whole(1), default=20, help='K, steps an update')
    group.add_argument('--step-size', type=real(0), default=.05, help='in pixels, see --pixel-step')
    group.add_argument('--noise', type=real(0), default=.03, help='standard deviation of the noise of a step')
    group.add_argument('--pixel-step', action=argparse.BooleanOptionalAction, default=True,
                       help='a step moves every image by --step-size; without it x - step * dE/dx, as in the lecture')
    group.add_argument('--grad-clip', type=real(0), help='clamps each element of dE/dx, e.g. .03 with --no-pixel-step')
    parser.add_shared_arguments()
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error('--resume and --overwrite exclude each other')
    if args.conditional is None:
        args.conditional = args.model == 'jem'
    if args.model == 'ebm' and (args.conditional or not args.px_weight):
        parser.error('--model ebm has no labels: leave out --conditional and --px-weight 0, or use --model jem')
    return args


def check_out(args):
    """A run in --out is neither overwritten nor continued unasked."""
    if args.out.exists() and not args.out.is_dir():
        fail(f'--out {args.out}: is a file; name a folder')
    there = [name for name in ('best.pt', 'last.pt', 'log.csv') if (args.out / name).exists()]
    if there and not (args.resume or args.overwrite):
        fail(f'--out {args.out}: {there[0]} is there already; --resume goes on with it, --overwrite starts anew, or take another --out')
    if args.resume and 'last.pt' not in there:
        fail(f'--resume: no last.pt in {args.out}; start without --resume, or name the folder with --out')


def main(argv=None):
    args = parse_args(argv)
    try:
        check_out(args)
        data = load_data(args.data, args.image_size, args.data_root, args.seed)
        if args.batch_size > len(data.train):
            fail(f'--batch-size {args.batch_size}: more than the {len(data.train)} training images; make it smaller')
        status = train(args, data)
    except (DataError, CheckpointError, OSError) as error:
        fail(error)
    if status:
        sys.exit(status)


if __name__ == '__main__':
    main()
