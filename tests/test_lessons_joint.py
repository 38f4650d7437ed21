"""The lesson .github/lessons/joint.py: its mathematics, and a tiny run of its command."""
import math

import pytest
import torch

from conftest import load_lesson

N = 64  # pixels


@pytest.fixture
def lesson():
    return load_lesson('joint')


@pytest.fixture
def model(lesson):
    """The ideal model of one grey image: u is the distance from it, and the class is always 1."""
    class Ideal(lesson.Valleys):
        image = 0.

        def outputs(self, x):
            distance = (x - self.image).square().mean(dim=(1, 2, 3)).sqrt()  # (B,)
            return distance, torch.tensor([-50., 50.]).expand(len(x), 2)

    return Ideal(2, 1).requires_grad_(False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_draws_follow_the_student_t(lesson, generator):
    """With N degrees of freedom d^2 / (1 + d^2) follows Beta(N/2, N/2): mean 1/2, variance
    1 / (4 (N + 1))."""
    x = lesson.student((4000, 1, 8, 8), 3., generator) / 3
    d2 = x.square().mean(dim=(1, 2, 3))
    share = d2 / (1 + d2)  # (4000,)
    assert share.mean().item() == pytest.approx(.5, abs=.003)
    assert share.var().item() == pytest.approx(1 / (4 * (N + 1)), rel=.1)


def test_annealing_finds_log_z(lesson, model, generator):
    """Here the model is a Student-t of scale S0, whose log Z is N log(1 / S0) above that of scale
    1: both ways within half a nat. log Z itself in one dimension, where 1 / (1 + x^2) has pi."""
    assert lesson.log_z_student(1) == pytest.approx(math.log(math.pi))
    levels, shape = torch.linspace(0, 2, 401).tolist(), (200, 1, 4, 4)
    down, x, _ = lesson.anneal(model, lesson.student(shape, 1., generator), levels, generator)
    up, _, _ = lesson.anneal(model, lesson.student(shape, lesson.S0, generator), levels[::-1],
                             generator)
    true = 16 * math.log(1 / lesson.S0)
    assert down == pytest.approx(true, abs=.5) and -up == pytest.approx(true, abs=.5)
    d2 = x.square().mean(dim=(1, 2, 3))  # (200,)
    assert d2.median().item() == pytest.approx(lesson.S0 ** 2, rel=.2)


def test_path_is_continuous_and_ends_at_the_model(lesson, model, generator):
    x = torch.randn(5, 1, 8, 8, generator=generator)
    model.image = .5
    for level in (.999999, 1.000001):
        torch.testing.assert_close(model.path_energy(x, level), model.path_energy(x, 1.),
                                   rtol=1e-4, atol=1e-3)
    assert torch.equal(model.path_energy(x, 2.), model.energy(x))
    q = N * (1 + x.square().mean(dim=(1, 2, 3))).log()
    torch.testing.assert_close(model.path_energy(x, 0.), q)


def test_the_ideal_model_has_no_matching_loss_and_finds_its_image(lesson, model, generator):
    """But for the chance in |xi|; and at another distance from the image the loss is there."""
    x, y = torch.zeros(64, 1, 16, 16), torch.ones(64).long()
    model.requires_grad_(True)
    assert lesson.matching_loss(model, x, y, generator) < .15
    assert lesson.matching_loss(model, x, 0 * y, generator) > 10  # wrong classes
    model.image = .3
    assert lesson.matching_loss(model, x, y, generator) > 1
    found = model.denoise(torch.randn(5, 1, 8, 8, generator=generator))
    torch.testing.assert_close(found, torch.full_like(found, .3))


def test_likelihood_lowers_the_gap(lesson, generator, monkeypatch):
    """Updates with the gap alone call data likelier than the chains."""
    monkeypatch.setattr(lesson, 'matching_loss', lambda model, *_: 0 * model.head.bias.sum())
    monkeypatch.setattr(lesson, 'GAP', 1.)
    torch.manual_seed(0)
    model = lesson.Valleys(2, 1)
    x = torch.ones(8, 1, 16, 16)
    x[:, :, 4:12] = -1
    chains = torch.zeros(64, 1, 16, 16)
    before = (model.energy(x).mean() - model.energy(chains).mean()).item()
    lesson.learn(model, x, torch.zeros(8).long(), 10, .001, chains, generator)
    assert (model.energy(x).mean() - model.energy(chains).mean()).item() < before - 1
    assert chains.std() > .1  # they have moved, and stay in the reservoir


def test_command(lesson, tmp_path, capsys, monkeypatch):
    """Both phases report, and the same seed gives the same bytes."""
    monkeypatch.setattr(lesson, 'LENGTHS', [0, 20])
    monkeypatch.setattr(lesson, 'LEVELS', 4)
    said = []
    for run in ('a', 'b'):
        lesson.main(['--out', str(tmp_path / run), '--updates', '3', '--likelihood', '2',
                     '--device', 'cpu'])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].count('log p') == 2 and 'label kept' in said[0]
    assert len({(tmp_path / run / 'joint.png').read_bytes() for run in ('a', 'b')}) == 1
