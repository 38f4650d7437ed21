"""The energy-based model: a small Swish CNN, the sign of its energy, where and how it computes, and its checkpoints.

One network gives K logits f(x)[y], and everything else follows (Grathwohl et al. 2020, "Your classifier is secretly an
energy based model and you should treat it like one", equations 4 to 7):

    E(x, y) = -f(x)[y]                      joint energy
    E(x)    = -logsumexp_y f(x)[y]          marginal energy, so exp(-E(x)) sums exp(-E(x, y)) over y
    p(y|x)  = softmax_y f(x)[y]             the classifier: the normalising constant of p(x, y) cancels

Low energy = likely = in-distribution. With K = 1 the same class is a plain energy-based model without labels.
"""
import argparse
import contextlib
import io
import math
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

FORMAT = 2  # of the checkpoint; raised whenever an older file could be misread


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, with the way out in its message."""


class EnergyModel(nn.Module):
    """Convolutions with Swish, adaptive average pooling and one linear layer (course task 3.2).

    Every activation is smooth, since the sampler follows dE/dx, and there is no batch normalisation, since the energy of
    one image must not depend on the others in its batch (nor on whether they are real or synthetic).

    Args:
        num_classes: K, the number of logits; 1 is a plain EBM.
        channels: C, 1 for grey, 3 for RGB.
        width: feature maps of the first convolution; the later ones have 2, 4, 4 and 4 times as many.
        precision: 'fp32', or 'bf16' for bfloat16 convolutions. Logits and energies are float32 either way.
    """

    def __init__(self, num_classes=1, channels=1, width=32, precision='fp32'):
        super().__init__()
        self.settings = {'num_classes': num_classes, 'channels': channels, 'width': width}
        self.precision = precision
        self.features = nn.Sequential(                                               # for x (B, C, 56, 56):
            FirstConv2d(channels, width), nn.SiLU(),                                 # (B, 32, 30, 30)
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU(),          # (B, 64, 15, 15)
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),      # (B, 128, 8, 8)
            nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),      # (B, 128, 4, 4)
            nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1), nn.SiLU(),      # (B, 128, 2, 2)
            nn.AdaptiveAvgPool2d(1), nn.Flatten())                                   # (B, 128), whatever the image size
        self.head = nn.Linear(4 * width, num_classes)
        nn.init.constant_(self.head.bias, -math.log(num_classes))  # energies start near 0, where the L2 term holds them
        self.to(memory_format=torch.channels_last)  # the layout in which CPU and GPU convolutions are fastest

    def get_logits(self, x):
        """f(x)[y] for all y: x (B, C, H, W) in [-1, 1] -> (B, K), float32."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.precision == 'bf16'):
            h = self.features(x.contiguous(memory_format=torch.channels_last))  # (B, C, H, W) -> (B, 4 * width)
        return self.head(h.float())  # (B, K); in float32, where logsumexp keeps its digits

    def forward(self, x, y=None):
        """The unnormalised log density, (B,): f(x)[y] where labels y (B,) are given, else f(x) = logsumexp_y f(x)[y]."""
        logits = self.get_logits(x)  # (B, K)
        if y is None:
            return logits.logsumexp(dim=1)  # (B, K) -> (B,)
        return logits.gather(1, y[:, None]).squeeze(1)  # (B, K) -> (B, 1) -> (B,)

    def energy(self, x, y=None):
        """E(x, y) = -f(x)[y] or E(x) = -f(x), (B,): low for what is likely."""
        return -self(x, y)


class FirstConv2d(nn.Conv2d):
    """nn.Conv2d(channels, width, 5, stride=2, padding=4), computed as an unstrided 3x3 convolution of 2x2 blocks of pixels.

    The same sums in another order. But the gradient with respect to a single channel of pixels, which every step of SGLD
    asks for, is where a CPU spends a third of its time on convolutions; with respect to four it takes half as long.
    """

    def __init__(self, channels, width):
        super().__init__(channels, width, 5, stride=2, padding=4)

    def forward(self, x):
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))  # (B, C, H, W) with even H and W
        x = F.pixel_unshuffle(x, 2)  # (B, 4C, H/2, W/2)
        weight = F.pixel_unshuffle(F.pad(self.weight, (0, 1, 0, 1)), 2)  # (O, C, 5, 5) -> (O, C, 6, 6) -> (O, 4C, 3, 3)
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return F.conv2d(x, weight, self.bias, padding=2)  # (B, O, H/2 + 2, W/2 + 2)


# --- device, precision, command line ----------------------------------------------------------------------------------

class CommandLine(argparse.ArgumentParser):
    """argparse with the flags that all scripts share, real defaults in --help, and mistakes told in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def add_shared_arguments(self):
        group = self.add_argument_group('machine')
        group.add_argument('--seed', type=whole(0, 2 ** 32 - 1), default=0, help='of everything random')
        group.add_argument('--device', type=device, default='auto', help='auto (the fastest there is), cpu, cuda or mps')
        group.add_argument('--precision', choices=['auto', 'fp32', 'bf16'], default='auto',
                           help='of the convolutions; auto is bf16 where the machine computes it natively')

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        args.precision = choose_precision(args.precision, args.device)
        return args

    def error(self, message):
        self.exit(2, f'{self.prog}: {message}\n')


def fail(error):
    """Tell a user's mistake in one line and leave with exit status 2."""
    print(f'{Path(sys.argv[0]).name}: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(2)


class Screen:
    """stdout or stderr as a long run needs it: when its reader leaves (`| head`, or `| tee` on Ctrl-C) or its disk is full,
    the run goes on, and a name that the screen cannot show is shown as its codes."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, 'reconfigure'):  # a notebook's has no encoding
            stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.unless_left(self.stream.write, text)

    def flush(self):
        self.unless_left(self.stream.flush)

    def unless_left(self, call, *arguments):
        try:
            return call(*arguments)
        except OSError:  # from now on into nothing, also what Python itself writes when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def mistakes_told(*errors):
    """Tell these exceptions as a user's mistake, in one line and with exit status 2; Ctrl-C leaves with 130."""
    streams = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = map(Screen, streams)
        yield
    except (CheckpointError, OSError, *errors) as error:
        of_system = isinstance(error, OSError) and error.filename  # such as a name that is too long
        fail(f'{error.filename}: {error.strerror}; name another file or folder' if of_system else error)
    except (MemoryError, RuntimeError) as error:
        told = re.search('out of memory|allocate|Storage size', str(error))  # a bare RuntimeError, where it is the CPU's
        if not (told or isinstance(error, MemoryError)):
            raise
        fail('not enough memory; make --batch-size, --image-size, --width, --reservoir or --count smaller')
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stdout, sys.stderr = streams


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action):
        bare = action.default is None or action.default is False  # but 0 is a default to show
        return action.help if bare else super()._get_help_string(action)


def whole(low, high=2 ** 31):
    """argparse type: an integer from `low` to `high`."""
    def parse(text):
        if not re.fullmatch(r'\d{1,19}', text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {low} to {high}')
        return int(text)
    return parse


def real(low, high=1e38):
    """argparse type: a number from `low` to `high`, which float32 still holds by default."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float('nan')
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text!r} is not a number from {low:g} to {high:g}')
        return value
    return parse


def folder(text):
    """argparse type: a folder to write into, there already or to be made."""
    path, whole_path = Path(text), Path(os.path.realpath(text))
    there = next(parent for parent in (whole_path, *whole_path.parents) if os.path.exists(parent))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f'{there} is a file; name a folder')
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f'{there} cannot be written into; name another folder')
    return path


def device(text):
    """argparse type: the torch.device of 'auto' (the fastest there is), 'cpu', 'cuda[:n]' or 'mps', if this machine has it."""
    if not re.fullmatch(r'auto|cpu|mps|cuda(:\d\d?)?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is none of auto, cpu, cuda, cuda:0, mps')
    if text == 'auto':
        text = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    way_out = 'use --device auto'
    if text == 'cuda' and 'LOCAL_RANK' in os.environ:  # torchrun: each process on this machine has a GPU of its own
        text, way_out = f'cuda:{os.environ["LOCAL_RANK"]}', 'start no more processes than it has GPUs'
    chosen = torch.device(text)
    there = {'cpu': True, 'mps': torch.backends.mps.is_available(), 'cuda': (chosen.index or 0) < torch.cuda.device_count()}
    if not there[chosen.type]:
        raise argparse.ArgumentTypeError(f'{text!r} is not on this machine; {way_out}')
    if chosen.index is not None:
        torch.cuda.set_device(chosen)  # streams, graphs and messages between processes go by the current device
    return chosen


def choose_precision(text, device):
    """bf16 pays where there is hardware for it: NVIDIA from Ampere on, processors with AVX512-BF16."""
    if text != 'auto':
        return text
    if device.type == 'cuda':
        return 'bf16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'fp32'
    return 'bf16' if device.type == 'cpu' and torch.cpu.get_capabilities().get('avx512_bf16') else 'fp32'


# --- several processes: torchrun --nproc-per-node N train.py ----------------------------------------------------------
# Each has a share of every batch and chains of its own. Gradients are averaged, so the weights are the same everywhere. A
# process that is alone is rank 0 of 1.

def join_ranks(device):
    """Get in touch with the other processes that torchrun started, if it did: through NCCL between GPUs, gloo between CPUs,
    which is what `gather` and `anywhere` use in any case."""
    if 'LOCAL_RANK' in os.environ:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')


def leave_ranks():
    """Wait for the others, which may still be talking to this process, before it ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0  # only 0 writes


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors):
    """Replace tensors by their means over all processes, in one message.

    DistributedDataParallel is made for this, but not for losses that hold an autograd.grad, as `matching_step` does: its
    documentation rules them out, and gradients came out wrong (PyTorch issue 47562).
    """
    if dist.is_initialized():
        vector = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(vector)
        for tensor, mean in zip(tensors, vector.div(ranks()).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def gather(value):
    """The values of all processes, a list on rank 0."""
    values = [value] * ranks()
    if dist.is_initialized():
        dist.gather_object(value, values if rank() == 0 else None)
    return values


def anywhere(flag):
    """Whether a flag is set in any process: all must stop after the same update."""
    if dist.is_initialized():
        flag = torch.tensor(float(flag))
        dist.all_reduce(flag)
    return bool(flag)


class StopSignal:
    """Ctrl-C, SIGTERM and a terminal that is closed (but for `nohup`) let the update in progress finish, so that what is saved
    is whole; a second one ends at once."""

    def __enter__(self):
        self.status, self.before = 0, {}
        hangup = getattr(signal, 'SIGHUP', signal.SIGTERM)  # Windows has none
        for number in {signal.SIGINT, signal.SIGTERM, hangup}:
            if number == hangup and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.status = 128 + number
        if ranks() == 1:  # torchrun passes on what the terminal has sent already
            self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def asked(self):
        return self.status != 0


# --- checkpoints ------------------------------------------------------------------------------------------------------

def save_checkpoint(file, model, **facts):
    """Write a checkpoint to an open binary file: the weights, what rebuilds the network, and `facts` (plain values)."""
    buffer = io.BytesIO()  # a disk that is full, or Ctrl-C, would be an obscure RuntimeError in the middle of torch.save
    torch.save({'format': FORMAT, 'settings': model.settings, 'weights': model.state_dict(), **facts}, buffer)
    file.write(buffer.getbuffer())


def read_checkpoint(path):
    """The checkpoint's dictionary, on the CPU. Only tensors and plain values are read; no file can run code here.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of this project.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickles by other programs, which are refused anyway
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes make it raise
        reason = 'no such file' if not os.path.exists(path) else 'it cannot be read as one'
        raise CheckpointError(f'{path}: not a checkpoint: {reason}; train one with python train.py') from error
    ours = isinstance(checkpoint, dict) and {'format', 'settings', 'weights'} <= checkpoint.keys()
    if not ours or checkpoint['format'] != FORMAT:
        raise CheckpointError(f'{path}: written by another program or version; train one with python train.py')
    return checkpoint


def load_model(path, device, precision):
    """Rebuild the network of a checkpoint in evaluation mode; returns it and the checkpoint's dictionary."""
    checkpoint = read_checkpoint(path)
    try:
        model = EnergyModel(**checkpoint['settings'], precision=precision)
        model.load_state_dict(checkpoint['weights'])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path}: its weights do not fit its settings; the file is damaged, train anew') from error
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise CheckpointError(f'{path}: its weights are not finite; the training diverged, train anew with a lower --lr')
    return model.to(device).eval().requires_grad_(False), checkpoint
