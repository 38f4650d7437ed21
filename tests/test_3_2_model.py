"""Course task 3.2, the energy-based model: what holds in model.py, in the order of building.

First the energies of the logits, then the network and its first convolution. After them comes what
all scripts share: checkpoints, flags, devices and the way in which mistakes are told.
"""
import argparse
import io
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hints import assert_close
from torch import nn

from model import (CheckpointError, CommandLine, EnergyModel, FirstConv2d, choose_device,
                   has_bf16, load_model, number, save_checkpoint, user_mistakes)

K = 5  # classes; no test has as many images, so an exchange of the two dimensions is seen


@pytest.fixture
def model():
    return make_model()


def make_model(temperature=1.):
    torch.manual_seed(0)
    return EnergyModel(K, channels=1, width=4, temperature=temperature)


def images(count, channels=1, height=20, width=20):
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.rand(count, channels, height, width, generator=generator) - 1


# --- energies of logits ---------------------------------------------------------------------------

@pytest.mark.parametrize('t', [1., .1, 1e-4])
def test_marginal_energy_by_hand(t):
    """Two images of three classes, with logits that T tells apart or not: E(x) is -m - T log sum_y
    exp((f - m) / T) with the greatest logit m, so that no term overflows."""
    def soft_maximum(f, t):
        return max(f) + t * math.log(sum(math.exp((value - max(f)) / t) for value in f))

    logits = [[.3, .3 - 1e-4, -.2], [.5, .4, 0.]]  # (2, 3)
    wanted = [-soft_maximum(f, t) for f in logits]
    found = EnergyModel(3, width=4, temperature=t).energy_of_logits(torch.tensor(logits))
    assert found.shape == (2,), (
        f'shape {tuple(found.shape)}: one energy an image; the sum goes over the classes, dim=1, '
        'not over the batch')
    assert_close(found, wanted, 'E(x) is -T logsumexp_y(f(x)[y] / T)', {
        'is the sign wrong? What is likely has a low energy': [-e for e in wanted],
        'is T missing inside of the logsumexp?': [-t * soft_maximum(f, 1.) for f in logits],
        'is T missing outside of the logsumexp?': [-soft_maximum(f, t) / t for f in logits],
        'is it the max? That is E(x) for T -> 0 only': [-max(f) for f in logits],
        'is it the mean of the logits?': [-sum(f) / 3 for f in logits],
        'is it the sum of the logits, without exp and log?': [-sum(f) for f in logits],
    }, rtol=0, atol=1e-6)


def test_joint_energy_by_hand():
    """E(x, y) = -f(x)[y], one for each image: that of its own label."""
    logits = torch.tensor([[3., 5., 7.], [-1., 2., 4.]])  # (2, 3)
    found = EnergyModel(3, width=4).energy_of_logits(logits, torch.tensor([2, 0]))
    assert_close(found, [-7., 1.], 'E(x, y) is one energy an image, that of its own label', {
        'is the sign wrong? A high logit is a low energy': [7., -1.],
        'are the labels ignored?': -logits.logsumexp(1)})


def test_logits_are_not_normalised():
    """A bias of class 2 raises the logit of class 2 by as much, and no other one. After a softmax,
    E(x) would be the same for all images, and p(x) would learn nothing."""
    model, x = make_model(), images(3)
    before = model.get_logits(x)
    model.head.bias.data[2] += 3.
    raised = (model.get_logits(x) - before).detach()
    assert_close(raised, torch.tensor([0., 0., 3., 0., 0.]).expand(3, K),
                 'is there a softmax in the logits? They are what the last layer gives', atol=1e-4,
                 rtol=0)


def test_energy_hands_on_the_labels(model):
    """energy(x, y) is that of the logits of x for y."""
    x, y = images(3), torch.tensor([0, 4, 2])
    wanted = model.energy_of_logits(model.get_logits(x), y)
    assert_close(model.energy(x, y), wanted, 'energy(x, y) must hand on the labels', {
        'energy(x, y) is E(x): it must hand on the labels': model.energy(x)})


@pytest.mark.parametrize('t', [1., .1])
def test_marginal_energy_sums_the_joint_ones(t):
    """exp(-E(x) / T) = sum_y exp(-E(x, y) / T)."""
    model, x = make_model(t), images(7)
    joint = torch.stack([model.energy(x, y) for y in range(K)], dim=1)  # (7, K)
    marginal = model.energy(x)
    assert marginal.shape == (7,), 'one energy an image: logsumexp goes over the classes, dim=1'
    assert_close((-marginal / t).exp(), (-joint / t).exp().sum(1), 'E(x) is -T logsumexp_y of '
                 '-E(x, y) / T: not sum, mean or max; both energies are minus a logit')


def test_cold_marginal_energy_is_the_least_joint_one():
    """As T -> 0, E(x) = min_y E(x, y), with finite gradients."""
    logits = torch.randn(50, K, generator=torch.Generator().manual_seed(0)).requires_grad_()
    energy = EnergyModel(K, width=4, temperature=1e-9).energy_of_logits(logits)  # (50,)
    assert_close(energy, -logits.amax(1), 'min_y E(x, y) = -max_y f(x)[y]')
    energy.sum().backward()
    assert_close(logits.grad, -F.one_hot(logits.argmax(1), K).float(), 'dE/df is -1 at the maximum')


@pytest.mark.parametrize('t', [1., .1])
def test_classifier_is_the_ratio_of_joint_to_marginal(t):
    """p(y|x) = p(x, y) / p(x) = exp(-E(x, y) / T) / exp(-E(x) / T): Z cancels."""
    model, x, y = make_model(t), images(7), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    ratio = ((model.energy(x) - model.energy(x, y)) / t).exp()
    softmax = (model.get_logits(x) / t).softmax(dim=1)[torch.arange(7), y]
    assert_close(ratio, softmax, 'if the ratio is the inverse of the softmax, a sign is wrong')


def test_forward_is_minus_the_energy(model):
    """f = -E: model(x) = -E(x) and model(x, y) = -E(x, y) = f(x)[y]. Low energy = likely."""
    x, y = images(3), torch.tensor([0, 4, 2])
    assert torch.equal(model(x), -model.energy(x)), 'forward is +f(x), energy is -f(x)'
    assert torch.equal(model(x, y), -model.energy(x, y)), 'forward must hand on the labels'
    assert torch.equal(model(x, y), model.get_logits(x)[torch.arange(3), y]), 'f(x)[y] is a logit'


def test_one_logit_is_a_plain_ebm():
    """With K = 1 the energy is minus the only logit."""
    model = EnergyModel(num_classes=1, width=4)
    logits = model.get_logits(images(3))
    assert logits.shape == (3, 1)
    assert_close(model.energy(images(3)), -logits[:, 0], 'logsumexp of one number is that number')


@pytest.mark.parametrize('y', [2, [2], [2, 2, 2], torch.tensor(2), torch.tensor([2]),
                               torch.full((3,), 2)], ids=str)
def test_labels_are_an_int_one_label_or_one_for_each_image(y):
    """A single label is meant for all images."""
    logits = torch.randn(3, K)
    for t in (1., .1):  # T has no say in E(x, y)
        found = EnergyModel(K, width=4, temperature=t).energy_of_logits(logits, y)
        assert torch.equal(found, -logits[:, 2])


@pytest.mark.parametrize('shape', [(0,), (2,), (4,), (3, 1), (1, 1), (1, 3)], ids=str)
def test_labels_of_another_shape_are_an_error(shape):
    """Else broadcasting or gather would give too few energies, and some chains would not move."""
    with pytest.raises(ValueError, match='one label or 3'):
        EnergyModel(K, width=4).energy_of_logits(torch.randn(3, K), torch.zeros(shape).long())


@pytest.mark.parametrize('y', [K, -1, [0, 1, K], [.5]], ids=str)
def test_labels_out_of_range_are_an_error(y):
    """The message names the range."""
    with pytest.raises(ValueError, match=f'0 to {K - 1}'):
        EnergyModel(K, width=4).energy_of_logits(torch.randn(3, K), y)


# --- the network ----------------------------------------------------------------------------------

@pytest.mark.parametrize('height, width', [(1, 1), (7, 12), (28, 28), (33, 20), (56, 56)])
@pytest.mark.parametrize('channels', [1, 3])
def test_any_size_and_channels(channels, height, width):
    """(B, C, H, W) -> (B, K) float32 logits for images of any size."""
    logits = EnergyModel(K, channels, width=4).get_logits(images(2, channels, height, width))
    assert logits.shape == (2, K) and logits.dtype == torch.float32


def test_images_of_integers_are_an_error(model):
    """Pixels 0 to 255 are not [-1, 1]: the message names the function that maps them."""
    with pytest.raises(TypeError, match='to_float'):
        model.energy(torch.zeros(2, 1, 20, 20, dtype=torch.uint8))


def test_course_network_costs_what_the_course_says():
    """Convolutions cost about 12.5 million multiply-adds for one 56x56 image."""
    model, counts = EnergyModel(42), []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, _, output: counts.append(output.numel() * layer.weight[0].numel()))
    model(images(1, 1, 56, 56))
    assert 12.3e6 < sum(counts) < 12.8e6, f'layer by layer: {counts}; check stride and padding'


def test_images_do_not_mix(model):
    """The energy of an image is the same alone and in a batch, also while the model trains."""
    assert model.training
    assert_close(model.energy(images(6))[2:3], model.energy(images(6)[2:3]),
                 'is there a batch normalisation, or a mean over dim 0?')


@pytest.mark.parametrize('num_classes, t', [(1, 1.), (42, 1.), (42, 1e-4)])
def test_fresh_energies_are_near_zero(num_classes, t):
    """The L2 term of the loss pulls energies to 0, so that is where they start."""
    torch.manual_seed(0)
    energy = EnergyModel(num_classes, temperature=t).energy(images(8)).mean().item()
    assert abs(energy) < .1, (
        f'{energy:.2f}: T logsumexp of K zeros is T log K; the bias takes it away')


def test_energy_is_smooth():
    """dE/dx changes with x. With ReLU it is piecewise constant and jumps under the chains."""
    model, x = EnergyModel(num_classes=1, width=4), images(2).requires_grad_()
    gradient, = torch.autograd.grad(model.energy(x).sum(), x, create_graph=True, allow_unused=True)
    assert gradient is not None, (
        'no dE/dx reaches the images, and chains need it: is the input detached, or under no_grad?')
    curvature, = torch.autograd.grad(gradient.square().sum(), x, materialize_grads=True)
    assert curvature.abs().max() > 0, 'second derivatives are 0: use Swish (nn.SiLU)'
    kinds = [type(layer) for layer in model.features.modules()]
    assert kinds.count(nn.SiLU) == sum(issubclass(kind, nn.Conv2d) for kind in kinds), (
        'Swish (nn.SiLU) after each convolution, also after the last')
    assert nn.AdaptiveAvgPool2d in kinds, 'the pool takes the average, not the maximum'


@pytest.mark.parametrize('channels, height, width', [(1, 16, 17), (3, 17, 16), (3, 28, 28),
                                                     (1, 75, 56), (2, 1, 3)])
def test_first_layer_is_a_5x5_convolution(channels, height, width):
    """Its values, and the gradients of x, weight and bias, are those of conv2d with stride 2 and
    padding 4, for even and odd sizes. It refuses another stride, which it would ignore."""
    with pytest.raises(AssertionError):
        FirstConv2d(channels, 4, 5, stride=1, padding=4)(torch.zeros(1, channels, height, width))
    torch.manual_seed(0)
    layer = FirstConv2d(channels, 4, 5, stride=2, padding=4).double()
    x = torch.randn(2, channels, height, width, dtype=torch.double, requires_grad=True)
    plain = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=4)
    blocks = layer(x)
    assert_close(blocks, plain, 'values')
    inputs = {'x': x, 'weight': layer.weight, 'bias': layer.bias}
    for name, tensor in inputs.items():
        expected, = torch.autograd.grad(plain.sin().sum(), tensor, retain_graph=True)
        seen, = torch.autograd.grad(blocks.sin().sum(), tensor, retain_graph=True)
        assert_close(seen, expected, f'gradient of {name}')


def test_bf16_energies_are_float32_and_near(model):
    """bfloat16 convolutions change energies by rounding only, and leave them float32."""
    exact = model.energy(images(64))
    wanted = model.energy_of_logits(model.head(model.features(images(64))))
    assert_close(exact, wanted, 'precision fp32: no autocast', rtol=0, atol=0)
    model.precision = 'bf16'
    rounded = model.energy(images(64))
    assert rounded.dtype == torch.float32, 'the head must compute in float32, outside of autocast'
    difference = (rounded - exact).abs().max().item()
    assert difference > 0, 'nothing was rounded: precision is not used'
    assert difference < .02


def test_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match="'bf61': choose fp32 or bf16"):
        EnergyModel(precision='bf61')


def test_weights_and_energies_are_float32_whatever_the_default():
    """A notebook may have set another default dtype, or have its images in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        model = EnergyModel(K, width=4)
    finally:
        torch.set_default_dtype(torch.float32)
    energies = [model.energy(images(2).to(dtype)) for dtype in (torch.float32, torch.float64)]
    assert energies[0].dtype == torch.float32 and torch.equal(*energies)


# --- checkpoints ----------------------------------------------------------------------------------

DATA = {'image_shape': [1, 20, 20], 'class_names': list('abcde'),
        'class_counts': {'train': [9] * K, 'val': [3] * K, 'test': [3] * K}}


@pytest.fixture
def path(model, tmp_path):
    """The checkpoint of `model`."""
    return save(model, tmp_path / 'a.pt')


def save(model, path):
    with open(path, 'wb') as file:
        save_checkpoint(file, model, args={'seed': 3}, data=DATA, sampler={'steps': 60}, epoch=7,
                        run={'step': torch.tensor(8)})
    return path


def test_checkpoint_round_trip(model, path):
    """What is loaded is frozen and computes the same energies; nothing has to be asked again."""
    loaded, checkpoint = load_model(path, precision='bf16')
    assert loaded.precision == 'bf16' and load_model(path)[0].precision == 'fp32'
    assert not loaded.training, 'a model that is loaded is there to be used: eval()'
    assert not any(p.requires_grad for p in loaded.parameters()), (
        'chains would fill the gradients of weights that nobody trains: requires_grad is on')
    loaded.precision = 'fp32'
    assert torch.equal(loaded.energy(images(3)), model.energy(images(3)))
    kept = {key: checkpoint[key] for key in ('class_names', 'args', 'data', 'sampler', 'epoch')}
    assert kept == {'class_names': list('abcde'), 'args': {'seed': 3}, 'data': DATA,
                    'sampler': {'steps': 60}, 'epoch': 7}
    assert checkpoint['run']['step'] == 8


def test_plain_ebm_has_no_class_names(tmp_path):
    """Its data have classes, but it knows none of them. It also has other settings."""
    path = save(EnergyModel(1, channels=3, width=8, temperature=.5), tmp_path / 'a.pt')
    model, checkpoint = load_model(path)
    assert checkpoint['class_names'] == []
    assert model.settings == {'num_classes': 1, 'channels': 3, 'width': 8, 'temperature': .5}
    assert model.temperature == .5


def test_load_model_needs_nothing_else(model, path):
    """`from model import load_model` works in a plain interpreter, as in a notebook."""
    code = ('import sys; from model import load_model; model, checkpoint = load_model(sys.argv[1]);'
            'import torch; print(model.energy(torch.zeros(1, 1, 20, 20)).item());'
            'print(*{"train", "data", "matplotlib.pyplot", "torchvision"} & set(sys.modules))')
    folder = Path(sys.modules['model'].__file__).parent
    run = subprocess.run([sys.executable, '-c', code, path], cwd=folder, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    energy, imported = run.stdout.splitlines()
    assert float(energy) == pytest.approx(model.energy(torch.zeros(1, 1, 20, 20)).item(), abs=1e-5)
    assert imported == '', f'model.py needs no {imported}'


def test_no_checkpoint_runs_code(tmp_path):
    """A file that would run a command when unpickled is refused before it does."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'exploded'),)

    (tmp_path / 'bomb.pt').write_bytes(pickle.dumps({'settings': Bomb()}, protocol=2))
    torch.save({'settings': {}, 'weights': Bomb()}, tmp_path / 'zip.pt')
    for name in ('bomb.pt', 'zip.pt'):
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path / name)
    assert not (tmp_path / 'exploded').exists(), 'torch.load needs weights_only=True'


def damage(path, kind):
    if kind == 'missing':
        path.unlink()
    elif kind == 'folder':
        path.unlink()
        path.mkdir()
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'cut':
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == 'text':
        path.write_text('epoch,loss\n1,2\n')
    elif kind == 'foreign':
        torch.save({'state_dict': {}}, path)
    elif kind == 'incomplete':
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint['weights']['head.bias']
        torch.save(checkpoint, path)
    else:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint[kind]
        torch.save(checkpoint, path)


@pytest.mark.parametrize('kind', ['missing', 'folder', 'empty', 'cut', 'text', 'foreign',
                                  'incomplete', 'class_names', 'args', 'data', 'sampler'])
def test_unusable_checkpoints_are_told(path, kind):
    """The message names the file, the reason and the way out."""
    damage(path, kind)
    reason = {'missing': 'no such file', 'incomplete': 'trained with another network .* now'}.get(
        kind, 'damaged or of another program')
    with pytest.raises(CheckpointError, match=f'a.pt: {reason}; .*train.py'):
        load_model(path)


def test_weights_of_another_network_are_told(path, monkeypatch):
    """ReLU fits the weights of Swish and gives wrong energies, so the network is compared too, and
    the message says what differs."""
    monkeypatch.setattr('model.swish_cnn', lambda channels, width: nn.Sequential(
        FirstConv2d(channels, width, 5, stride=2, padding=4), nn.ReLU()))
    with pytest.raises(CheckpointError, match=r'with +\(1\): SiLU.*, while .* \(1\): ReLU.* now;'):
        load_model(path)


def test_a_full_disk_is_an_oserror(model):
    """Only an OSError is told as the user's mistake that it is; torch.save raises another kind."""
    class FullDisk(io.RawIOBase):
        room = 2000

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, 'No space left on device')
            return len(data)

    with pytest.raises(OSError, match='No space left'):
        save_checkpoint(FullDisk(), model, args={}, data=DATA, sampler={}, epoch=1)


# --- flags, devices, mistakes ---------------------------------------------------------------------

@pytest.fixture
def parser(tmp_path):
    parser = CommandLine('Draws pictures.\n\n    python script.py    # as it stands')
    parser.add_argument('--out', type=Path, default=tmp_path / 'new', help='folder of the pictures')
    parser.add_argument('--mask', help='which pixels are held')
    parser.add_argument('--quick', action='store_true', help='few steps')
    return parser


def told(capsys, call, *args):
    """The one line with which `call` exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count('\n') == 1, message
    return message


def test_numbers_have_bounds():
    """number(kind, low, high) accepts both bounds, and nothing beyond them."""
    assert number(int, 0, 5)('0') == 0 and number(int, 0, 5)('5') == 5
    assert type(number(int, 1)('3')) is int and type(number(float, 1)('3')) is float
    for text in ('-1', '6'):
        with pytest.raises(argparse.ArgumentTypeError, match=f'{text} is not a number from 0 to 5'):
            number(int, 0, 5)(text)
    with pytest.raises(argparse.ArgumentTypeError):
        number(float, 0)('nan')  # every comparison with nan is False
    for kind, text in ((float, 'inf'), (int, '9' * 20)):  # there is always an upper bound
        with pytest.raises(argparse.ArgumentTypeError, match='from 0 to 10000000'):
            number(kind, 0)(text)
    with pytest.raises(ValueError):
        number(int, 0)('1.5')


@pytest.mark.parametrize('words', [['--seed', '-1'], ['--seed', 'one'], ['--seed', str(2 ** 32)],
                                   ['--device', 'gpu'], ['--precision', 'fp8'], ['--dev', 'cpu']],
                         ids=' '.join)
def test_wrong_flags_are_told(parser, capsys, words):
    """In one line that names the flag, with status 2. Abbreviated flags are unknown ones."""
    assert words[0] in told(capsys, parser.parse_args, words)


def test_out_must_be_a_folder(parser, capsys, tmp_path):
    """Told at the start, not after the hours that lead to the first file."""
    (tmp_path / 'file').touch()
    assert '--out' in told(capsys, parser.parse_args, ['--out', str(tmp_path / 'file')])
    assert parser.parse_args(['--out', str(tmp_path)]).out == tmp_path
    assert parser.parse_args([]).out == tmp_path / 'new'  # it is made later


def test_help_prints_the_real_defaults(parser, capsys):
    """Also the docstring as it stands, and no `default: None` or `default: False`."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert '\n    python script.py    # as it stands\n' in text
    words = ' '.join(text.split())  # argparse breaks lines anywhere
    assert 'random seed (default: 0)' in words
    assert 'folder of the pictures (default: ' in words
    assert words.count('(default: auto)') == 2  # --device and --precision
    assert 'None' not in words and 'False' not in words


@pytest.mark.parametrize('name', ['gpu', 'cuda:99', 'meta', ''])
def test_devices_that_do_not_work_are_told(name):
    """Unknown names, and names of devices that do not compute here."""
    with pytest.raises(argparse.ArgumentTypeError, match='does not work on this machine; .* cpu'):
        choose_device(name)


def test_auto_takes_the_fastest_device_that_computes(monkeypatch):
    """cuda before mps before cpu, and a device that is present but broken is passed over."""
    ones, broken = torch.ones, {}

    def pretend(size, device):
        if torch.device(device).type in broken:
            raise broken[torch.device(device).type]
        return ones(size)

    monkeypatch.setattr(torch, 'ones', pretend)
    assert choose_device('auto').type == 'cuda'
    broken['cuda'] = RuntimeError('the driver is too old')
    assert choose_device('auto').type == 'mps'
    broken['mps'] = AssertionError('torch is not compiled with it')
    assert choose_device('auto').type == 'cpu'


def test_auto_precision_is_bf16_where_the_hardware_has_it(parser, monkeypatch):
    """NVIDIA from Ampere (8.0) on and CPUs with AVX512-BF16. A precision that is given stays."""
    for capability, fast in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert has_bf16(torch.device('cuda')) is fast
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': fast})
        assert has_bf16(torch.device('cpu')) is fast
        args = parser.parse_args(['--device', 'cpu'])
        assert args.precision == ('bf16' if fast else 'fp32')
    assert not has_bf16(torch.device('mps'))
    assert parser.parse_args(['--device', 'cpu', '--precision', 'fp32']).precision == 'fp32'


MEMORY = [MemoryError(), RuntimeError('not able to allocate 9 GB'),
          torch.OutOfMemoryError('Tried 9 GB'), RuntimeError('CUDA error: out of memory'),
          RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate')]


@pytest.mark.parametrize('error', MEMORY, ids=repr)
def test_too_little_memory_names_the_flags(capsys, error):
    """The libraries of CPU and GPU tell it in many ways."""
    def main():
        with user_mistakes():
            raise error

    line = told(capsys, main)
    assert '--batch-size, --width or --images' in line and str(error) in line


@pytest.mark.parametrize('error', [CheckpointError('a.pt:\ndamaged'), OSError('a.pt:\ndamaged'),
                                   ZeroDivisionError('a.pt:\ndamaged')], ids=repr)
def test_mistakes_are_told_in_one_line(capsys, error):
    """These, and the kinds that a script adds, exit with status 2."""
    def main():
        with user_mistakes(ZeroDivisionError):
            raise error

    assert ' '.join(str(error).split()) in told(capsys, main)


@pytest.mark.parametrize('bug', [KeyError('epoch'), RuntimeError('shapes do not match')], ids=repr)
def test_bugs_keep_their_traceback(bug):
    """What is not announced is a bug of ours, and is shown as one."""
    with pytest.raises(type(bug)), user_mistakes(ZeroDivisionError):
        raise bug


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGUSR2'])
def test_signals_end_a_script(name):
    """With 128 + their number, as shells expect; afterwards the handlers are those from before.
    SLURM can send SIGUSR1 or SIGUSR2 before the time of a job is up."""
    number = getattr(signal, name, None) or pytest.skip('not on this system')
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup may ignore it
    before = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit) as stop, user_mistakes():
            signal.raise_signal(number)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 128 + number
