"""Laws of what differs on a GPU: a chain recorded as a CUDA graph, and updates that never wait for the CPU. Without a GPU the
graph is one on paper; what needs a real one is skipped."""
import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import ood
import train
from conftest import QUICK, bars
from data import Data, Split
from model import join_ranks
from sampler import Recorded

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


class PaperGraph:
    """What a CUDA graph is, on the CPU: calls of kernels, with the tensors that they read and write."""

    def __init__(self):
        self.calls = []

    def register_generator_state(self, generator):
        self.generator = generator

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(new):
                    old.copy_(new)


class Paper(TorchDispatchMode):
    """Writes into a PaperGraph what is called. Recording draws no random numbers on a GPU, so none are spent here."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __enter__(self):
        self.state = self.graph.generator.get_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.graph.generator.set_state(self.state)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.graph.calls.append((function, args, kwargs or {}, tree_leaves(result)))
        return result


class PaperStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def paper(monkeypatch):
    """A CPU with CUDA graphs."""
    made = {'CUDAGraph': PaperGraph, 'graph': Paper, 'Stream': PaperStream, 'current_stream': PaperStream,
            'stream': contextlib.nullcontext}
    for name, value in made.items():
        monkeypatch.setattr(torch.cuda, name, value)


def start_run(*flags):
    """A run on 48 bars that has not done anything yet."""
    images, labels = bars(48, 0)
    images = torch.from_numpy(images).clamp(0, 255).byte()[:, None, :16, :16]  # (48, 1, 16, 16)
    split = Split(images, torch.from_numpy(labels))
    args = train.parse_args([*QUICK, *flags])
    return train.Run(args, Data(split, split, split, ['stand', 'lie', 'lean'])), split.to(args.device)


def update_three_times(run, split):
    """Three updates with other images, labels and weights each; returns their numbers (3, L) and the chains."""
    numbers = [train.update(run, *split.batch(torch.arange(i, i + 16, device=run.args.device))) for i in (0, 16, 32)]
    return torch.stack(numbers), run.reservoir.chains


@pytest.mark.parametrize('flags', [[], ['--no-conditional', '--init', 'data'], ['--precision', 'bf16']])
def test_recorded_chain_is_the_plain_one(paper, flags):
    """With a graph, updates give the bits that they give without: labels, weights and noise are those of each call."""
    plain = update_three_times(*start_run(*flags))
    run, split = start_run(*flags)
    run.recorded = Recorded(run.walk, run.generator)
    for recorded, expected in zip(update_three_times(run, split), plain):
        assert torch.equal(recorded, expected)
    first = run.recorded(*split.batch(torch.arange(16)))
    kept = first.clone()
    assert not torch.equal(run.recorded(*split.batch(torch.arange(16))), kept) and torch.equal(first, kept)


def test_a_chain_that_cannot_be_recorded_is_told(paper, monkeypatch, refused):
    """The message names the way out; being out of memory is another mistake."""
    def fail(graph):
        raise RuntimeError('operation not permitted when stream is capturing\nCUDA kernel errors might be ...')
    monkeypatch.setattr(torch.cuda, 'graph', fail)
    run, split = start_run()
    run.recorded = Recorded(run.walk, run.generator)
    message = refused(lambda argv: update_three_times(run, split))
    assert 'when stream is capturing; leave the CUDA graph out with --no-graph' in message


def test_processes_talk_through_gloo_beside_nccl(monkeypatch):
    """Numbers of the CPU travel between processes of any kind, those of a GPU through NCCL."""
    said = []
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(dist, 'init_process_group', said.append)
    for device in ('cuda', 'cpu'):
        join_ranks(torch.device(device))
    gpu, cpu = (dist.distributed_c10d.BackendConfig(backend).get_device_backend_map() for backend in said)
    assert (gpu['cpu'], gpu['cuda'], cpu['cpu']) == ('gloo', 'nccl', 'gloo')


class NothingIsBrought(TorchDispatchMode):
    """Fails where a tensor on the CPU is made into one on the device: a copy for which the CPU waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given, made = ([x for x in tree_leaves(tree) if torch.is_tensor(x)] for tree in ([args, kwargs], result))
        assert not (any(x.is_cpu for x in given) and any(x.is_meta for x in made)), function
        return result


@pytest.mark.parametrize('flags', [[], ['--no-conditional', '--init', 'data']])
def test_updates_do_not_wait(monkeypatch, flags):
    """An update works on the device `meta`, whose tensors have no values: it reads no number back, and brings none along."""
    generator, adam, exponential = torch.Generator, torch.optim.Adam, torch.Tensor.exponential_
    monkeypatch.setattr(torch, 'Generator', lambda device: generator())  # what `meta` does not know
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, 'Adam', lambda *args, fused, **settings: adam(*args, **settings))
    monkeypatch.setattr(torch.Tensor, 'exponential_', lambda x, generator: exponential(x))
    monkeypatch.setattr('model.device', lambda text: torch.device('meta'))
    run, split = start_run(*flags, '--no-graph')
    with NothingIsBrought():
        numbers, chains = update_three_times(run, split)
    assert numbers.is_meta and chains.is_meta


@on_gpu
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_graph_is_the_plain_chain_on_a_gpu(precision):
    """The same numbers with and without the graph, as far as a GPU adds up in the same order; so the same law."""
    flags = ['--device', 'cuda', '--precision', precision]
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        recorded, plain = update_three_times(*start_run(*flags)), update_three_times(*start_run(*flags, '--no-graph'))
    smooth = [i for i, name in enumerate(train.AVERAGES) if name != 'train_accuracy']  # which jumps by 1/16
    torch.testing.assert_close(recorded[0][:, smooth], plain[0][:, smooth], rtol=.02, atol=.02)
    torch.testing.assert_close(recorded[1], plain[1], rtol=.02, atol=.02)


@on_gpu
@pytest.mark.parametrize('flags', [[], ['--no-graph']])
def test_updates_do_not_wait_for_a_gpu(flags):
    """No call in an update, after the first, makes the CPU wait."""
    run, split = start_run('--device', 'cuda', *flags)
    update_three_times(run, split)
    batch = split.batch(torch.arange(16, device='cuda'))
    torch.cuda.set_sync_debug_mode('error')
    try:
        train.update(run, *batch)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@on_gpu
def test_all_scripts_on_a_gpu(glyphs, tmp_path):
    """Train, resume, draw and judge on a GPU; a run begun there goes on with the CPU."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--device', 'cuda'])
    train.main(['--out', str(tmp_path), '--resume', '--epochs', '3', '--device', 'cuda'])
    train.main(['--out', str(tmp_path), '--resume', '--epochs', '4', '--device', 'cpu'])
    for script in (generate, ood):
        script.main(['--ckpt', str(tmp_path / 'best.pt'), '--device', 'cuda', '--out', str(tmp_path)])
    assert (tmp_path / 'samples.png').exists() and (tmp_path / 'ood.csv').exists()
