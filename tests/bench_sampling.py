"""Benchmark of the sampling loop, run by hand: ours against the loop of the tutorials, interleaved in one process.

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
from model import EnergyModel, choose_device, choose_precision  # noqa: E402
from sampler import prior, sgld  # noqa: E402

STEP_SIZE, NOISE, CLIP, FRESH = 10., .005, .03, .05  # as in the tutorials
PLAIN = ['--model', 'ebm', '--matching', '0', '--step-size', '10', '--noise', '.005', '--data-noise', '.005', '--grad-clip',
         '.03', '--prior', 'uniform', '--reservoir', '8192']  # the same recipe, as flags of train.py


class TutorialSampler:
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


class OurSampler:
    """What ships: a ring buffer on the device, `sampler.sgld` and `train.update`."""

    def __init__(self, model, shape, batch, device, *flags):
        self.model, self.batch = model, batch
        args = train.parse_args([*PLAIN, '--device', device.type, '--precision', model.precision, '--batch-size', str(batch),
                                 *flags])
        split = Split(torch.zeros(batch, *shape, dtype=torch.uint8), torch.zeros(batch, dtype=torch.long))
        self.run = train.Run(args, Data(split, split, split, ['0']))
        self.y = torch.zeros(batch, dtype=torch.long, device=device)  # (B,), labels of an EBM

    def sample(self, steps):
        self.run.args.sgld_steps = steps
        return train.draw_samples(self.run, self.model.energy, torch.empty(self.batch, 1, device=self.y.device), None)

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


def contenders(size, batch, precision, device):
    """Both samplers on networks with the same weights, the last layer steep enough for chains to move."""
    torch.manual_seed(0)
    plain = EnergyModel(1, width=32).to(device).to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        plain.head.weight *= 300
    plain.features.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))  # what the tutorials run: NCHW, float32
    model = EnergyModel(1, width=32, precision=precision).to(device)
    model.load_state_dict(plain.state_dict())
    shape = (1, size, size)
    return TutorialSampler(plain, shape, batch, device), OurSampler(model, shape, batch, device)


def race(theirs, ours, device, pairs):
    """Seconds of two functions, called in turns: lists of `pairs` numbers."""
    theirs(), ours()  # warm up
    times = {theirs: [], ours: []}
    for i in range(pairs):
        for function in ((theirs, ours) if i % 2 else (ours, theirs)):
            times[function].append(clock(function, device)[0])
    return np.array(times[theirs]), np.array(times[ours])


def compare(size, batch, steps, precision, pairs, device):
    """One row of the table; returns our image-steps per second and our updates per second, and both ratios, medians."""
    theirs, ours = contenders(size, batch, precision, device)
    start = prior('uniform', (256, 1, size, size), torch.Generator(device).manual_seed(1), device)
    ends = [sampler.walk(start.clone(), steps) for sampler in (theirs, ours)]  # (256, 1, H, W) both: the same law?
    with torch.no_grad():
        before, *e = [theirs.model.energy(x).double() for x in (start, *ends)]  # (256,) each
    error = ((e[0] - e[1]).var() / len(start)).sqrt().item()
    a, b = race(lambda: theirs.sample(steps), lambda: ours.sample(steps), device, pairs)
    x = torch.rand(batch, 1, size, size, device=device) * 2 - 1
    c, d = race(lambda: theirs.update(x, steps), lambda: ours.update(x, steps), device, pairs)
    work = batch * steps
    print(f'{size:4d} {batch:5d} {precision}  {spread(work / a):>18} {spread(work / b):>18}  {spread(a / b, "{:.2f}"):>17}  '
          f'{spread(c / d, "{:.2f}"):>17} {np.median(1 / d):6.2f}   {before.mean():+.2f} {e[0].mean():+.3f} {e[1].mean():+.3f} '
          f'{error:.3f}', flush=True)
    return np.median(work / b)


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


def floor(size, batch, precision, device, speed, limit):
    """Print how near `speed` (image-steps/s) is to what the machine allows: the operations at `limit` FLOP/s, then SiLU."""
    work = flop_per_image_step(size)
    products, rest = batch * work / limit, activation_seconds(size, batch, precision, device)
    print(f'{"":16}ours {1e3 * batch / speed:.2f} ms a step at {speed * work / 1e9:.0f} GFLOP/s, {speed * work / limit:.0%} of '
          f'a matrix product ({limit / 1e9:.0f}); floor: products {1e3 * products:.2f} ms, SiLU and noise {1e3 * rest:.2f} ms')


def most_held():
    """MB: the largest resident set that this process has had (getrusage would count its parent's, too)."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


def grow(queue, which, size, batch, steps, precision, device):
    """Put into `queue` the MB by which the resident set of this process grows over two updates at the most."""
    sampler = contenders(size, batch, precision, device)[which]
    before = most_held()
    for _ in range(2):
        sampler.update(torch.zeros(batch, 1, size, size), steps)
    queue.put(most_held() - before)


def peak_memory(*arguments):
    """What `grow` says in a process of its own."""
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    context.Process(target=grow, args=(queue, *arguments)).start()
    return queue.get()


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
        ax.loglog(values, np.array(values) * times[-1] / values[-1], ':', color='grey', label='in proportion')
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
    parser.add_argument('--device', default='auto')
    parser.add_argument('--growth', type=Path, metavar='PNG')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}, '
          f'torch {torch.__version__}, K {args.steps}, {args.pairs} pairs')
    if args.growth:
        return growth(args.growth, device)
    print('                        image-steps/s                        ratio of             ratio of         ours    '
          'energy: start, tutorial,\nsize batch           tutorial               ours  sampling           updates    '
          '    1/s     ours, standard error')
    for precision in dict.fromkeys((choose_precision('auto', device), 'fp32')):
        limit = matrix_speed(precision, device)
        for size, batch in ((56, 32), (56, 128), (28, 32), (28, 128)):
            speed = compare(size, batch, args.steps, precision, args.pairs, device)
            floor(size, batch, precision, device, speed, limit)
    if device.type == 'cpu':
        for which, name in enumerate(('tutorial', 'ours')):
            print(f'{name}: two updates of 128 images of 56x56 need '
                  f'{peak_memory(which, 56, 128, 10, choose_precision("auto", device), device):.0f} MB')
    start_up()


if __name__ == '__main__':
    main()
