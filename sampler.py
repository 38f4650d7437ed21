"""SGLD and the reservoir of chains: how samples are drawn from an energy (course task 3.3).

Nothing here knows a network: an energy is any function from images (B, C, H, W) to (B,).
"""
import gc
import warnings

import torch
import torch.nn.functional as F


def sgld(energy, x, steps, step_size, noise=None, grad_clip=None, clamp=(-1.0, 1.0), generator=None, callback=None,
         free=None, differentiable=False):
    """Run `steps` steps of stochastic gradient Langevin dynamics (Welling and Teh 2011) from x; returns the last state.

        x <- x - step_size * dE/dx + noise * xi,    xi ~ N(0, I)

    Which law do the chains follow?

    * `noise=None` takes sqrt(2 * step_size). With eta = 2 * step_size that is the lecture's x - eta/2 dE/dx + sqrt(eta) xi,
      whose stationary law tends to exp(-E)/Z as eta -> 0 (with no clip and no clamp).
    * A smaller noise samples a colder law: to first order exp(-E/T)/Z with T = noise^2 / (2 * step_size). Course practice
      (step_size 10, noise .005) has T = 1.3e-6, the defaults of train.py at 56x56 (7.84, .02) have 2.6e-5: descent with a
      little noise. A clipped gradient makes a chain no exact sampler of any temperature.
    * One noise for each step makes the chain cool down on its way, see `annealed`.

    Args:
        energy: callable, (B, C, H, W) -> (B,). Only the gradient with respect to x is taken, so parameters, their
            `requires_grad` and their `.grad`, and the mode of a model behind it stay as they are.
        x: start of the chains, (B, C, H, W) float32; not changed.
        steps: number of steps K, at least 0.
        step_size: see above.
        noise: standard deviation of the noise of a step, or a list of `steps` of them (ValueError if it is longer or shorter).
        grad_clip: clamps each element of dE/dx to [-grad_clip, grad_clip] first, or None.
        clamp: (low, high) that pixels are held in, or None.
        generator: torch.Generator of x's device for the noise, or a list of B of them, see `randn`.
        callback: called as callback(k, x, e) before step k = 0 ... steps - 1 with the state x and its energy e, (B,).
        free: bool, broadcast to x: the pixels that move. The others keep their values bit by bit.
        differentiable: keep the graph of every step, so that a loss of the last state has a gradient with respect to the
            start: the chain is a network x_K = M(x_0), whose layers are its steps.
    """
    noise = (2 * step_size) ** 0.5 if noise is None else noise
    levels = noise if isinstance(noise, list) else [noise] * steps
    if not differentiable:
        x = x.detach()
    for k, level in zip(range(steps), levels, strict=True):
        x.requires_grad_(True)
        with torch.enable_grad():
            e = energy(x)  # (B,)
            # (B, C, H, W); images do not mix, so the gradient of the sum is dE/dx of each
            gradient, = torch.autograd.grad(e.sum(), x, create_graph=differentiable)
        if not differentiable:
            x = x.detach()
        before = x
        if callback is not None:
            callback(k, x, e.detach())
        if grad_clip is not None:
            gradient = gradient.clamp(-grad_clip, grad_clip)
        x = x - step_size * gradient
        if level:
            x = x + level * randn(x.shape, generator, x.device)
        if clamp is not None:
            x = x.clamp(*clamp)
        if free is not None:
            x = torch.where(free, x, before)
    return x


class Recorded:
    """A function of tensors as a CUDA graph: the first call records its kernels, every later one starts them all at once.

    For a small network a GPU finishes each kernel sooner than Python can ask for the next one; this takes Python out of the
    K steps of a chain. The function must do the same in every call and read nothing back from the GPU. Weights are read
    where they lie, so they may be updated in place, and random numbers go on in the stream of `generator` as they would
    without the graph.

    Args:
        function: callable of tensors, returns a tensor.
        generator: torch.Generator of the GPU, the only source of random numbers in it.
    """

    def __init__(self, function, generator):
        self.function, self.generator, self.graph = function, generator, None

    def __call__(self, *inputs):
        if self.graph is None:
            self.graph = self.record(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result.clone()  # the next call writes over it

    def record(self, inputs):
        self.inputs = [given.clone() for given in inputs]  # where the graph finds them
        state, main, side = self.generator.get_state(), torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self.function(*self.inputs)  # what libraries set up in their first call is not to be recorded
        main.wait_stream(side)
        self.generator.set_state(state)
        graph = torch.cuda.CUDAGraph()
        if hasattr(graph, 'register_generator_state'):  # torch before 2.14 has to be told
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # later ones say that they have not
                graph.register_generator_state(self.generator)
        gc.collect()  # another graph that is thrown away in the middle of a recording would spoil it
        with torch.cuda.graph(graph):
            self.result = self.function(*self.inputs)
        return graph


def annealed(steps, first=.5):
    """Noise for each of `steps` steps, from `first` evenly down to 0: simulated annealing (Kirkpatrick et al. 1983) by Langevin
    steps. A chain that begins hot chooses among the modes at random, where a cold one falls into the nearest, and it ends on
    clean paper. (In annealed Langevin dynamics, Song and Ermon 2019, the score and the step size change with the noise.)"""
    return [first * (1 - k / steps) for k in range(steps)]


def randn(shape, generator=None, device='cpu'):
    """N(0, I) of `shape` (B, ...). With a list of B generators each image has a random stream of its own, and its noise
    does not depend on what else is in the batch."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape[1:], generator=g, device=device) for g in generator])  # (B, ...)
    return torch.randn(shape, generator=generator, device=device)


def prior(kind, shape, generator=None, device='cpu'):
    """Starts of fresh chains, float32 of `shape` (B, C, H, W): `gaussian` N(0, 0.01), `uniform` on [-1, 1], or `mixed`, half
    gaussian and half `grainy`, so that the energy learns to lead home from everywhere."""
    if kind == 'uniform':
        return 2 * torch.rand(shape, generator=generator, device=device) - 1
    x = .1 * randn(shape, generator, device)
    if kind == 'mixed':
        pick = torch.rand(shape[0], 1, 1, 1, generator=generator, device=device) < .5  # (B, 1, 1, 1)
        x = torch.where(pick, grainy(shape, generator, device), x)
    return x


def grainy(shape, generator=None, device='cpu'):
    """Noise of every grain, from clouds to single pixels, and of every contrast, from fog to black and white."""
    batch, channels, height, width = shape
    x = torch.zeros(shape, device=device)
    cells = [2 ** i for i in range(height.bit_length()) if 2 ** i < height] + [height]
    for n in cells:  # the share of each grain is a cubed exponential: mostly one or two of them carry an image
        share = torch.empty(batch, 1, 1, 1, device=device).exponential_(generator=generator) ** 3
        octave = torch.randn(batch, channels, n, n, generator=generator, device=device)
        x += share * F.interpolate(octave, (height, width), mode='bilinear')  # (B, C, n, n) -> (B, C, H, W)
    deviation = x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # (B, 1, 1, 1)
    contrast = (3.2 * torch.rand(batch, 1, 1, 1, generator=generator, device=device) - .7).exp()  # .5 to 12
    return (contrast * x / deviation).clamp(-1, 1)


class Reservoir:
    """Stored chains (the replay buffer of Du and Mordatch 2019) as ring buffers in one tensor on the device.

    There is one ring, or one a class when sampling is conditional. `draw` takes the chains at the head of a ring, each of
    them fresh from the prior with probability `reinit`; `store` puts them back where they were. So a ring goes round, every
    chain moves once a round, and no two classes ever share a slot. One ring as long as a batch with reinit = 0 holds the
    persistent chains of Tieleman 2008; with reinit = 1 every chain is short-run MCMC (Nijkamp et al. 2019).

    Args:
        lengths: list of the number of slots of each ring, R entries. A ring that a batch asks for more chains than it has
            gives some of them twice.
        image_shape: (C, H, W).
        reinit: share of the drawn chains that start afresh.
        kind: their `prior`.
    """

    def __init__(self, lengths, image_shape, reinit=.05, kind='mixed', generator=None, device='cpu'):
        self.reinit, self.kind = reinit, kind
        self.lengths = torch.tensor(lengths, device=device)  # (R,)
        self.first = self.lengths.cumsum(0) - self.lengths  # (R,), the slot at which a ring begins
        self.head = torch.zeros_like(self.lengths)  # (R,), how far a ring has turned
        self.chains = prior(kind, (sum(lengths), *image_shape), generator, device)  # (slots, C, H, W)

    def draw(self, ring, generator=None):
        """Take one chain for each entry of `ring` (B,); returns x (B, C, H, W) and the slots (B,) to store it in."""
        member = F.one_hot(ring, len(self.lengths))  # (B,) -> (B, R)
        rank = member.cumsum(0).gather(1, ring[:, None]).squeeze(1) - 1  # (B, R) -> (B,): 0, 1, ... within a ring
        slot = self.first[ring] + (self.head[ring] + rank) % self.lengths[ring]  # (B,)
        self.head = (self.head + member.sum(0)) % self.lengths
        x = self.chains[slot]  # (B, C, H, W)
        fresh = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < self.reinit
        return torch.where(fresh, prior(self.kind, x.shape, generator, x.device), x), slot

    def store(self, slot, x):
        """Put chains x (B, C, H, W) back into the slots (B,) they were drawn from."""
        self.chains[slot] = x

    def mend(self, generator=None):
        """Replace chains that hold anything but pixel values by fresh ones."""
        broken = ~(self.chains.abs() <= 1).all(dim=(1, 2, 3), keepdim=True)  # (slots, 1, 1, 1); also where it is NaN
        self.chains = torch.where(broken, prior(self.kind, self.chains.shape, generator, self.chains.device), self.chains)

    def state_dict(self):
        return {'chains': self.chains, 'head': self.head, 'lengths': self.lengths}

    def load_state_dict(self, state):
        if state['chains'].shape != self.chains.shape or not torch.equal(state['lengths'].cpu(), self.lengths.cpu()):
            raise ValueError('the chains are of another reservoir')
        self.chains, self.head = (state[key].to(self.head.device) for key in ('chains', 'head'))

    def deal(self, states, hand, hands):
        """Take over the chains of other reservoirs (their state dictionaries) when they are dealt out anew, ring by ring, to
        `hands` reservoirs of which this is number `hand`. A longer ring than before gets some chains twice."""
        parts = [state['chains'].split(state['lengths'].tolist()) for state in states]  # a tuple of R rings each
        rings = [torch.cat(ring) for ring in zip(*parts)]  # (slots in all, C, H, W) each
        dealt = [ring[(hand + hands * torch.arange(length)) % len(ring)]
                 for ring, length in zip(rings, self.lengths.tolist(), strict=True)]
        self.chains = torch.cat(dealt).to(self.head.device)  # (slots, C, H, W)
