"""What a GPU changes: a chain replayed as a CUDA graph, and updates for which the CPU never waits.

Without a GPU the graph is one on paper; the tests that need a real one are skipped.
"""
import contextlib
from functools import partial
from types import SimpleNamespace

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
from model import EnergyModel
from sampler import CudaGraph, Reservoir, sgld

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


# --- a CUDA graph on paper ------------------------------------------------------------------------

class PaperGraph:
    """What a CUDA graph is, on the CPU: kernels, and the memory that they read and write."""

    def __init__(self):
        self.calls = []

    def register_generator_state(self, generator):
        pass

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tree_leaves(function(*args, **kwargs)), strict=True):
                if torch.is_tensor(new):
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Writes into a PaperGraph what is called. Like a GPU's, a recording draws no random numbers.
    If it fails, torch leaves the stream of the recording the current one."""

    fails = False

    def __init__(self, graph):
        super().__init__()
        self.graph, self.generator = graph, None

    def __enter__(self):
        PaperStream.current = 'recording'
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.generator.set_state(self.state)
        if self.fails:
            PaperGenerator.usable = False
            raise RuntimeError('operation not permitted when stream is capturing\nand more lines')
        PaperStream.current = 'default'

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves([args, kwargs]):
            if isinstance(value, torch.Generator) and self.generator is None:
                self.generator, self.state = value, value.get_state()
        result = function(*args, **kwargs or {})
        self.graph.calls.append((function, args, kwargs or {}, tree_leaves(result)))
        return result


class PaperStream(contextlib.nullcontext):
    """The current stream; `with torch.cuda.stream(s)` puts back the one that was current."""

    current = 'default'

    def __init__(self, name='side'):
        self.name = getattr(name, 'name', name)

    def wait_stream(self, other):
        pass

    def __enter__(self):
        self.before, PaperStream.current = PaperStream.current, self.name

    def __exit__(self, *error):
        PaperStream.current = self.before


class PaperGenerator(torch.Generator):
    """After a failed recording, a GPU's generator may be unusable (before torch 2.14) until
    `graphsafe_set_state` gives it another state."""

    usable = True

    def graphsafe_set_state(self, other):
        PaperGenerator.usable = True
        self.set_state(other.get_state())


@pytest.fixture
def paper(monkeypatch):
    """A CPU with CUDA graphs."""
    monkeypatch.setattr(PaperGenerator, 'usable', True)
    monkeypatch.setattr(PaperStream, 'current', 'default')
    monkeypatch.setattr(CudaGraph, 'failed', False)
    for name, value in {'CUDAGraph': PaperGraph, 'graph': Recording, 'Stream': PaperStream,
                        'current_stream': lambda: PaperStream(PaperStream.current),
                        'stream': PaperStream}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def draw_three_times(record, precision):
    """Chains of three calls (3, B, C, H, W), and the next random number. Labels, starts and, in
    place, the weights change from call to call."""
    torch.manual_seed(0)
    model, generator = EnergyModel(3, 1, 4, precision=precision), PaperGenerator().manual_seed(1)

    def sample(start, y):
        return sgld(partial(model.energy, y=y), start, 3, 50., .02, generator=generator)

    sample = record(sample, generator)
    chains = []
    for _ in range(3):
        chains.append(sample(torch.rand(6, 1, 16, 16), torch.randint(3, (6,))))
        with torch.no_grad():
            for weight in model.parameters():
                weight += .1 * torch.randn_like(weight)
    return torch.stack(chains), torch.rand(1, generator=generator)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_replayed_chains_are_the_plain_ones(paper, precision):
    """A graph gives the bits of the function that it was recorded from, and keeps what it gave."""
    chains, after = draw_three_times(CudaGraph, precision)
    expected, after_plain = draw_three_times(lambda function, _: function, precision)
    assert torch.equal(chains, expected) and torch.equal(after, after_plain)


def test_a_chain_that_cannot_be_recorded_is_drawn_plainly(paper, monkeypatch, capsys):
    """A failed recording costs one line: chains, random numbers and stream are as without one."""
    monkeypatch.setattr(Recording, 'fails', True)
    chains, after = draw_three_times(CudaGraph, 'fp32')
    line = capsys.readouterr().out
    assert line.count('\n') == 1 and 'no CUDA graph' in line and 'stream is capturing' in line
    expected, after_plain = draw_three_times(lambda function, _: function, 'fp32')
    assert torch.equal(chains, expected) and torch.equal(after, after_plain)
    assert PaperGenerator.usable and PaperStream.current == 'default'


def test_a_failed_recording_ends_the_replays_of_others(paper, monkeypatch, capsys):
    """All graphs draw from one generator, which gets another state when a recording fails."""
    def noise(x):
        return x + torch.randn(x.shape, generator=generator)

    x, generator = torch.zeros(3), PaperGenerator().manual_seed(1)
    first, second = CudaGraph(noise, generator), CudaGraph(noise, generator)
    drawn = [first(x), first(x)]
    with monkeypatch.context() as broken:
        broken.setattr(Recording, 'fails', True)
        drawn.append(second(x))
    calls = []
    monkeypatch.setattr(PaperGraph, 'replay', lambda graph: calls.append(graph))
    drawn += [first(x), second(x)]
    assert not calls and capsys.readouterr().out.count('no CUDA graph') == 1
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(torch.stack(drawn), torch.stack([noise(x) for _ in range(5)]))


# --- processes and waiting ------------------------------------------------------------------------

@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_processes_talk_through_gloo_beside_nccl(monkeypatch, device):
    """Tensors of the CPU travel through gloo on every machine, those of a GPU through NCCL."""
    said = []

    def stop(backend):
        said.append(backend)
        raise SystemExit

    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(dist, 'init_process_group', stop)
    monkeypatch.setattr(train, 'choose_device', torch.device)
    monkeypatch.setattr(torch.cuda, 'set_device', said.append)
    monkeypatch.setattr(train, 'parse_args', lambda _: SimpleNamespace(device=torch.device(device)))
    with pytest.raises(SystemExit):
        train.main()
    backends = dist.distributed_c10d.BackendConfig(said.pop()).get_device_backend_map()
    assert backends['cpu'] == 'gloo'
    assert backends['cuda'] == ('nccl' if device == 'cuda' else 'gloo')
    assert said == ([torch.device('cuda:0')] if device == 'cuda' else [])


@pytest.mark.parametrize('device, local_rank, used', [
    ('cuda', None, 'cuda:0'), ('cuda:1', None, 'cuda:1'), ('cuda', '2', 'cuda:2')])
def test_the_gpu_that_is_chosen_becomes_the_current_one(monkeypatch, device, local_rank, used):
    """CUDA graphs are recorded on the current GPU; that of chains on another would be empty."""
    current = []

    def stop(*_, **__):
        raise SystemExit

    if local_rank:
        monkeypatch.setenv('LOCAL_RANK', local_rank)
    monkeypatch.setattr(dist, 'init_process_group', lambda _: None)
    monkeypatch.setattr(train, 'load_data', stop)
    monkeypatch.setattr(train, 'choose_device', torch.device)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    args = SimpleNamespace(device=torch.device(device), data='', image_size=16, data_root='',
                           seed=0, resume=None)
    monkeypatch.setattr(train, 'parse_args', lambda _: args)
    with pytest.raises(SystemExit):
        train.main()
    assert [*map(str, current), str(args.device)] == [used, used]


class NothingIsBrought(TorchDispatchMode):
    """Fails where a tensor on the CPU is made into one on the device: the CPU waits for a copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = [x for x in tree_leaves([args, kwargs]) if torch.is_tensor(x)]
        made = [x for x in tree_leaves(result) if torch.is_tensor(x)]
        assert not (any(x.is_cpu for x in given) and any(x.is_meta for x in made)), function
        return result


class Finished(Exception):
    pass


def update_six_times(monkeypatch, tmp_path, watch, device, *flags):
    """Six updates on 48 bars; the last three run while `watch`, a context manager, is open."""
    images, labels = bars(48, 0)
    images = torch.from_numpy(images).clamp(0, 255).byte()[:, None, :16, :16]  # (48, 1, 16, 16)
    split = Split(images, torch.from_numpy(labels))

    def batches(count, args, epoch):
        index = torch.arange(16, device=device)
        for _ in range(3):  # these set up libraries, and record the graphs of both kinds of chains
            yield index
        for _ in range(3):
            with watch():
                yield index
        raise Finished

    monkeypatch.setattr(train, 'batches', batches)
    args = train.parse_args([*QUICK, '--out', str(tmp_path), *flags])
    args.device = torch.device(device)
    with pytest.raises(Finished):
        train.train(args, Data(split, split, split, ['stand', 'lie', 'lean']))


@pytest.mark.parametrize('flags', [[], ['--no-conditional', '--init', 'data']])
def test_updates_do_not_wait(monkeypatch, tmp_path, flags):
    """Updates work on the device `meta`, whose tensors have no values: nothing is read back from
    the device, and nothing is brought there."""
    generator, adam, exponential = torch.Generator, torch.optim.Adam, torch.Tensor.exponential_
    for owner, name, stand_in in [  # what `meta` does not know
            (torch, 'Generator', lambda device: generator()),
            (torch, 'autocast', lambda *_, **__: contextlib.nullcontext()),
            (torch.optim, 'Adam', lambda *args, fused, **settings: adam(*args, **settings)),
            (torch.Tensor, 'exponential_', lambda x, generator: exponential(x)),
            (train, 'make_reservoir', lambda *_: Reservoir([16] * 3, (1, 16, 16), device='meta')),
            (train, 'save_run', lambda *_: None)]:
        monkeypatch.setattr(owner, name, stand_in)
    update_six_times(monkeypatch, tmp_path, NothingIsBrought, 'meta', *flags)


# --- on a real GPU --------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize('record', [CudaGraph, lambda function, _: function])
def test_updates_do_not_wait_for_a_gpu(monkeypatch, tmp_path, record):
    """No call in an update, after the first three, makes the CPU wait."""
    @contextlib.contextmanager
    def watch():
        torch.cuda.set_sync_debug_mode('error')
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode('default')

    monkeypatch.setattr(train, 'CudaGraph', record)
    update_six_times(monkeypatch, tmp_path, watch, 'cuda')


@on_gpu
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_graph_is_the_plain_chain_on_a_gpu(monkeypatch, glyphs, tmp_path, precision):
    """Runs with and without the graph differ by rounding only, and draw equally many numbers."""
    runs = []
    for name, record in [('graph', CudaGraph), ('plain', lambda function, _: function)]:
        monkeypatch.setattr(train, 'CudaGraph', record)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            train.main(['--data', str(glyphs), *QUICK, '--device', 'cuda', '--precision', precision,
                        '--epochs', '1', '--out', str(tmp_path / name)])
        saved = torch.load(tmp_path / name / 'last.pt', weights_only=True)
        runs.append(saved['run']['ranks'][0])
    chains, expected = (run['reservoir']['chains'] for run in runs)
    torch.testing.assert_close(chains, expected, rtol=.02, atol=.02)
    assert torch.equal(runs[0]['generator'], runs[1]['generator'])


@on_gpu
def test_plain_chains_after_a_failed_recording_on_a_gpu(monkeypatch, capsys):
    """A function that reads from the GPU cannot be recorded; it is called as it is."""
    def noise(x, generator):
        return x + torch.randn(x.shape, generator=generator, device='cuda') * x.sum().item()

    monkeypatch.setattr(CudaGraph, 'failed', False)
    x, generator = torch.ones(3, device='cuda'), torch.Generator('cuda').manual_seed(1)
    graph = CudaGraph(partial(noise, generator=generator), generator)
    drawn = [graph(x).tolist(), graph(x).tolist()]
    assert capsys.readouterr().out.count('no CUDA graph') == 1
    generator = torch.Generator('cuda').manual_seed(1)
    assert drawn == [noise(x, generator).tolist(), noise(x, generator).tolist()]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@on_gpu
def test_all_scripts_on_a_gpu(glyphs, tmp_path):
    """Train, resume, draw and judge on a GPU; the CPU goes on with a run that a GPU began."""
    out = ['--out', str(tmp_path)]
    train.main(['--data', str(glyphs), *out, *QUICK, '--device', 'cuda'])
    train.main(['--resume', *out, '--epochs', '3', '--device', 'cuda'])
    train.main(['--resume', *out, '--epochs', '4', '--device', 'cpu'])
    for script in (generate, ood):
        script.main(['--ckpt', str(tmp_path / 'best.pt'), '--device', 'cuda', *out])
    assert (tmp_path / 'samples.png').exists() and (tmp_path / 'ood.csv').exists()
