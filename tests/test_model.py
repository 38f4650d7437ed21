"""Laws of the energy and of its checkpoints."""
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from model import CheckpointError, EnergyModel, FirstConv2d, load_model, read_checkpoint, save_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return EnergyModel(num_classes=5, channels=1, width=4)


def test_marginal_energy_sums_the_joint_one(model):
    """E(x) = -logsumexp_y -E(x, y): summing exp(-E(x, y)) over y gives exp(-E(x))."""
    x = torch.rand(7, 1, 20, 20) * 2 - 1
    joint = torch.stack([model.energy(x, torch.full((7,), y)) for y in range(5)], dim=1)  # (7, 5)
    torch.testing.assert_close(model.energy(x), -torch.logsumexp(-joint, dim=1))


def test_classifier_is_the_ratio_of_joint_to_marginal(model):
    """p(y|x) = exp(-E(x, y)) / exp(-E(x))."""
    x, y = torch.rand(7, 1, 20, 20) * 2 - 1, torch.arange(7) % 5
    ratio = (model.energy(x) - model.energy(x, y)).exp()
    torch.testing.assert_close(ratio, model.get_logits(x).softmax(1)[torch.arange(7), y])


def test_forward_is_minus_the_energy(model):
    """f = -E, with and without labels: low energy is likely."""
    x, y = torch.rand(3, 1, 20, 20), torch.tensor([0, 4, 2])
    assert torch.equal(model(x), -model.energy(x)) and torch.equal(model(x, y), -model.energy(x, y))
    assert torch.equal(model(x, y), model.get_logits(x)[torch.arange(3), y])


def test_one_logit_is_a_plain_ebm():
    """With K = 1 the energy is minus the only logit."""
    model, x = EnergyModel(num_classes=1, width=4), torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(model.energy(x), -model.get_logits(x)[:, 0])


@pytest.mark.parametrize('size', [16, 17, 28, 56, 75])
@pytest.mark.parametrize('channels', [1, 3])
def test_any_size_and_channels(size, channels):
    """(B, C, H, W) -> (B, K) for any size from 16 up."""
    model = EnergyModel(3, channels, width=4)
    assert model.get_logits(torch.rand(2, channels, size, size)).shape == (2, 3)
    assert model.energy(torch.rand(2, channels, size, size)).shape == (2,)


@pytest.mark.parametrize('size', [16, 17, 28, 56, 75])
@pytest.mark.parametrize('channels', [1, 3])
def test_first_layer_is_a_convolution(size, channels):
    """Its values, and the gradients of x and the weights, are those of a 5x5 convolution with stride 2 and padding 4."""
    layer = FirstConv2d(channels, 4).double()
    x = torch.randn(2, channels, size, size + 1, dtype=torch.double, requires_grad=True)
    results = []
    for h in (layer(x), F.conv2d(x, layer.weight, layer.bias, stride=2, padding=4)):
        results.append([h, *torch.autograd.grad(h.sin().sum(), [x, layer.weight, layer.bias])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_course_net_costs_what_the_course_says():
    """About 12.5 million multiply-adds for one 56x56 image."""
    model, total = EnergyModel(42), 0

    def count(layer, inputs, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in model.features[::2]:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    model(torch.rand(1, 1, 56, 56))
    assert 12.0e6 < total < 13.0e6


def test_images_do_not_mix(model):
    """The energy of an image is the same alone and in a batch."""
    x = torch.rand(6, 1, 20, 20)
    torch.testing.assert_close(model.energy(x)[2:3], model.energy(x[2:3]))


def test_bf16_energies_are_float32_and_near(model):
    """bf16 convolutions change energies by rounding only, and leave them float32."""
    x = torch.rand(64, 1, 20, 20) * 2 - 1
    exact = model.energy(x)
    model.precision = 'bf16'
    rounded = model.energy(x)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < .02


def test_checkpoint_round_trip(model, tmp_path):
    """What is loaded computes the same energies, and no argument is asked again."""
    with open(tmp_path / 'a.pt', 'wb') as file:
        save_checkpoint(file, model, class_names=list('abcde'))
    loaded, checkpoint = load_model(tmp_path / 'a.pt', torch.device('cpu'), 'fp32')
    x = torch.rand(3, 1, 20, 20)
    assert torch.equal(loaded.energy(x), model.energy(x)) and checkpoint['class_names'] == list('abcde')


def test_no_checkpoint_runs_code(tmp_path):
    """A pickle that would run a command is refused unread."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'exploded'),)

    (tmp_path / 'bomb.pt').write_bytes(pickle.dumps({'format': Bomb()}, protocol=2))
    torch.save({'format': 1, 'weights': Bomb()}, tmp_path / 'zip.pt')
    for name in ('bomb.pt', 'zip.pt'):
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('damage', ['missing', 'empty', 'cut', 'foreign', 'weights'])
def test_damaged_checkpoints_are_told(model, tmp_path, damage):
    """Each damage is a CheckpointError that names the file."""
    path = tmp_path / 'a.pt'
    with open(path, 'wb') as file:
        save_checkpoint(file, model)
    if damage == 'missing':
        path.unlink()
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'cut':
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == 'foreign':
        torch.save({'state_dict': {}}, path)
    else:
        torch.save({**torch.load(path, weights_only=True), 'settings': {'num_classes': 9}}, path)
    with pytest.raises(CheckpointError, match='a.pt'):
        load_model(path, torch.device('cpu'), 'fp32')
