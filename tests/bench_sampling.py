"""Benchmark of the sampling loop, run by hand: ours against the loop of the tutorials, interleaved in one process.

    python tests/bench_sampling.py                     a few minutes on two cores
    python tests/bench_sampling.py --threads 1 --pairs 11

The loop of the tutorials, in our own words: parameters frozen by flags, `.backward()` on the summed energies, noise and
clipping in place, the reservoir a Python list of single images on the CPU that is chunked and concatenated every update.
Both draw with the same network, batch, step size, noise and clip, and the table says whether they draw from the same law:
the mean energies after K steps, with the standard error of their difference. Times are medians of pairs (least, most).
"""
import argparse
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from model import EnergyModel, choose_device, choose_precision  # noqa: E402
from sampler import Reservoir, prior, sgld  # noqa: E402

STEP_SIZE, NOISE, CLIP, FRESH = 10., .005, .03, .05  # as in the tutorials


class TutorialSampler:
    """The tutorials' sampler: examples in a list, one update of it per call."""

    def __init__(self, model, shape, batch, device):
        self.model, self.shape, self.batch, self.device = model, shape, batch, device
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


class OurSampler:
    """The sampler that ships: a ring buffer on the device and `sampler.sgld`."""

    def __init__(self, model, shape, batch, device):
        self.model, self.ring = model, torch.zeros(batch, dtype=torch.long, device=device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.reservoir = Reservoir([max(512, batch)], shape, FRESH, 'uniform', self.generator, device)

    def sample(self, steps):
        x, slot = self.reservoir.draw(self.ring, self.generator)
        x = sgld(self.model.energy, x, steps, STEP_SIZE, NOISE, CLIP, generator=self.generator)
        self.reservoir.store(slot, x)
        return x


def clock(function, device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def spread(values, form='{:.0f}'):
    return ' '.join([form.format(np.median(values)), f'({form.format(min(values))}, {form.format(max(values))})'])


def compare(size, batch, steps, precision, pairs, device):
    """One row of the table: image-steps per second of both, the ratio, and the energies both end at."""
    torch.manual_seed(0)
    plain = EnergyModel(10, width=32).to(device).to(memory_format=torch.contiguous_format)
    plain.features.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))  # what the tutorials run: NCHW, float32
    model = EnergyModel(10, width=32, precision=precision).to(device)
    model.load_state_dict(plain.state_dict())
    shape = (1, size, size)
    theirs, ours = TutorialSampler(plain, shape, batch, device), OurSampler(model, shape, batch, device)
    theirs.sample(2), ours.sample(2)  # warm up
    speeds, ratios = ([], []), []
    for i in range(pairs):
        order = (theirs, ours) if i % 2 else (ours, theirs)
        times = {sampler: clock(lambda s=sampler: s.sample(steps), device)[0] for sampler in order}
        for speed, sampler in zip(speeds, (theirs, ours)):
            speed.append(batch * steps / times[sampler])
        ratios.append(times[theirs] / times[ours])
    # The same law from the same start?
    start = prior('uniform', (512, *shape), torch.Generator(device).manual_seed(1), device)
    ends = [theirs.walk(start.clone(), steps), sgld(model.energy, start, steps, STEP_SIZE, NOISE, CLIP)]  # (512, C, H, W)
    with torch.no_grad():
        e = [plain.energy(x).double() for x in ends]  # (512,) both
    error = ((e[0].var() + e[1].var()) / 512).sqrt().item()
    print(f'{size:4d} {batch:5d} {steps:4d} {precision}  {spread(speeds[0]):>20} {spread(speeds[1]):>22}  '
          f'{spread(ratios, "{:.2f}"):>18}   {e[0].mean():+.4f} {e[1].mean():+.4f}  {error:.4f}', flush=True)
    return np.median(speeds[1])


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
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}, '
          f'torch {torch.__version__}')
    print('size batch    K      tutorial, image-steps/s   ours, image-steps/s    ratio              energies, their error')
    for precision in dict.fromkeys((choose_precision('auto', device), 'fp32')):
        limit = matrix_speed(precision, device)
        for size, batch in ((56, 32), (56, 128), (28, 32), (28, 128)):
            speed = compare(size, batch, args.steps, precision, args.pairs, device)
            done = speed * flop_per_image_step(size)
            print(f'{"":18}ours: {done / 1e9:.0f} GFLOP/s, {done / limit:.0%} of a matrix product, {limit / 1e9:.0f}')
    start_up()


if __name__ == '__main__':
    main()
