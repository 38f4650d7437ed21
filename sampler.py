"""SGLD, HMC and the reservoir: how samples are drawn from an energy (course task 3.3).

Nothing here knows a network: an energy is any function from images (B, C, H, W) to (B,)."""
import torch
import torch.nn.functional as F


def sgld(energy, x, steps, step_size, noise=None, grad_clip=None, clamp=(-1., 1.), generator=None,
         callback=None, free=None, differentiable=False):
    """Stochastic gradient Langevin dynamics (Welling and Teh 2011) from x; returns the last state.

        x <- x - step_size * dE/dx + noise * xi,    xi ~ N(0, I)

    * `noise=None` is sqrt(2 * step_size). With eta = 2 * step_size this is the lecture's
      x - eta/2 dE/dx + sqrt(eta) xi, whose distribution tends to exp(-E)/Z as eta -> 0.
    * With other noise it tends to exp(-E/T)/Z with the temperature T = noise^2 / (2 * step_size).
    * The clamp keeps chains in the box (projected Langevin dynamics). A clipped gradient is in
      general that of no energy, so the distribution of such chains is not known.

    Args:
        energy: callable, (B, C, H, W) -> (B,). A model behind it keeps its flags and gradients.
        x: start of the chains, float32 (B, C, H, W); not changed.
        steps: K, the number of steps.
        step_size, noise: see above; noise may be a sequence, of K values, else a ValueError.
        grad_clip: bound of each |dE/dx|, or None. clamp: (low, high) of the pixels, or None.
        generator: torch.Generator for the noise, or a list of B of them (see `randn`).
        callback: called as callback(k, x, e) before step k with the state x and its energies (B,).
        free: bool, broadcast to x: the pixels that move. The others keep their values exactly.
        differentiable: keep the graph of all steps, for gradients with respect to the start."""
    noise = (2 * step_size) ** .5 if noise is None else noise
    noises = list(noise) if torch.as_tensor(noise).ndim else [noise] * steps
    if len(noises) != steps:
        raise ValueError(f'{len(noises)} noises for {steps} steps')
    x = x.view_as(x) if differentiable else x.detach()  # so that the caller's x stays as it is
    for k, sigma in enumerate(noises):
        x.requires_grad_(True)
        with torch.enable_grad():
            e = energy(x)  # (B,)
            # Images do not mix, so the gradient of the sum is dE/dx of each image.
            gradient, = torch.autograd.grad(e.sum(), x, create_graph=differentiable)  # (B, C, H, W)
        if not differentiable:
            x = x.detach()
        before = x
        if callback is not None:
            callback(k, x, e.detach())
        if grad_clip is not None:
            gradient = gradient.clamp(-grad_clip, grad_clip)
        x = x - step_size * gradient
        if sigma:
            x = x + sigma * randn(x.shape, generator, x.device)
        if clamp is not None:
            x = x.clamp(*clamp)
        if free is not None:
            x = torch.where(free, x, before)
    return x


def hmc(energy, x, steps, step_size, noise=None, grad_clip=None, clamp=(-1., 1.), generator=None,
        leapfrog=1):
    """Hamiltonian Monte Carlo (Neal 2011) leaves exp(-E/T) in the box as it is at any step size.
    Returns the last state and the share of accepted steps (B,). A step draws p ~ N(0, I), moves
    `leapfrog` times by p <- p - a dE/dx, x <- x + noise * p, p <- p - a dE/dx, with
    a = step_size / noise, and is accepted with the probability min(1, exp(H_old - H_new)) for
    H = E/T + |p|^2 / 2. In the box, one move proposes a step of `sgld` (MALA); walls reflect it.
    Arguments as there, but noise is None or one number above 0, and x starts inside the clamp."""
    noise = noise if noise is not None else (2 * step_size) ** .5
    t, bound, accepted = noise ** 2 / (2 * step_size), grad_clip or torch.inf, 0

    @torch.enable_grad()
    def energy_and_kick(x):  # E(x) (B,), and a dE/dx (B, C, H, W)
        x = x.detach().requires_grad_(True)
        e = energy(x)
        gradient, = torch.autograd.grad(e.sum(), x)
        return e.detach(), step_size / noise * gradient.clamp(-bound, bound)  # noise/2 d(E/T)/dx
    x, (e, kick) = x.detach(), energy_and_kick(x)
    for _ in range(steps):
        p_start = randn(x.shape, generator, x.device)  # (B, C, H, W)
        q, p, new_e, new_kick = x, p_start, e, kick
        for _ in range(leapfrog):
            p = p - new_kick
            q = q + noise * p
            if clamp is not None:  # E is infinite outside the box: q bounces off its walls
                beyond = q - q.clamp(*clamp)
                q, p = q - 2 * beyond, torch.where(beyond == 0, p, -p)
                q[beyond.abs() > clamp[1] - clamp[0]] = torch.nan  # past both walls: rejected
            new_e, new_kick = energy_and_kick(q)
            p = p - new_kick
        rise = (new_e - e) / t + (p.square() - p_start.square()).flatten(1).sum(1) / 2  # of H, (B,)
        # -log u, u uniform, is distributed as (z1^2 + z2^2) / 2, from each chain's own stream.
        accept = rise < randn((len(x), 2), generator, x.device).square().sum(1) / 2  # (B,)
        mask = accept.view(-1, *[1] * (x.dim() - 1))  # (B,) -> (B, 1, 1, 1)
        x, kick = torch.where(mask, q, x), torch.where(mask, new_kick, kick)
        e, accepted = torch.where(accept, new_e, e), accepted + accept
    return x, accepted / steps


def randn(shape, generator=None, device='cpu'):
    """N(0, I) of `shape` (B, ...). With a list of B generators each image has its own, so its noise
    does not depend on the other images of the batch."""
    if isinstance(generator, list):
        return torch.stack([randn(shape[1:], g, device) for g in generator]).view(shape)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)


def chain_settings(sampler, kind, steps=None, step_size=None, noise=None):
    """Arguments for `sgld`: step and noise of every chain in this project are decided here.

    sampler: the dict of that name in a checkpoint. Kinds: 'training', as stored chains move;
    'sampling', from noise: K = 128; with a matching term K = 32, and step k has the noise
        .5 (1 - k/K)^3 (annealing, Kirkpatrick et al. 1983): hot chains choose among the modes, and
        end near the energy of data. Slower cooling ends below it, with less variety;
    'descent', without noise: the chain is a function of its start.
    steps, step_size and noise replace the decided values, but 'descent' never has noise."""
    if kind not in ('training', 'sampling', 'descent'):
        raise ValueError(f'kind {kind!r}: choose training, sampling or descent')
    # Matching makes E rise by up to `slope` per rms distance: a default step moves by up to .1.
    step_size = step_size or sampler['step_size'] or .1 * sampler['pixels'] / sampler['slope']
    if kind == 'sampling':
        steps = steps or (32 if sampler['matching'] else 128)
        if noise is None and sampler['matching']:
            noise = [.5 * (1 - k / steps) ** 3 for k in range(steps)]
    steps = steps or sampler['steps']
    noise = sampler['noise'] if noise is None else noise
    noise = 0. if kind == 'descent' else noise
    return dict(steps=steps, step_size=step_size, noise=noise, grad_clip=sampler['grad_clip'])


def temperature(sampler):
    """T = noise^2 / (2 step_size) of the stored chains, at least 1e-9; by default 2.6e-5 at 56x56.
    Steps are large: in a valley of `matching_step` the variance is 1.2 times that of exp(-E/T)."""
    settings = chain_settings(sampler, 'training')
    return max(1e-9, settings['noise'] ** 2 / (2 * settings['step_size']))


# --- where chains start ---------------------------------------------------------------------------

def prior(kind, shape, generator=None, device='cpu'):
    """Noise, float32 of `shape` (B, C, H, W), in which chains start: 'gaussian', N(0, 0.01), as for
    all samples; 'uniform', on [-1, 1]; 'grainy', see below; 'mixed', half gaussian, half grainy."""
    if kind == 'gaussian':
        return .1 * randn(shape, generator, device)
    if kind == 'uniform':
        return 2 * torch.rand(shape, generator=generator, dtype=torch.float32, device=device) - 1
    if kind == 'grainy':
        return grainy(shape, generator, device)
    if kind == 'mixed':
        x = .1 * randn(shape, generator, device)
        half = torch.rand(shape[0], 1, 1, 1, generator=generator, device=device) < .5
        return torch.where(half, grainy(shape, generator, device), x)
    raise ValueError(f'prior {kind!r}: choose gaussian, uniform, grainy or mixed')


def grainy(shape, generator=None, device='cpu'):
    """Noise of every grain, from clouds to single pixels, and of many contrasts."""
    batch, channels, height, width = shape
    x = torch.zeros(shape, dtype=torch.float32, device=device)
    grains = [2 ** i for i in range(height.bit_length()) if 2 ** i < height] + [height]
    for n in grains:  # a cubed exponential: mostly one or two grains dominate an image
        share = torch.empty(batch, 1, 1, 1, device=device).exponential_(generator=generator) ** 3
        octave = randn((batch, channels, n, n), generator, device)
        x += share * F.interpolate(octave, (height, width), mode='bilinear')  # (B, C, H, W)
    deviation = x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # (B, 1, 1, 1)
    log_scale = 3.2 * torch.rand(batch, 1, 1, 1, generator=generator, device=device) - .7
    return (log_scale.exp() * x / deviation).clamp(-1, 1).float()  # deviations of .5 to 12, clamped


class Reservoir:
    """Stored chains (the replay buffer of Du and Mordatch 2019): ring buffers in one tensor.

    There is one ring, or one for each class when chains follow E(x, y). `draw` takes the chains at
    the head of a ring and starts each one afresh with probability `reinit`; `store` puts them back
    into the same slots. So all chains take turns, and classes never share a slot.

    lengths: the number of slots of each of R rings. Chains are persistent (Tieleman 2008) with
    reinit=0 and a slot for each image of a batch, short-run (Nijkamp et al. 2019) with reinit=1."""

    def __init__(self, lengths, image_shape, reinit=.05, kind='mixed', generator=None,
                 device='cpu'):
        self.reinit, self.kind = reinit, kind
        self.lengths = torch.tensor(lengths, device=device)      # (R,)
        self.first = self.lengths.cumsum(0) - self.lengths       # (R,), the first slot of a ring
        self.head = torch.zeros_like(self.lengths)               # (R,), the next chain in a ring
        self.chains = prior(kind, (sum(lengths), *image_shape), generator, device)  # (N, C, H, W)

    def draw(self, ring, generator=None):
        """A chain for each entry of `ring` (B,): x (B, C, H, W), and the slots (B,) to store it."""
        member = F.one_hot(ring, len(self.lengths))  # (B, R)
        order = member.cumsum(0).gather(1, ring[:, None]).squeeze(1) - 1  # (B,): 2 5 2 2 -> 0 0 1 2
        slot = self.first[ring] + (self.head[ring] + order) % self.lengths[ring]  # (B,)
        self.head = (self.head + member.sum(0)) % self.lengths
        x = self.chains[slot]  # (B, C, H, W)
        fresh = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < self.reinit
        return torch.where(fresh, prior(self.kind, x.shape, generator, x.device), x), slot

    def store(self, slot, x):
        """Put the chains x (B, C, H, W) back into the slots (B,) that they were drawn from."""
        self.chains[slot] = x

    def state_dict(self):
        return {'chains': self.chains.to('cpu', copy=True),  # `store` writes into the tensor
                'head': self.head.cpu(), 'lengths': self.lengths.cpu()}

    def load_state_dict(self, state):
        """Take over saved chains. A ring of another length gets those of its class in turn."""
        rings = state['chains'].split(state['lengths'].tolist())  # R times (n, C, H, W)
        chains = [ring[torch.arange(length) % len(ring)]
                  for ring, length in zip(rings, self.lengths.tolist(), strict=True)]
        self.chains = torch.cat(chains).to(self.chains)  # (N, C, H, W)
        self.head = state['head'].to(self.head) % self.lengths


def make_reservoir(init, labels, batch_size, slots, image_shape, reinit, kind, generator=None):
    """The chains of `train.py --init`, on the device of `labels` (N,): a ring for each class.

    reservoir: slots in proportion to the frequency of the class, so that all chains are revisited
        equally often. A class has at least 16: a batch seldom has more images of a rare class.
    persistent: a batch of chains per ring, never afresh. noise: always afresh. data: not used."""
    share = labels.cpu().bincount() / len(labels)  # (R,)
    lengths = (share * max(slots, batch_size)).ceil().clamp_min(min(16, batch_size)).int().tolist()
    if init != 'reservoir':
        lengths, reinit = [batch_size] * len(share), float(init == 'noise')
    return Reservoir(lengths, image_shape, reinit, kind, generator, labels.device)


class CudaGraph:
    """A function of tensors that a GPU replays as one CUDA graph: no Python between SGLD steps.

    The first call is a plain one; then the kernels of later ones are recorded. If that fails, a
    line says so and all calls are plain. The function must do the same in every call and read
    nothing back from the GPU. `generator` goes on as it would without the graph."""
    failed = False  # of any graph: a failed recording takes the generator from the others, too

    def __init__(self, function, generator):
        self.function, self.generator, self.graph, self.inputs = function, generator, None, None

    def __call__(self, *inputs):
        if self.graph is not None and not CudaGraph.failed:
            for kept, given in zip(self.inputs, inputs, strict=True):
                kept.copy_(given)
            self.graph.replay()
            return self.result.clone()  # the next replay overwrites it
        result = self.function(*inputs)  # a first call sets up libraries: it is not recorded
        if self.inputs is None and not CudaGraph.failed:
            self.inputs = [x.clone() for x in inputs]  # the graph reads its inputs here
            self.record(torch.cuda.CUDAGraph(), self.generator.clone_state())
        return result

    def record(self, graph, spare):
        try:
            if torch.__version__ < '2.14':  # compared as a version; newer ones find it themselves
                graph.register_generator_state(self.generator)
            # A recording that fails does not restore the stream by itself.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.result = self.function(*self.inputs)
            self.graph = graph
        except Exception as error:
            CudaGraph.failed = True
            self.generator.graphsafe_set_state(spare)  # the old state still counts as recording
            reason = f'{error.__context__ or error!r}'.split('\n')[0]
            print(f'no CUDA graph, plain chains instead: {reason}')
