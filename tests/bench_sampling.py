"""Benchmark of the sampling loop, run by hand: ours against the loop of the tutorials, interleaved.

    python tests/bench_sampling.py                     ten minutes on two cores
    python tests/bench_sampling.py --threads 1 --pairs 11
    python tests/bench_sampling.py --growth growth.png only our cost against width, image size, batch, K and reservoir

The loop of the tutorials, in our own words: parameters frozen by flags, `.backward()` on the summed energies, noise and
clipping in place, the reservoir a Python list of single images on the CPU that is chunked and concatenated every update.
Both draw with the same network, batch, step size, noise and clip, and the table says whether they draw from the same law:
the mean energies after K steps from the same starts, with the standard error of their difference. Times are medians of pairs
(least, most). Then the same for whole training updates (sampling, loss, gradients, Adam), and what bounds ours: the
operations of a step at the speed of a large matrix product, and its SiLUs and noise, each timed alone.
"""
import argparse
import multiprocessing
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Data, Split  # noqa: E402
from model import EnergyModel, choose_precision, device  # noqa: E402
from sampler import prior, sgld  # noqa: E402

STEP_SIZE, NOISE, CLIP, FRESH = 10., .005, .03, .05  # as in the tutorials
PLAIN = ['--model', 'ebm', '--matching', '0', '--step-size', '10', '--noise', '.005', '--data-noise', '.005', '--grad-clip',
         '.03', '--prior', 'uniform', '--reservoir', '8192']  # the same recipe, as flags of train.py


class Sampler:
    @torch.no_grad()
    def energies(self, x):
        return self.model.energy(x)  # (B, C, H, W) -> (B,)


class TutorialSampler(Sampler):
    """The tutorials' sampler and training step: examples in a list, one round of it per call."""

    def __init__(self, model, shape, batch, device):
        self.model, self.shape, self.batch, self.device = model, shape, batch, device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0., .999))
        self.examples = [torch.rand(1, *shape) * 2 - 1 for _ in range(max(512, batch))]

    def sample(self, steps):
        fresh = np.random.binomial(self.batch, FRESH)
        noise = torch.rand(fresh, *self.shape) * 2 - 1
        stored = torch.cat(random.choices(self.examples, k=self.batch - fresh), dim=0)
        x = self.walk(torch.cat([noise, stored], dim=0).detach().to(self.device), steps)
        self.examples = [*x.cpu().chunk(self.batch, dim=0), *self.examples][:8192]
        return x

    def walk(self, x, steps):
        training = self.model.training
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        x.requires_grad = True
        noise = torch.randn(x.shape, device=x.device)
        for _ in range(steps):
            noise.normal_(0, NOISE)
            x.data.add_(noise.data)
            x.data.clamp_(min=-1., max=1.)
            energy = -self.model(x)
            energy.sum().backward()
            x.grad.data.clamp_(-CLIP, CLIP)
            x.data.add_(-STEP_SIZE * x.grad.data)
            x.grad.detach_()
            x.grad.zero_()
            x.data.clamp_(min=-1., max=1.)
        for parameter in self.model.parameters():
            parameter.requires_grad = True
        self.model.train(training)
        return x.detach()

    def update(self, x, steps):
        """Contrastive loss and L2 term on data x (B, C, H, W) and samples, and a step of Adam."""
        x = (x + NOISE * torch.randn_like(x)).clamp(-1, 1)
        real, synth = self.model(torch.cat([x, self.sample(steps)])).chunk(2)  # (B,) both
        self.optimizer.zero_grad()
        (synth.mean() - real.mean() + .1 * (real ** 2 + synth ** 2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), .1)
        self.optimizer.step()


class OurSampler(Sampler):
    """What ships: a ring buffer on the device, `sampler.sgld` and `train.update`."""

    def __init__(self, model, shape, batch, device, *flags):
        self.model, self.batch = model, batch
        args = train.parse_args([*PLAIN, '--device', device.type, '--precision', model.precision, '--batch-size', str(batch),
                                 *flags])
        split = Split(torch.zeros(batch, *shape, dtype=torch.uint8), torch.zeros(batch, dtype=torch.long))
        self.run = train.Run(args, Data(split, split, split, ['0']))
        self.y = torch.zeros(batch, dtype=torch.long, device=device)  # (B,), labels of an EBM

    def sample(self, steps):
        self.run.args.sgld_steps = steps  # the same in all calls, as a CUDA graph demands
        return train.draw_samples(self.run, None, self.y)

    def walk(self, x, steps):
        return sgld(self.model.energy, x, steps, STEP_SIZE, NOISE, CLIP)

    def update(self, x, steps):
        self.run.args.sgld_steps = steps
        train.update(self.run, x, self.y)


def clock(function, device):
    """Seconds that a call takes, the device's work included, and what it returns."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def spread(values, form='{:.0f}'):
    """Median (least, most)."""
    return ' '.join([form.format(np.median(values)), f'({form.format(min(values))}, {form.format(max(values))})'])


def make(which, size, batch, precision, device):
    """One of the samplers, on a network with the same weights, the last layer steep enough for chains to move."""
    torch.manual_seed(0)
    model = EnergyModel(1, width=32, precision=precision if which == 'ours' else 'fp32')
    with torch.no_grad():
        model.head.weight *= 300
    model = model.to(device)
    if which == 'ours':
        return OurSampler(model, (1, size, size), batch, device)
    plain = torch.nn.Conv2d(1, 32, 5, stride=2, padding=4).to(device)
    plain.load_state_dict(model.features[0].state_dict())
    model.features[0] = plain  # what the tutorials run: torch's own layers, NCHW, float32
    model.to(memory_format=torch.contiguous_format)
    model.features.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    return TutorialSampler(model, (1, size, size), batch, device)


def serve(pipe, threads, *arguments):
    """A process with one sampler: calls the methods it is told and answers with the seconds they took and what they gave; in
    the end with the MB by which its memory has grown at the most."""
    torch.set_num_threads(threads)
    sampler, device = make(*arguments), arguments[-1]
    before = most_held()
    while (call := pipe.recv()) is not None:
        name, *values = call
        seconds, result = clock(lambda: getattr(sampler, name)(*(x.to(device, copy=True) if torch.is_tensor(x) else x
                                                               for x in values)), device)
        pipe.send((seconds, result.cpu() if torch.is_tensor(result) else None))
    pipe.send(most_held() - before)


class Contender:
    """A sampler in a process of its own, so that neither has the other's settings or memory."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, torch.get_num_threads(), *arguments), daemon=True)
        self.process.start()

    def call(self, *name_and_values):
        self.pipe.send(name_and_values)
        return self.pipe.recv()

    def end(self):
        """End the process; returns the MB by which its memory has grown at the most."""
        self.pipe.send(None)
        held = self.pipe.recv()
        self.process.join()
        return held


def race(theirs, ours, pairs, *call):
    """Seconds that a call takes both, in turns: two arrays of `pairs` numbers."""
    times = {contender: [] for contender in (theirs, ours)}
    for i in range(-1, pairs):  # the first one warms up
        for contender in ((theirs, ours) if i % 2 else (ours, theirs)):
            times[contender].append(contender.call(*call)[0])
    return [np.array(times[contender][1:]) for contender in (theirs, ours)]


def compare(size, batch, steps, precision, pairs, device):
    """One row of the table; returns the image-steps per second of the tutorial and ours, medians."""
    both = theirs, ours = [Contender(which, size, batch, precision, device) for which in ('tutorial', 'ours')]

    def in_batches(contender, x, *call):  # (256, ...) -> (256, ...)
        return torch.cat([contender.call(call[0], part, *call[1:])[1] for part in x.split(batch)])

    start = prior('uniform', (256, 1, size, size), torch.Generator().manual_seed(1))
    ends = [in_batches(contender, start, 'walk', steps) for contender in both]  # (256, 1, H, W) both: the same law?
    before, *e = [in_batches(theirs, x, 'energies').double() for x in (start, *ends)]  # (256,) each
    error = ((e[0] - e[1]).var() / len(start)).sqrt().item()
    c, d = race(theirs, ours, pairs, 'update', torch.rand(batch, 1, size, size) * 2 - 1, steps)
    a, b = race(theirs, ours, pairs, 'sample', steps)  # after updates, in which malloc has learned what the loop needs
    held = [contender.end() for contender in both]  # MB
    work = batch * steps
    print(f'{size:4d} {batch:5d} {precision}  {spread(work / a):>18} {spread(work / b):>18}  {spread(a / b, "{:.2f}"):>17}  '
          f'{spread(c / d, "{:.2f}"):>17} {np.median(1 / d):6.2f}   {held[0]:4.0f} {held[1]:4.0f}   '
          f'{before.mean():+.2f} {e[0].mean():+.3f} {e[1].mean():+.3f} {error:.3f}', flush=True)
    return np.median(work / a), np.median(work / b)


def flop_per_image_step(size, width=32):
    """Floating-point operations of the forward pass and of the gradient with respect to the input, 2 a multiply-add."""
    total, channels, side = 0, 1, size
    for out, kernel, pad in ((width, 5, 4), (2 * width, 3, 1), *[(4 * width, 3, 1)] * 3):
        side = (side + 2 * pad - kernel) // 2 + 1
        total += 2 * side ** 2 * kernel ** 2 * channels * out
        channels = out
    return 2 * total


def matrix_speed(precision, device, n=2048):
    """FLOP/s of a large matrix product in this precision: what the machine can do."""
    a = torch.rand(n, n, device=device, dtype=torch.bfloat16 if precision == 'bf16' else torch.float32)
    times = [clock(lambda: a @ a, device)[0] for _ in range(8)]
    return 2 * n ** 3 / min(times)


def activation_seconds(size, batch, precision, device):
    """Seconds of what is no convolution in a step: SiLU forwards and backwards at each layer, and the noise."""
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    model, x = EnergyModel(1, width=32).to(device, dtype), torch.randn(batch, 1, size, size, device=device, dtype=dtype)
    times = [min(clock(lambda: torch.randn(x.shape, device=device), device)[0] for _ in range(20))]
    for layer in model.features:
        if isinstance(layer, torch.nn.SiLU):
            h = x.detach().requires_grad_()
            times.append(min(clock(lambda: torch.autograd.grad(F.silu(h), h, x), device)[0] for _ in range(20)))
        x = layer(x).detach()
    return sum(times)


def floor(size, batch, precision, device, tutorial, speed, limit):
    """Print how near `speed` (image-steps/s) is to what the machine allows: the operations at `limit` FLOP/s, then SiLU. No
    code that calls these kernels one after the other can be faster than that, so no ratio can be higher."""
    work = flop_per_image_step(size)
    products, rest = batch * work / limit, activation_seconds(size, batch, precision, device)
    print(f'{"":16}ours {1e3 * batch / speed:.2f} ms a step at {speed * work / 1e9:.0f} GFLOP/s, {speed * work / limit:.0%} of '
          f'a matrix product ({limit / 1e9:.0f}); floor: products {1e3 * products:.2f} ms, SiLU and noise {1e3 * rest:.2f} ms, '
          f'{batch / (products + rest) / tutorial:.2f} times the tutorial')


def most_held():
    """MB: the largest resident set that this process has had (getrusage would count its parent's, too)."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


GROWTH = {'--width': [8, 16, 32, 64], '--image-size': [16, 28, 56, 112], '--batch-size': [8, 16, 32, 64, 128],
          '--sgld-steps': [5, 10, 20, 40, 80], '--reservoir': [1_000, 10_000, 100_000]}


def growth(path, device):
    """Milliseconds of an update of the default recipe, one setting changed at a time: a table and a figure."""
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(3 * len(GROWTH), 3), layout='constrained', sharey=True)
    for ax, (flag, values) in zip(axes, GROWTH.items()):
        times = []
        for value in values:
            flags = {'--image-size': 56, '--batch-size': 32, '--sgld-steps': 20, '--reservoir': 2048, '--width': 32}
            flags[flag] = value
            args = train.parse_args(['--device', device.type, *(str(word) for pair in flags.items() for word in pair)])
            images = torch.randint(256, (args.batch_size, 1, args.image_size, args.image_size), dtype=torch.uint8)
            split = Split(images, torch.arange(args.batch_size) % 10)
            run = train.Run(args, Data(split, split, split, list('0123456789')))
            x, y = split.to(device).batch(torch.arange(args.batch_size, device=device))
            train.update(run, x, y)
            times.append(1e3 * min(clock(lambda: train.update(run, x, y), device)[0] for _ in range(5)))
        print(f'{flag:13}' + '  '.join(f'{value}: {ms:.0f} ms' for value, ms in zip(values, times)), flush=True)
        ax.loglog(values, times, marker='o')
        if flag != '--reservoir':  # which shall cost nothing
            ax.loglog(values, np.array(values) * times[-1] / values[-1], ':', color='grey', label='in proportion')
        ax.set_xticks(values, map(str, values))
        ax.minorticks_off()
        ax.set(xlabel=flag)
    axes[0].set_ylabel('ms an update')
    axes[0].legend()
    figure.savefig(path, dpi=100)


def start_up():
    """Seconds from the command to the end of --help, for each script."""
    for script in ('train', 'generate', 'ood'):
        times = [clock(lambda: subprocess.run([sys.executable, ROOT / f'{script}.py', '--help'], capture_output=True,
                                              check=True), torch.device('cpu'))[0] for _ in range(3)]
        print(f'{script}.py --help: {min(times):.1f} s')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=7)
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--threads', type=int)
    parser.add_argument('--device', type=device, default='auto')
    parser.add_argument('--growth', type=Path, metavar='PNG')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {args.device}, '
          f'torch {torch.__version__}, K {args.steps}, {args.pairs} pairs')
    if args.growth:
        return growth(args.growth, args.device)
    print('                        image-steps/s                        ratio of             ratio of         ours    MB held by'
          '  energy: start, tutorial,\nsize batch           tutorial               ours  sampling           updates        1/s'
          '   both, above ours, standard error')
    for precision in dict.fromkeys((choose_precision('auto', args.device), 'fp32')):
        limit = matrix_speed(precision, args.device)
        for size, batch in ((56, 32), (56, 128), (28, 32), (28, 128)):
            speeds = compare(size, batch, args.steps, precision, args.pairs, args.device)
            floor(size, batch, precision, args.device, *speeds, limit)
    start_up()


if __name__ == '__main__':
    main()
