"""Benchmark of the sampling loop, run by hand: ours against the loop of the tutorials, in turns.

    python tests/bench_sampling.py                          some minutes on two cores
    python tests/bench_sampling.py --threads 1 --pairs 11
    python tests/bench_sampling.py --images 28 --batches 8 --steps 5 --pairs 1      to try it

The loop of the tutorials, in our own words: parameters frozen by flags, `.backward()` on the summed
energies, noise and clipping in place, the reservoir a Python list of single images on the CPU. Both
draw with the same weights, batch, step size, noise and clip. The last columns tell whether they
sample alike: mean energies after K steps from the same starts, and the standard error of
their difference. Speeds are image-steps of SGLD a second, medians of pairs (least, most).
"""
import argparse
import multiprocessing
import platform
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts stand beside this folder

from model import EnergyModel, choose_device, has_bf16  # noqa: E402
from sampler import CudaGraph, Reservoir, chain_settings, prior, sgld  # noqa: E402

STEP_SIZE, NOISE, CLIP, FRESH = 10., .005, .03, .05  # as in the tutorials


class TutorialSampler:
    """The tutorials' sampler: the reservoir is a list, and a call is one round of it."""

    def __init__(self, model, shape, batch, steps):
        self.model, self.shape, self.batch, self.steps = model, shape, batch, steps
        self.device = next(model.parameters()).device
        self.examples = [torch.rand(1, *shape) * 2 - 1 for _ in range(max(512, batch))]

    def sample(self):
        fresh = np.random.binomial(self.batch, FRESH)
        noise = torch.rand(fresh, *self.shape) * 2 - 1
        stored = torch.cat(random.choices(self.examples, k=self.batch - fresh), dim=0)
        x = self.walk(torch.cat([noise, stored], dim=0).detach().to(self.device))
        self.examples = [*x.cpu().chunk(self.batch, dim=0), *self.examples][:8192]

    def walk(self, x):
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        x.requires_grad = True
        noise = torch.randn(x.shape, device=x.device)
        for _ in range(self.steps):
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
        self.model.train()
        return x.detach()


class OurSampler:
    """The sampler of train.py: a ring buffer on the device, and `sgld`."""

    def __init__(self, model, shape, batch, steps):
        device = next(model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(0)
        self.reservoir = Reservoir([8192], shape, FRESH, 'uniform', self.generator, device)
        self.ring = torch.zeros(batch, dtype=torch.long, device=device)  # (B,)
        facts = {'steps': steps, 'step_size': STEP_SIZE, 'noise': NOISE, 'grad_clip': CLIP,
                 'matching': 0., 'slope': 1., 'pixels': torch.Size(shape).numel()}
        settings = chain_settings(facts, 'training')

        def walk(x):
            return sgld(model.energy, x, generator=self.generator, **settings)

        self.walk = CudaGraph(walk, self.generator) if device.type == 'cuda' else walk

    def sample(self):
        start, slot = self.reservoir.draw(self.ring, self.generator)
        self.reservoir.store(slot, self.walk(start))


def make(kind, size, batch, steps, precision, device):
    """A sampler and its network. Both networks have the same weights, with a last layer steep
    enough to move the chains. The tutorials run torch's own layers, in NCHW and float32."""
    torch.manual_seed(0)
    model = EnergyModel(1, precision=precision if kind == 'ours' else 'fp32')
    with torch.no_grad():
        model.head.weight *= 300
    if kind == 'ours':
        model = model.to(device)
        return OurSampler(model, (1, size, size), batch, steps), model
    plain = torch.nn.Conv2d(1, 32, 5, stride=2, padding=4)
    plain.load_state_dict(model.features[0].state_dict())
    model.features[0] = plain
    model = model.to(device).to(memory_format=torch.contiguous_format)
    model.features.register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    return TutorialSampler(model, (1, size, size), batch, steps), model


def serve(pipe, threads, *arguments):
    """A process with one sampler: it gets starts (N, B, C, H, W), gives the energies (NB,) before
    and after K steps from them, and then gives the seconds of a call as often as it is asked."""
    torch.set_num_threads(threads)
    sampler, model = make(*arguments)
    device, energies = arguments[-1], []
    for x in pipe.recv().to(device):
        with torch.no_grad():
            before = model.energy(x)  # (B,)
        end = sampler.walk(x.clone())
        with torch.no_grad():
            energies.append(torch.stack([before, model.energy(end)], dim=1).cpu())  # (B, 2)
    pipe.send(torch.cat(energies).numpy())  # (NB, 2)
    while pipe.recv():
        started = time.perf_counter()
        sampler.sample()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started)


def compare(size, batch, steps, precision, device, pairs):
    """Print a row of the table. Each sampler has a process of its own, so that neither has the
    settings or the memory of the other."""
    context, pipes, energies = multiprocessing.get_context('spawn'), {}, {}
    start = prior('uniform', (256, 1, size, size), torch.Generator().manual_seed(1))
    start = start[:256 // batch * batch].unflatten(0, (-1, batch))  # (N, B, 1, H, W)
    for kind in ('tutorial', 'ours'):
        pipes[kind], other = context.Pipe()
        arguments = (other, torch.get_num_threads(), kind, size, batch, steps, precision, device)
        context.Process(target=serve, args=arguments, daemon=True).start()
        pipes[kind].send(start)
        energies[kind] = pipes[kind].recv().astype(float)  # (NB, 2)
    seconds = {kind: [] for kind in pipes}
    for i in range(pairs + 1):
        for kind in ('tutorial', 'ours') if i % 2 else ('ours', 'tutorial'):
            pipes[kind].send(True)
            seconds[kind].append(pipes[kind].recv())
    for pipe in pipes.values():
        pipe.send(False)
    theirs, ours = (np.array(seconds[kind][1:]) for kind in pipes)  # the first one warms up
    work = batch * steps
    before, end = energies['tutorial'].mean(axis=0)
    end_of_ours = energies['ours'][:, 1].mean()
    difference = energies['ours'][:, 1] - energies['tutorial'][:, 1]
    error = difference.std() / len(difference) ** .5
    print(f'{size:4d} {batch:5d} {precision}  {spread(work / theirs)} {spread(work / ours)} '
          f'{spread(theirs / ours, ".2f")}   {before:+.2f} {end:+.4f} {end_of_ours:+.4f} '
          f'{error:.4f}', flush=True)


def spread(values, form=',.0f'):
    """Median (least, most)."""
    return f'{np.median(values):{form}} ({min(values):{form}}, {max(values):{form}})'.rjust(24)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, nargs='+', default=[56, 28], help='their side')
    parser.add_argument('--batches', type=int, nargs='+', default=[32, 128], help='at most 256')
    parser.add_argument('--steps', type=int, default=60, help='K')
    parser.add_argument('--pairs', type=int, default=7, help='calls of each sampler, in turns')
    parser.add_argument('--threads', type=int)
    parser.add_argument('--device', type=choose_device, default='auto')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, '
          f'{args.device}, torch {torch.__version__}, K {args.steps}, {args.pairs} pairs')
    print(f'size batch       {"tutorial":>24} {"ours":>24} {"ratio":>24}   '
          'energy: start, tutorial, ours, standard error')
    for precision in ['bf16', 'fp32'] if has_bf16(args.device) else ['fp32']:
        for size in args.images:
            for batch in args.batches:
                compare(size, batch, args.steps, precision, args.device, args.pairs)


if __name__ == '__main__':
    main()
