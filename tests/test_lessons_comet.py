"""The lesson on COMET (.github/lessons/comet.py): the energies of the parts are summed, the encoder
learns through the steps, and the table of exchanged parts says what it claims to say."""
import re

import pytest
import torch
from torch import nn

from conftest import load_lesson


@pytest.fixture
def lesson():
    return load_lesson('comet')


@pytest.fixture
def model(lesson):
    torch.manual_seed(0)
    return lesson.Comet()


@pytest.fixture
def images(lesson):
    return lesson.render(2 * torch.rand(8, 3) - 1)  # (8, 1, 16, 16)


def run(lesson, folder, capsys, updates):
    """PSNR of reconstructions and of the mean image, both tables (6, 3), and the picture."""
    lesson.main(['--out', str(folder), '--updates', str(updates)])
    first, *lines = capsys.readouterr().out.splitlines()
    decibels = [float(text) for text in re.findall(r'[\d.]+(?= dB)', first)]
    rows = [[float(text) for text in line.split()] for line in lines if line.startswith('  ')]
    return decibels, torch.tensor(rows), (folder / 'comet.png').read_bytes()


def test_each_factor_changes_its_own_pixels(lesson):
    right, down, bright = lesson.render(torch.eye(3))[:, 0]  # (16, 16) each
    middle = lesson.render(torch.zeros(1, 3))[0, 0]
    assert (right - middle)[:, 8:].sum() > 5 and (right - middle)[:, :8].sum() < -5
    torch.testing.assert_close(right - middle, (down - middle).T)
    torch.testing.assert_close(bright - middle, torch.full((16, 16), .3))
    extreme = lesson.render(torch.cartesian_prod(*[torch.tensor([-1., 1.])] * 3))
    assert extreme.abs().max() <= 1


def test_the_whole_energy_is_the_sum_of_its_parts(lesson, model, images, monkeypatch):
    z = model.encode(images)  # (8, 3)
    parts = model.energies(images, model.of_z(z))  # (8, 3)
    assert (parts > 0).all()
    other = model.energies(images, model.of_z(z + torch.tensor([0., 1., 0.])))  # (8, 3)
    assert [torch.equal(a, b) for a, b in zip(parts.T, other.T)] == [True, False, True]
    seen = []
    monkeypatch.setattr(lesson, 'sgld', lambda energy, *_, **__: seen.append(energy(images)))
    model.generate(z, images)
    torch.testing.assert_close(seen[0], parts.sum(1))
    for weight in model.out.parameters():  # the energy is a square: bounded below whatever g is
        weight.data.neg_()
    assert torch.equal(model.energies(images, model.of_z(z)), parts)


def test_the_loss_reaches_every_weight_through_the_steps(model, images):
    start = torch.zeros_like(images)
    x = model.generate(model.encode(images), start, differentiable=True)
    (x - images).square().mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
    same = model.generate(model.encode(images), start)  # there is no noise in the steps
    torch.testing.assert_close(x, same)


def test_training_lowers_the_error_and_a_seed_fixes_the_run(lesson, tmp_path, capsys):
    before, *_ = run(lesson, tmp_path / 'a', capsys, 1)
    after, table, picture = run(lesson, tmp_path / 'b', capsys, 25)
    again, same_table, same_picture = run(lesson, tmp_path / 'c', capsys, 25)
    assert after[0] > before[0] + 1
    assert after == again and picture == same_picture and torch.equal(table, same_table)


def test_the_table_of_parts_that_are_the_factors(lesson, tmp_path, capsys):
    """A perfect model: a part moves one factor all the way and keeps the others; other coordinates
    of its latents do not."""
    known, render = {}, lesson.render

    def remember(factors):
        images = render(factors)
        known.update({x.numpy().tobytes(): f.tolist() for x, f in zip(images, factors)})
        return images

    class Perfect(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def encode(self, x):
            return torch.tensor([known[image.numpy().tobytes()] for image in x])

        def of_z(self, z):
            return z

        def generate(self, z, start, differentiable=False):
            return render(z) + 0 * self.weight

        def energies(self, x, h):
            return h * x.sum((1, 2, 3))[:, None]

    lesson.Comet, lesson.render = Perfect, remember
    _, table, _ = run(lesson, tmp_path, capsys, 1)
    torch.testing.assert_close(table[3:].diag(), torch.ones(3))
    assert (table[3:] - torch.eye(3)).abs().max() < .1
    assert (table[:3] - torch.eye(3)).abs().max() > .3
