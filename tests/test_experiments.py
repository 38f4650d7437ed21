"""The changes of .github/EXPERIMENTS.md fit the code, stand on the page, and do what it says."""
import importlib.util

import pytest
import torch

from conftest import QUICK
from data import load_data
from experiments import (ENERGY, EXPERIMENTS, HINGE, PERCEPTRON, ROOT, draw_labels,
                         few_label_scores, main, replaced, right_and_wrong)
from model import EnergyModel

PAGE = (ROOT / '.github' / 'EXPERIMENTS.md').read_text()


def changed(changes, file='train.py'):
    """The text of a file after all changes to it."""
    text = (ROOT / file).read_text()
    for name, old, new in changes:
        if name == file:
            text = replaced(text, old, new)
    return text


def module(changes, folder):
    """train.py with these changes, as a module."""
    path = folder / 'changed.py'
    path.write_text(changed(changes))
    spec = importlib.util.spec_from_file_location('changed', path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize('name', [name for name in EXPERIMENTS if EXPERIMENTS[name][1]])
def test_changes_fit_the_code(name):
    """What is replaced is there, and the result is Python."""
    changes = EXPERIMENTS[name][1]
    for file in {file for file, _, _ in changes}:
        compile(changed(changes, file), file, 'exec')


def test_mistakes_are_told(refused, tmp_path):
    """A name that no experiment has, a folder that holds runs with other settings, and one that
    holds none to draw."""
    assert '--only nosuch' in refused(main, '--out', tmp_path, '--only', 'nosuch')
    assert f'--draw {tmp_path}' in refused(main, '--out', tmp_path, '--draw', tmp_path)
    (tmp_path / 'judge').mkdir()
    (tmp_path / 'judge/done').write_text('train.py --data digits --seed 1')
    assert '--seed 1' in refused(main, '--out', tmp_path, '--only', 'K = 1')


@pytest.mark.parametrize('changes', [[ENERGY], [PERCEPTRON], [HINGE],
                                     EXPERIMENTS['5 a class, drawn labels'][1]])
def test_page_quotes_the_changes(changes):
    """Each new line of a change stands on the page, but for what was there before."""
    for file, old, new in changes:
        for line in new.splitlines():
            assert line.strip() in PAGE or line in old, line


def test_losses_of_energy_based_learning(tmp_path):
    """Two images whose right answer leads by 3 and trails by 2: the energy loss is mean E(x, y),
    the perceptron loss its excess over the least energy, the hinge adds the margin 1 to what it
    exceeds the most offending wrong answer by."""
    logits = torch.tensor([[5., 2., -1.], [0., 1., 3.]], requires_grad=True)  # (2, 3)
    y = torch.tensor([0, 1])  # (2,)
    wanted = {ENERGY: (-5 - 1) / 2, PERCEPTRON: (0 + 2) / 2, HINGE: (0 + 3) / 2}
    for change, value in wanted.items():
        loss = module([change], tmp_path).pyx_step(logits, y)
        assert loss.item() == pytest.approx(value), change
        gradient, = torch.autograd.grad(loss, logits)  # (2, 3)
        assert gradient.isfinite().all() and gradient[1, 1] == -.5, change


@pytest.mark.parametrize('kind', ['E(x)', 'drawn labels'])
def test_few_labels_are_all_labels_that_training_reads(kind, glyphs, tmp_path):
    """Exchanged labels of the other images, and other labels of the validation images, change no
    weight; an exchanged label of a chosen image does."""
    flags, changes = EXPERIMENTS[f'1 a class, {kind}']
    train = module(changes, tmp_path)
    train.plot_curves = train.draw_samples = lambda *_: None  # slow
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))  # (60,)

    def weights(change):
        args = train.parse_args(['--data', str(glyphs), '--out', str(tmp_path / 'run'), *QUICK,
                                 '--epochs', '1', '--overwrite', *flags.split()])
        data = load_data(str(glyphs), 16, tmp_path)
        change(data)
        train.train(args, data, train.check(args, data))
        run = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['run']
        both = [*run['model'].values(), *run['averaged'].values()]
        return torch.cat([weight.flatten() for weight in both])

    def hidden(data):
        y = data.train.labels
        chosen = max((y[order] == k).nonzero()[0].item() for k in range(3))  # the last one's place
        rest = order[chosen + 1:]
        y[rest] = y[rest].roll(1)
        data.val.labels = (data.val.labels + 1) % 3

    def known(data):
        data.train.labels[:] = (data.train.labels + 1) % 3

    same = weights(lambda data: None)
    assert torch.equal(same, weights(hidden))
    assert not torch.equal(same, weights(known))


def test_few_labels_are_drawn_by_data_set_and_kind(tmp_path):
    """Seeds of a data set share a panel; other experiments are left out."""
    for folder, data, rows in [('a', 'digits', ['default,.9', '"1 a class, E(x)",.5']),
                               ('b', 'digits', ['"1 a class, E(x)",.7',
                                                '"5 a class, E(x) (stopped)",.8']),
                               ('c', 'mnist', ['"5 a class, no p(x)",.6'])]:
        (tmp_path / folder / 'judge').mkdir(parents=True)
        (tmp_path / folder / 'judge/done').write_text(
            f'train.py --data in/{data} --data-root .data --epochs 1 --seed 0')
        (tmp_path / folder / 'experiments.csv').write_text('\n'.join(['experiment,test', *rows]))
    scores = few_label_scores([tmp_path / folder for folder in 'abc'])
    assert scores == {'digits, --epochs 1': {'E(x)': {1: [.5, .7], 5: [.8]}},
                      'mnist, --epochs 1': {'no p(x)': {5: [.6]}}}
    draw_labels(scores, tmp_path / 'labels.png')
    assert (tmp_path / 'labels.png').read_bytes().startswith(b'\x89PNG')


def test_the_most_offending_answer_is_the_wrong_one_of_least_energy():
    logits = torch.tensor([[5., 2., -1.], [0., 1., 3.]])  # (2, 3)
    right, wrong = right_and_wrong(EnergyModel(3), logits, torch.tensor([0, 1]))
    assert right.tolist() == [-5, -1] and wrong.tolist() == [-2, -3]
