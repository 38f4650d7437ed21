"""The lesson .github/lessons/plane.py: its mathematics, and a tiny run of its command."""
import math

import pytest
import torch

from conftest import load_lesson

plane = load_lesson('plane')


@pytest.mark.parametrize('name', plane.SETS)
def test_the_true_density_is_that_of_the_data(name):
    """It integrates to 1 over the square, and its cells hold as many points as it says."""
    points, generator = plane.centres(name), torch.Generator().manual_seed(0)
    log_p = plane.log_density(plane.GRID, points)
    assert (plane.CELL * log_p.exp().sum()).item() == pytest.approx(1, abs=.003)
    x = plane.draw_data(points, 4000, generator)
    exact = plane.GRID[log_p.exp().multinomial(4000, replacement=True, generator=generator)]
    assert plane.misplaced(x, log_p) < 1.5 * plane.misplaced(exact, log_p)


def test_annealing_brackets_log_z():
    """Of a Gaussian energy whose Z is known: 2 pi s^2, as the square cuts off .2 % of it."""
    s, generator = .3, torch.Generator().manual_seed(0)
    start = 2 * torch.rand(1000, 1, 1, 2, generator=generator) - 1
    exact = s * torch.randn(1000, 1, 1, 2, generator=generator)
    betas = torch.linspace(0, 1, 61).tolist()

    def energy(x):
        return (x / s).square().flatten(1).sum(1) / 2

    below = math.log(4) + plane.anneal(energy, start, betas, generator)
    above = math.log(4) - plane.anneal(energy, exact, betas[::-1], generator)
    assert below == pytest.approx(math.log(2 * math.pi * s ** 2), abs=.06)
    assert above == pytest.approx(math.log(2 * math.pi * s ** 2), abs=.06)


def test_a_short_run_learns_and_is_the_same_again(tmp_path, capsys, monkeypatch):
    """Likelihood rises above the uniform density's; same seed, same numbers and same picture."""
    for name, value in {'SETS': ['moons'], 'CHAINS': 50, 'LENGTH': 20, 'LEVELS': 10}.items():
        monkeypatch.setattr(plane, name, value)
    outputs, pictures = [], []
    for out in (tmp_path / 'a', tmp_path / 'b'):
        plane.main(['--out', str(out), '--updates', '120'])
        outputs.append(capsys.readouterr().out)
        pictures.append((out / 'plane.png').read_bytes())
    assert outputs[0] == outputs[1] and pictures[0] == pictures[1]
    assert float(outputs[0].split('NLL ')[1].split(',')[0]) < math.log(4)
