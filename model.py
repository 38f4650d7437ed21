"""The energy-based model (course task 3.2): one network, the sign of its energy, its checkpoints.

One network gives K logits f(x)[y]. They define p(x, y) = exp(-E(x, y) / T) / Z:

    E(x, y) = -f(x)[y]                      joint energy
    E(x)    = -T logsumexp_y(f(x)[y] / T)   marginal energy, of p(x) = exp(-E(x) / T) / Z
    p(y|x)  = softmax_y(f(x)[y] / T)        classifier: Z cancels

With T = 1 these are eq. 4 to 7 of JEM (Grathwohl et al. 2020). train.py sets T to the temperature
of its chains, or to 1 for a classifier. Low energy = likely = in-distribution. K = 1: a plain EBM.
"""
import argparse
import contextlib
import io
import math
import os
import signal
import sys
if os.path.basename(sys.argv[0]) in ('train.py', 'generate.py', 'ood.py'):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class EnergyModel(nn.Module):
    """A network and the energies of its K logits. 'bf16' computes its `features` in bfloat16."""

    def __init__(self, num_classes=1, channels=1, width=32, temperature=1., precision='fp32'):
        super().__init__()
        if precision not in ('fp32', 'bf16'):
            raise ValueError(f'precision {precision!r}: choose fp32 or bf16')
        self.settings = {'num_classes': num_classes, 'channels': channels, 'width': width,
                         'temperature': temperature}
        self.temperature, self.precision = temperature, precision
        self.features = swish_cnn(channels, width)
        self.head = nn.Linear(4 * width, num_classes)
        nn.init.constant_(self.head.bias, -temperature * math.log(num_classes))  # E(x) near 0
        self.to(torch.float32, memory_format=torch.channels_last)  # fastest layout of convolutions

    def get_logits(self, x):
        """f(x)[y] for all y: x (B, C, H, W) in [-1, 1] -> (B, K) float32. Integer x: TypeError."""
        if not x.is_floating_point():
            raise TypeError(f'images are {x.dtype}; map them to [-1, 1] with data.to_float first')
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == 'bf16'):
            h = self.features(x.float().contiguous(memory_format=torch.channels_last))
        return self.head(h.float())  # (B, 4 * width) -> (B, K); bfloat16 is too coarse for energies

    def forward(self, x, y=None):
        """-E(x), the unnormalised log density for T = 1, or -E(x, y) = f(x)[y]: (B,)."""
        return -self.energy(x, y)

    def energy(self, x, y=None):
        """E(x), or E(x, y) for labels as in `energy_of_logits`: (B, C, H, W) -> (B,)."""
        return self.energy_of_logits(self.get_logits(x), y)

    def energy_of_logits(self, logits, y=None):
        """f(x)[y] (B, K) -> E(x) or E(x, y) (B,): here the energy gets its sign and temperature.
        y: an int, one label (1,) or B labels (B,), from 0 to K - 1; else a ValueError."""
        if y is None:
            return -self.temperature * (logits / self.temperature).logsumexp(1)  # (B, K) -> (B,)
        y = torch.as_tensor(y, device=logits.device)
        try:
            return -logits.gather(1, y.expand(len(logits))[:, None]).squeeze(1)  # (B, K) -> (B,)
        except RuntimeError as e:
            raise ValueError(f'y: one label or {len(logits)}, 0 to {logits.shape[1] - 1}') from e


def swish_cnn(channels, width):
    """Five convolutions of stride 2, 5x5 with padding 4, then 3x3 with padding 1, and an average
    pool: (B, C, H, W) -> (B, 4 * width); shapes below for width 32. Swish makes dE/dx smooth, and
    without batch normalisation no energy depends on other images."""
    return nn.Sequential(                                                     # (B, C, 56, 56)
        FirstConv2d(channels, width, 5, stride=2, padding=4), nn.SiLU(),      # (B, 32, 30, 30)
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(),       # (B, 64, 15, 15)
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),   # (B, 128, 8, 8)
        nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),   # (B, 128, 4, 4)
        nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),   # (B, 128, 2, 2)
        nn.AdaptiveAvgPool2d(1), nn.Flatten())                                # (B, 128), any H, W


class FirstConv2d(nn.Conv2d):
    """A convolution for 5x5, stride 2 and padding 4 only, computed as a 3x3 convolution of 2x2
    pixel blocks. The sums are the same, but dE/dx takes a CPU half the time."""

    def forward(self, x):
        assert (*self.kernel_size, *self.stride, *self.padding) == (5, 5, 2, 2, 4, 4)
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))  # (B, C, H, W) with even H and W
        x = F.pixel_unshuffle(x, 2)                           # (B, 4C, H/2, W/2)
        weight = F.pixel_unshuffle(F.pad(self.weight, (0, 1, 0, 1)), 2)  # (O, 4C, 3, 3)
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return F.conv2d(x, weight, self.bias, padding=2)      # (B, O, H/2 + 2, W/2 + 2)


# --- checkpoints --------------------------------------------------------------------------------

class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and the way out."""


def save_checkpoint(file, model, args, data, sampler, epoch, run=None):
    """Write the dict below to an open file. data: `Data.describe()`; run: for --resume."""
    checkpoint = {'network': str(model), 'settings': model.settings, 'weights': model.state_dict(),
                  'class_names': data['class_names'] if model.settings['num_classes'] > 1 else [],
                  'args': args, 'data': data, 'sampler': sampler, 'epoch': epoch, 'run': run}
    buffer = io.BytesIO()  # so that a full disk is an OSError; torch.save raises a RuntimeError
    torch.save(checkpoint, buffer)
    file.write(buffer.getbuffer())


def load_model(path, device='cpu', precision='fp32'):
    """The frozen network of a checkpoint and the dict of `save_checkpoint`, or CheckpointError."""
    reason = 'damaged or of another program' if os.path.exists(path) else 'no such file'
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)  # runs no code
        model = EnergyModel(**checkpoint['settings'], precision=precision)
        _ = [checkpoint[key] for key in ('class_names', 'args', 'data', 'sampler')]  # or KeyError
        for old, new in zip(checkpoint['network'].splitlines(), str(model).splitlines()):
            if old != new:  # the weights may fit all the same, as with another stride
                raise ValueError(reason := f'trained with{old}, while model.py builds{new} now')
        reason = 'trained with another network than that of model.py now'
        model.load_state_dict(checkpoint['weights'])
    except Exception as error:  # torch.load raises many kinds of exceptions for damaged files
        raise CheckpointError(f'{path}: {reason}; train one with python train.py') from error
    return model.to(device).eval().requires_grad_(False), checkpoint


# --- flags, devices and mistakes ----------------------------------------------------------------

def fail(message):
    """Tell a user's mistake in one line and exit with status 2."""
    print(f'{os.path.basename(sys.argv[0])}: {" ".join(str(message).split())}', file=sys.stderr)
    sys.exit(2)


class CommandLine(argparse.ArgumentParser):
    """argparse with the flags that all scripts share and with mistakes told in one line."""
    error = staticmethod(fail)

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        flag = self.add_argument_group('machine').add_argument
        flag('--seed', type=number(int, 0, 2**32 - 1), default=0, help='random seed')
        flag('--device', type=choose_device, default='auto', help='cpu, cuda, mps; auto: fastest')
        flag('--precision', choices=['auto', 'fp32', 'bf16'], default='auto', help='auto: fastest')

    def parse_args(self, argv=None):
        os.environ.pop('MPLBACKEND', None)  # set by notebooks; a script's Python may not have it
        if hasattr(sys.stdout, 'reconfigure'):  # it may be closed
            sys.stdout.reconfigure(errors='backslashreplace')  # class names may be in any alphabet
        args = super().parse_args(argv)
        if os.path.exists(args.out) and not os.access(os.path.join(args.out, '.'), os.W_OK):
            self.error(f'--out {args.out}: no folder that can be written; name another one')
        if args.precision == 'auto':
            args.precision = 'bf16' if has_bf16(args.device) else 'fp32'
        if 1 < torch.get_num_threads() == os.cpu_count() and 'OMP_NUM_THREADS' not in os.environ:
            torch.set_num_threads(os.cpu_count() - 1)  # all would wait for the slowest
        return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


def number(kind, low, high=10 ** 7):
    """argparse type: an int or float (`kind`) from `low` to `high`."""
    def number(text):  # argparse quotes this name: invalid number value
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f'{text} is not a number from {low} to {high}')
    return number


def choose_device(text):
    """argparse type: the torch.device of this name if it computes; auto: the fastest that does."""
    for name in ['cuda', 'mps', 'cpu'] if text == 'auto' else [text]:
        with contextlib.suppress(RuntimeError, AssertionError, ImportError):
            torch.conv2d(*torch.ones((2, 1, 1, 1, 1), device=name)).item()  # driver, wheel, cuDNN
            return torch.device(name)
        if name == 'cuda' and text == 'auto' and torch.cuda.device_count():
            print('the GPU does not fit this torch or its driver: on the CPU', file=sys.stderr)
    raise argparse.ArgumentTypeError(f'{text} does not work on this machine; use --device cpu')


def has_bf16(device):
    """Whether bf16 is fast here: NVIDIA GPUs from Ampere on, CPUs with AVX512-BF16."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == 'cpu' and bool(torch.cpu.get_capabilities().get('avx512_bf16'))


@contextlib.contextmanager
def user_mistakes(*kinds):
    """Tell these and our errors in one line, status 2. Ctrl-C, SIGTERM, ... exit with 128 + n."""
    stops = [n for n in signal.Signals if n.name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGUSR2')]
    before = [signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in stops]
    try:
        yield
    except (CheckpointError, OSError, *kinds) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not any(s in repr(error) for s in ('MemoryError', 'allocate', 'of memory', 'ALLOC_')):
            raise  # a bug
        fail(f'too little memory; lower --batch-size, --width or --images (ood.py: BATCH). {error}')
    finally:
        for n, handler in zip(stops, before):
            signal.signal(n, handler)


# --- torchrun --nproc-per-node N train.py: N processes ("ranks") share every batch ----------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0  # rank 0 writes the files


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors):
    """Means over the ranks, in place. DistributedDataParallel does not work with autograd.grad."""
    for tensor in tensors if ranks() > 1 else []:
        dist.all_reduce(tensor)
        tensor /= ranks()
