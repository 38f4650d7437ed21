"""Mistakes in students' manner, planted one by one: does the task's own marker find each of them?

    python tests/planted.py                 all of them, 5 to 10 minutes on two cores
    python tests/planted.py --only 3.3      those whose task, file or name contains this
    python tests/planted.py --jobs 4        so many runs at once

For each mistake a copy of the project gets one wrong line, and `pytest -x -m taskNN` runs there.
The table says whether a test of the task fails, which one is the first, whether its message names
the slip, and the seconds. Exit status 1 if fewer than 95 % are caught with such a message.

This file quotes lines of the solution, so it stays with the lecturer.
"""
import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[1]
SHARE = .95  # of the mistakes, to be caught
SLOW = ['torch', 'torchvision.transforms.v2', 'torchvision.datasets', 'sklearn.metrics',
        'sklearn.model_selection', 'sklearn.datasets', 'matplotlib.figure',
        'matplotlib.backends.backend_agg']  # to import; nothing of the project is among them


class Mistake(NamedTuple):
    task: str
    file: str
    right: str    # a fragment that stands in the file exactly once
    wrong: str    # what a student may have written instead
    name: str     # of the slip
    message: str  # regular expression that the message of the first failing test must match


DATA = [  # task 3.1, in data.py
    ('/ 127.5 - 1', '/ 255', 'pixels from 0 to 1', r'\[-1, 1\]'),
    ('/ 127.5 - 1', '/ 128 - 1', 'white is .99', r'\[-1, 1\]'),
    ('* 127.5).round()', '* 127.5)', 'levels cut off, not rounded', 'round'),
    ('.round().clamp(0, 255)', '.round()', 'no clamp before uint8', 'clamp'),
    ('low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)  # (N',
     'low, high = x.min(), x.max()  # (N', 'min-max over the batch', 'batch'),
    ('low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)  # (N',
     'low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)  # (N',
     'min-max for each channel', 'channel|colour'),
    ('.clamp_min(torch.finfo(torch.float32).tiny)', '', 'a constant image becomes NaN', 'constant'),
    ('x = stretch(x).expand(', 'x = x.expand(', 'min-max forgotten', 'min-max'),
    ('to_uint8(2 * x - 1))', 'to_uint8(x))', '[0, 1] taken for [-1, 1]', r'\[0, 1\]'),
    ('[image_size], antialias=True', '[image_size], antialias=False', 'resized without antialias',
     'antialias'),
    ('resize(x, [image_size], antialias=True)', 'resize(x, [image_size] * 2, antialias=True)',
     'both sides resized', 'shorter side'),
    ('center_crop(resize(x, [image_size], antialias=True), [image_size])',
     'resize(x, [image_size], antialias=True)[..., :image_size, :image_size]',
     'cropped at a corner', 'centre'),
    ('self.labels[index]', 'self.labels[:len(index)]', 'labels of other images', 'label'),
    ('parts[part] for part in SPLITS), class_names, ood)',
     "parts[part] for part in ('train', 'test', 'test')), class_names, ood)",
     'validation is the test set', 'val.*test'),
    ("parts['train'], parts[part] = [", '_, parts[part] = [', 'test images stay in train',
     'in two splits|one split only|train'),
    ('stratify=train.labels,', 'stratify=None,', 'classes split unevenly', 'stratif|class'),
    ('random_state=seed)', 'random_state=None)', 'split without the seed', 'seed'),
    ('images = prepare(read_arrays(path)[0], image_size, channels)\n        return',
     'images = read_arrays(path)[0].byte()\n        return', 'OOD arrays skip prepare', 'prepare'),
    ('{key: prepare(arrays[key], image_size) for key in PRESS_OOD}',
     '{key: arrays[key] for key in PRESS_OOD}', 'OOD sets of letterpress skip prepare', 'prepare'),
    ("to_uint8(made if name == 'constant' else low + (high - low) * stretch(made))",
     'to_uint8(made)', 'made OOD sets have another range', 'range|contrast'),
    ('x.flip(2, 3),  #', 'x.flip(3),  #', 'flipped over one axis', 'axes'),
    ('x + .3 * torch.empty_like(x).normal_', 'x + .3 * torch.empty_like(x[:1]).normal_',
     'the same noise on all images', 'same noise'),
    ('[.299, .587, .114]', '[1 / 3, 1 / 3, 1 / 3]', 'grey is the mean', 'luminance'),
    ("made if name == 'constant' else low", 'low', 'constant images are stretched', 'level'),
]

MODEL = [  # task 3.2, in model.py
    ('return -self.temperature * (logits', 'return self.temperature * (logits',
     'sign of E(x)', 'sign'),
    ('return -logits.gather', 'return logits.gather', 'sign of E(x, y)', 'sign'),
    ('self.temperature).logsumexp(1)', 'self.temperature).logsumexp(0)',
     'logsumexp over the batch', 'batch|dim=1'),
    ('(logits / self.temperature).logsumexp', 'logits.logsumexp', 'T missing inside',
     'T .*inside|inside'),
    ('-self.temperature * (logits', '-(logits', 'T missing outside', 'outside'),
    ('-self.temperature * (logits / self.temperature).logsumexp(1)', '-logits.amax(1)',
     'max for logsumexp', 'max'),
    ('-self.temperature * (logits / self.temperature).logsumexp(1)', '-logits.mean(1)',
     'mean for logsumexp', 'mean'),
    ('-self.temperature * (logits / self.temperature).logsumexp(1)', '-logits.sum(1)',
     'sum for logsumexp', 'sum of the logits'),
    ('return self.head(h.float())', 'return self.head(h.float()).softmax(1)',
     'softmax in the logits', 'softmax'),
    ('return self.head(h.float())', 'return self.head(h.float()).log_softmax(1)',
     'log softmax in the logits', 'softmax'),
    ('return -self.energy(x, y)', 'return self.energy(x, y)', 'sign of forward', 'forward'),
    ('return -self.energy(x, y)', 'return -self.energy(x)', 'forward forgets the labels',
     'forward.*label'),
    ('return self.energy_of_logits(self.get_logits(x), y)',
     'return self.energy_of_logits(self.get_logits(x))', 'energy forgets the labels',
     'energy.*label'),
    ('return -logits.gather(1, y.expand(len(logits))[:, None]).squeeze(1)', 'return -logits[:, y]',
     'every label for every image', 'one energy an image'),
    ('[:, None]).squeeze(1)', '[:, None])', 'energies (B, 1)', 'one energy an image'),
    ('self.features(x.float()', 'self.features(x.detach().float()', 'the input is detached',
     'dE/dx'),
    ('nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(), ',
     'nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.SiLU(), ',
     'batch normalisation', 'batch'),
    ('.eval().requires_grad_(False)', '.requires_grad_(False)', 'loaded model left in train mode',
     r'eval\(\)'),
    ('.eval().requires_grad_(False)', '.eval()', 'weights of the loaded model want gradients',
     'requires_grad'),
    ("enabled=self.precision == 'bf16'", "enabled=self.precision != 'bf16'",
     'precision the wrong way round', 'autocast|precision'),
    ('padding=1), nn.SiLU(),   # (B, 128, 2, 2)', 'padding=1),   # (B, 128, 2, 2)',
     'no Swish at the end', 'Swish'),
    ('nn.AdaptiveAvgPool2d(1)', 'nn.AdaptiveMaxPool2d(1)', 'max pool', 'average'),
]

SAMPLER = [  # task 3.3, in sampler.py
    ('x = x - step_size * gradient', 'x = x + step_size * gradient', 'up in E, not down', 'down'),
    ('(2 * step_size) ** .5 if', '2 * step_size if', 'noise eta, no root', 'sqrt|square root'),
    ('(2 * step_size) ** .5 if', 'step_size ** .5 if', 'noise sqrt(step_size)',
     r'sqrt\(step_size\)'),
    ('x = x - step_size * gradient', 'x = x - step_size / 2 * gradient', 'step halved again',
     'halved'),
    ('x = x - step_size * gradient', 'x = x - 2 * step_size * gradient', 'step eta, not eta / 2',
     'eta / 2'),
    ('grad(e.sum(), x, create_graph=d', 'grad(e.mean(), x, create_graph=d',
     'mean for sum in the gradient', r'sum|mean'),
    ('return torch.randn(shape,', 'return torch.rand(shape,', 'uniform noise', 'uniform|randn'),
    ('if not differentiable:\n            x = x.detach()',
     'if not differentiable:\n            pass', 'the state is not detached', 'detach'),
    ('if differentiable else x.detach()', 'if differentiable else x', 'the start is not detached',
     'start'),
    ('x = x - step_size * gradient', 'x -= step_size * gradient', 'the start is changed in place',
     'in place|start'),
    ('x = x.clamp(*clamp)', 'pass', 'no clamp', 'clamp'),
    ('clamp=(-1., 1.), generator=None,\n         callback',
     'clamp=(0., 1.), generator=None,\n         callback', 'clamp to [0, 1]', r'\[-1, 1\]'),
    ('        if sigma:\n', '        x = x if clamp is None else x.clamp(*clamp)\n'
     '        clamp = None\n        if sigma:\n', 'clamp before the noise', 'clamp after'),
    ('gradient.clamp(-grad_clip, grad_clip)', 'gradient.clamp(max=grad_clip)',
     'gradient clipped on one side', 'both sides'),
    ('sigma * randn(x.shape, generator, x.device)',
     'noises[0] * randn(x.shape, generator, x.device)', 'the first noise for all steps',
     'each step|noises'),
    ('sigma * randn(x.shape, generator, x.device)',
     'sigma * randn(x.shape[1:], generator, x.device)', 'the same noise for all images',
     'same noise'),
    ('sigma * randn(x.shape, generator, x.device)',
     'sigma * randn(x.shape, torch.Generator(x.device).manual_seed(0), x.device)',
     'noise drawn once and reused', 'once|each step'),
    ('sigma * randn(x.shape, generator, x.device)', 'sigma * randn(x.shape, None, x.device)',
     'the generator is ignored', 'generator'),
    ('gradient, = torch.autograd.grad(e.sum(), x, create_graph=differentiable)',
     'e.sum().backward(); gradient = x.grad', 'gradients left in the weights', r'backward\(\)'),
    ('self.chains[slot] = x', 'pass', 'chains are not written back', 'store'),
    ('self.chains[slot] = x', 'self.chains[:len(x)] = x', 'stored in other slots', 'slot'),
    ('device=x.device) < self.reinit', 'device=x.device) > self.reinit', 'share of fresh chains',
     'wrong way round'),
    ('return torch.where(fresh, prior(self.kind, x.shape, generator, x.device), x), slot',
     'return x, slot', 'fresh chains never', 'fresh|afresh'),
    ('return torch.where(fresh, prior(self.kind, x.shape, generator, x.device), x), slot',
     'return prior(self.kind, x.shape, generator, x.device), slot', 'fresh chains always',
     'fresh|afresh'),
    ('fresh = torch.rand(len(x), 1, 1, 1, g', 'fresh = torch.rand(x.shape, g',
     'single pixels start afresh', 'whole image'),
    ('slot = self.first[ring] + (', 'slot = (', 'slots of another class', 'class'),
    ('(self.head[ring] + order)', 'self.head[ring]', 'one chain for a class', 'twice|counted'),
    ('self.head = (self.head + member.sum(0)) % self.lengths', 'pass', 'the head stays',
     'goes on|turns'),
    ("    if kind == 'gaussian':\n        return .1 *",
     "    if kind == 'gaussian':\n        return .01 *", 'deviation .01 for variance .01',
     'deviation|variance'),
    ('return 2 * torch.rand(shape, generator=generator, dtype=torch.float32, device=device) - 1',
     'return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)',
     'uniform on [0, 1]', r'U\(-1, 1\)'),
    ("settings['noise'] ** 2 /", "settings['noise'] /", 'T without the square', 'noise\\^2|square'),
    ('noise = [.5 * (1', 'noise = [.06 * step_size * (1', 'noise of the step size',
     'first noise'),
    ('(32 if sampler', '(60 if sampler', 'slow cooling', 'instead of 32'),
    ('(1 - k / steps) ** 3', '(k / steps) ** 3', 'heated, not cooled', 'instead of'),
]

TRAIN = [  # task 3.4, in train.py
    ('return energy_real.mean() - energy_synth.mean()',
     'return energy_synth.mean() - energy_real.mean()', 'sign of px_step', 'sign|exchanged'),
    ('return energy_real.mean() - energy_synth.mean()',
     'return (energy_real - energy_synth).sum()', 'sum for mean in px_step', 'mean'),
    ('return energy_real.square().mean() + energy_synth.square().mean()',
     'return energy_real.mean().square() + energy_synth.mean().square()',
     'square of the mean in l2_step', 'square'),
    ('return energy_real.square().mean() + energy_synth.square().mean()',
     'return energy_real.square().mean()', 'L2 of the data only', 'samples|both'),
    ('return F.cross_entropy(logits, y)', 'return F.cross_entropy(logits.softmax(1), y)',
     'softmax twice', 'softmax'),
    ('return F.cross_entropy(logits, y)', 'return F.nll_loss(logits, y)', 'no log softmax',
     'softmax'),
    ('return F.cross_entropy(logits, y)', "return F.cross_entropy(logits, y, reduction='sum')",
     'sum for mean in pyx_step', 'mean'),
    ('energy(x).sum(), x, create_graph=True)', 'energy(x).sum(), x)', 'matching without a graph',
     'create_graph|graph'),
    ('/ slope - wanted)', '/ slope + wanted)', 'sign of the matching term', 'sign'),
    ('.clamp(-1, 1)  # (B, C, H, W)\n\n\n# --- after', '  # (B, C, H, W)\n\n\n# --- after',
     'noisy images leave [-1, 1]', r'\[-1, 1\]|clamp'),
    ('loss = args.pyx_weight * loss_pyx', 'loss = loss_pyx', 'pyx_weight forgotten',
     'pyx_weight.* weight missing'),
    ('loss = loss + args.px_weight * contrast * (loss_px + loss_reg)', 'pass',
     'contrastive term forgotten', 'px_step.*forgotten'),
    ("args.alpha * l2_step(energy_real, energy_synth)", '0 * l2_step(energy_real, energy_synth)',
     'L2 forgotten', 'L2.*forgotten'),
    ("args.alpha * l2_step(energy_real, energy_synth)", 'l2_step(energy_real, energy_synth)',
     'alpha forgotten', 'alpha.*weight missing'),
    ('loss_px = px_step(energy_real, energy_synth)', 'loss_px = px_step(energy_synth, energy_real)',
     'energies of data and samples exchanged', 'exchanged'),
    ('model.energy(perturb(x_synth, args, generator))', 'model.energy(x_synth)',
     'noise on the data only', 'noise'),
    ('model.get_logits(perturb(x_real, args, generator))', 'model.get_logits(x_real)',
     'noise on the samples only', 'noise'),
    ('energy_synth = model.energy(perturb(x_synth, args, generator))',
     'energy_synth = model.energy(perturb(x_synth, args, generator)).detach()',
     'energies of the samples detached', 'samples.*detached'),
    ("args.matching * matching_step(", 'matching_step(', 'weight of the matching forgotten',
     'matching.*weight missing'),
    ('model.energy if args.conditional else lambda', 'lambda', 'chains ignore the labels', 'label'),
    ('model.energy if args.conditional else lambda x, y: model.energy(x)',
     'lambda x, y: model.energy(x, (y + 1) % num_classes if args.conditional else None)',
     'labels of the chains shifted', 'label'),
    ('reservoir.draw(ring[index], generator)', 'reservoir.draw(ring[:len(index)], generator)',
     'chains of other labels', 'label|ring'),
    ("cold(x_real if args.init == 'data' else start, y)", 'cold(x_real, y)',
     'chains start at the data', 'start'),
    ('reservoir.store(slot, x_synth)', 'pass', 'samples are not stored', 'store'),
    ('reservoir.store(slot, x_synth)', 'reservoir.store(slot, start)', 'the start is stored',
     'store'),
    ("partial(move, 'training')", "partial(move, 'descent')", 'no noise in the chains',
     'noise'),
    ("partial(move, 'sampling')", "partial(move, 'training')", 'annealed chains stay cold',
     'annealed'),
    ("annealed(prior('gaussian', x_real.shape, generator, device), y)", 'annealed(x_real, y)',
     'annealed chains start at the data', 'noise'),
    ('optimizer.zero_grad()', 'pass', 'no zero_grad', 'zero_grad'),
    ('mean.lerp_(weight.detach(), 1 - EMA)', 'pass', 'average of the weights stays',
     'average'),
    ('row |= validate(averaged, val_split, args)', 'row |= validate(averaged, split, args)',
     'validation on the training images', 'validation|val'),
    ('np.repeat([0, 1, 1], len(y))', 'np.repeat([1, 0, 0], len(y))', 'labels of the AUROC turned',
     'AUROC|auroc'),
    ('torch.randperm(count, generator=generator)', 'torch.arange(count)', 'no shuffling',
     'shuffle|order'),
    ("loss + args.px_weight * numbers['loss_matching']", "loss + numbers['loss_matching']",
     'matching without px_weight', 'matching'),
    ('partial(energy, y=y), x_real, away', 'model.energy, x_real, away', 'matching shapes E(x)',
     'matching'),
    ('loss_pyx = pyx_step(logits, y)', 'loss_pyx = pyx_step(logits / model.temperature, y)',
     'cross-entropy at T', 'softmax'),
    ('model.energy(perturb(x_synth, args, generator))', 'model.energy(perturb(x_synth, args, '
     'generator), y)', "gap of E(x', y)", r'E\(x, y\)'),
]

GENERATE = [  # task 3.5, in generate.py
    ('sgld(lambda x: energy(x, i), start[i]', 'sgld(lambda x: -energy(x, i), start[i]',
     'chains climb', 'down|sign'),
    ('sgld(lambda x: energy(x, i), start[i]', 'sgld(lambda x: energy(x, i - at), start[i]',
     'every chunk has the labels of the first', 'chunk|label'),
    ('generator=streams[at:at + CHUNK]', 'generator=streams[:CHUNK]',
     'every chunk has the noise of the first', 'noise|stream'),
    ("return streams, prior('gaussian'", "return streams, 10 * prior('gaussian'",
     'starts from N(0, 1)', r'N\(0, 0?\.01\)'),
    ('SeedSequence([args.seed, i])', 'SeedSequence([args.seed, 0])', 'one noise for all images',
     'same noise|share'),
    ('SeedSequence([args.seed, i])', 'SeedSequence([args.seed + i])', 'seeds share images', 'seed'),
    ('model.energy_of_logits(logits, y[i]) -', 'model.energy_of_logits(logits) -',
     'labels ignored in samples', 'label'),
    ('model.energy_of_logits(logits, y[i]) -',
     'model.energy_of_logits(logits, y[torch.arange(len(i)) % len(y)]) -',
     'labels by place in the batch', r'y\[i\]'),
    ('- (args.guidance - 1) * log_p', '+ (args.guidance - 1) * log_p', 'sign of the guidance',
     'sign'),
    ('- (args.guidance - 1) * log_p', '- args.guidance * log_p', 'guidance w for w - 1', 'w = 1'),
    ('class_labels(args.classes, checkpoint, args).repeat_interleave(per_class)',
     'class_labels(args.classes, checkpoint, args).repeat(per_class)', 'classes mixed in the rows',
     'row'),
    ('[known.index(name) for name in names]', '[names.index(name) for name in names]',
     'classes by place in --classes', 'name'),
    ('counts.float().multinomial', 'torch.ones_like(counts).float().multinomial',
     'all classes equally often', 'frequent|share'),
    ('np.save(file, x.cpu().numpy())', 'pass', 'samples are not saved', 'save'),
    ('e = torch.stack([energy(states[k], torch', 'e = torch.stack([energy(z, torch',
     'energies of the start', 'energ'),
    ('rho.sqrt() * z[0::2, None] + (1 - rho).sqrt() * z', 'rho * z[0::2, None] + (1 - rho) * z',
     'noises mixed without square roots', 'sqrt'),
    ('[e1, e2, e1 + e2, mixture', '[e1, e2, e1 * e2, mixture', 'product of energies', 'product'),
    ('e1 - args.weight * e2]', 'e1 + args.weight * e2]', 'sign of the negation', 'negation|not'),
    ('-t * torch.logaddexp(-e1 / t, -e2 / t)', '(e1 + e2) / 2', 'mean for the mixture', 'mixture'),
    ('streams, free)[0]', 'streams, ~free)[0]', 'known pixels move', 'known'),
    ('w / (2 * s[i] ** 2)', 'w / (2 * s[i])', 'deviation for variance', r's\^2|square|variance'),
    ('10 * (4 / mse).log10()', '10 * (1 / mse).log10()', 'PSNR for pixels up to 1', 'range'),
    ('(distance - 2 * root.sum())', '(distance - root.sum())', 'factor of the Frechet distance',
     'Frechet|itself'),
]

OOD = [  # task 3.6, in ood.py
    ("scores = {'energy': energy}", "scores = {'energy': -energy}", 'sign of the score',
     'sign|higher'),
    ('-torch.expm1(log_p.amax(1))', 'log_p.amax(1).exp()', 'confidence for doubt',
     'higher|1 - max'),
    ('-(log_p.exp() * log_p).sum(1)', '(log_p.exp() * log_p).sum(1)', 'sign of the entropy',
     'entropy'),
    ('-logits.amax(1)', '-logits.amin(1)', 'least logit for the greatest', 'max_logit|greatest'),
    ('logits.log_softmax(1)  # log p', 'logits.log_softmax(0)  # log p', 'softmax over the batch',
     'batch|classes'),
    ('gradient.flatten(1).norm(dim=1)', 'gradient.flatten(1).sum(1)', 'sum for the norm', 'norm'),
    ('model.energy_of_logits(f).sum(), x)', 'model.energy_of_logits(f).mean(), x)',
     'mean for sum in the gradient', 'sum|mean'),
    ('f.detach().cpu().double()', 'f.detach().cpu()', 'doubts round to 0', 'float64|double'),
    ('labels = np.repeat([0, 1], [len(score_id)', 'labels = np.repeat([1, 0], [len(score_id)',
     'labels of the AUROC turned', 'label|OOD'),
    ('scores = np.concatenate([score_id, score_ood])',
     'scores = np.concatenate([score_ood, score_id])', 'scores in another order than labels',
     'label|order'),
    ('roc_auc_score(labels, scores), ', 'roc_auc_score(labels, scores > scores.mean()), ',
     'AUROC of decisions, not of scores', 'AUROC|pairs'),
    ('average_precision_score(labels, scores),', 'average_precision_score(1 - labels, -scores),',
     'AUPR of the in-distribution images', 'positive'),
    ('-np.quantile(-score_ood, .95', '-np.quantile(-score_id, .95', 'FPR95 threshold of the data',
     'FPR95|95 %'),
    ("(score_id >= threshold).mean()", "(score_id < threshold).mean()", 'FPR95 turned',
     'FPR95|false'),
    ('count_id.cumsum() - count_id / 2', 'count_id.cumsum()', 'ties count whole', 'ties'),
    ('random.choice(rank_id, n_id)', 'random.permutation(rank_id)', 'bootstrap without replacement',
     'replacement'),
    ('infer(model, data.val.images, device)', 'infer(model, data.test.images, device)',
     'threshold from the test set', 'validation'),
    ('np.quantile(energy, KEEP,', 'np.quantile(energy, 1 - KEEP,', 'threshold keeps 5 %', '95'),
    ("'OOD' if e > threshold", "'OOD' if e < threshold", 'verdicts turned', 'above'),
    ('class_names[f.argmax()]', 'class_names[f.argmin()]', 'class of the highest energy',
     'lowest|argm|greatest logit'),
    ('detection(test, scores[name][score]', 'detection(scores[name][score], test',
     'in-distribution and OOD exchanged', 'exchanged|order'),
    ('(right - total).abs().sum()', '(right - total).sum().abs()', 'errors of bins cancel', 'bin'),
]

TABLES = {'3.1': ('data.py', DATA), '3.2': ('model.py', MODEL), '3.3': ('sampler.py', SAMPLER),
          '3.4': ('train.py', TRAIN), '3.5': ('generate.py', GENERATE), '3.6': ('ood.py', OOD)}
MISTAKES = [Mistake(task, file, *row) for task, (file, rows) in TABLES.items() for row in rows]


def plant(text, mistake):
    """The text of the file with the mistake in it."""
    count = text.count(mistake.right)
    if count != 1:
        raise ValueError(f'{mistake.file}: {count} times instead of once: {mistake.right!r}')
    return text.replace(mistake.right, mistake.wrong)


class Watch:
    """A plugin of pytest that keeps the name and the message of the test that failed."""
    test = message = ''

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, 'reprcrash', None)
            self.test = report.nodeid.split('::')[-1]
            self.message = crash.message if crash else str(report.longrepr)


def try_out(mistake):
    """Run the task's tests on a copy with the mistake, in a process of its own: the name of the
    first test that fails, or '', its message, and the seconds."""
    watch, started = Watch(), time.monotonic()
    marker = 'task' + mistake.task.replace('.', '')
    tests = f'test_{mistake.task.replace(".", "_")}_*.py'
    with tempfile.TemporaryDirectory() as folder:
        for path in PROJECT.glob('*.py'):
            shutil.copy2(path, folder)
        shutil.copytree(PROJECT / 'tests', Path(folder, 'tests'))
        text = (PROJECT / mistake.file).read_text()
        Path(folder, mistake.file).write_text(plant(text, mistake))
        os.chdir(folder)
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        files = [str(path) for path in Path('tests').glob(tests)]
        status = pytest.main(['-x', '-q', '-m', marker, '--tb=short', '-p', 'no:cacheprovider',
                              *files], plugins=[watch])
        os.chdir(PROJECT)
    if status not in (0, 1):
        watch.test, watch.message = '', f'pytest stopped with status {status}'
    return watch.test, watch.message, time.monotonic() - started


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='part of a task, a file or a name of a slip')
    parser.add_argument('--jobs', type=int, default=2, help='runs at the same time')
    parser.add_argument('--verbose', action='store_true', help='also the messages')
    args = parser.parse_args(argv)
    chosen = [mistake for mistake in MISTAKES
              if args.only in f'{mistake.task} {mistake.file} {mistake.name}']
    os.environ['OMP_NUM_THREADS'] = '1'
    for name in SLOW:
        importlib.import_module(name)
    good = 0
    # Each run is a fork of this process: the slow imports are paid once.
    with multiprocessing.get_context('fork').Pool(args.jobs, maxtasksperchild=1) as pool:
        for mistake, (test, message, seconds) in zip(chosen, pool.imap(try_out, chosen, 1)):
            told = re.split(r'^assert |\nassert ', message)[0]  # without what pytest adds
            named = bool(test and re.search(mistake.message, told, re.DOTALL))
            verdict = 'caught' if named else 'unnamed' if test else 'MISSED'
            print(f'{mistake.task}  {verdict:7} {seconds:5.0f} s  {mistake.name:40} {test}',
                  flush=True)
            if args.verbose:
                print(re.sub('^', '         | ', message, flags=re.MULTILINE), flush=True)
            good += named
    print(f'{good} of {len(chosen)} caught with a message that names the slip')
    return int(good < SHARE * len(chosen))


if __name__ == '__main__':
    sys.exit(main())
