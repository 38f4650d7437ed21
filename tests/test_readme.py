"""README and the pages in .github name what there is: their commands parse, their words exist."""
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import generate
import model
import ood
import sampler
import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('.github/**/*.md'))]
FOLDERS = [ROOT, ROOT / 'tests', ROOT / '.github/lessons']
SCRIPTS = {'data.py': data, 'train.py': train, 'generate.py': generate, 'ood.py': ood}


def commands(text):
    """All lines `python SCRIPT.py ...` of the project, without comments, as lists of words."""
    text = text.replace('\\\n', ' ').replace('`', '\n')
    for line in re.findall(r'python ((?:data|train|generate|ood)\.py[^\n|&]*)', text):
        words = shlex.split(line, comments=True)
        if '...' not in words and not any('|' in word for word in words):
            yield words


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_parses(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no run stands here
    found = list(commands(page.read_text()))
    others = re.findall(r'python (\S+/\S+\.py)', page.read_text())
    assert found + others
    assert all((ROOT / script).exists() for script in others), others
    for script, *words in found:
        words = ['cpu' if word == 'cuda' else word for word in words
                 if word not in ('--resume', '$resume')]
        try:
            SCRIPTS[script].parse_args(words)
        except SystemExit as stop:
            assert '--help' in words and stop.code == 0, ' '.join([script, *words])


def known_words():
    """Functions, classes, methods, parameters, and the names of sets, scores, modes, columns."""
    words = {*data.NAMES, *data.MADE, *data.PRESS_OOD, *generate.MODES, *train.PROGRESS, 'event',
             *train.NUMBERS, *train.SCORES, 'ood_ta', 'ood_tb', 'energy', 'max_prob',
             'entropy', 'max_logit', 'grad_norm', 'baseline_max_prob', 'baseline_energy', 'GLYPHS',
             'torchrun', *vars(torch.nn)}
    for names in data.SPLITS.values():
        words |= {*names, *map(str.title, names)}
    for module in (data, model, sampler, train, generate, ood):
        for name, value in vars(module).items():
            words.add(name)
            if inspect.isclass(value):
                words |= {*vars(value)}
            if inspect.isfunction(value):
                words |= {*inspect.signature(value).parameters}
    return words


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_in_code_font_exists(page):
    """`name` and `Class.method`; words with other characters are formulas, flags or paths."""
    known = known_words()
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    for name in re.findall(r'`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)(?:\(\))?`', text):
        path = any((folder / name).exists() for folder in FOLDERS)
        written = name.endswith(('.pt', '.csv', '.png', '.npy', '.npz', '.txt', '.gif'))
        assert path or written or {*name.split('.')} <= known, name


def test_the_lines_for_a_notebook_run(trained, glyphs, tmp_path):
    """The block of README that imports ours, on the tiny run of the tests and one own image."""
    blocks = re.findall(r'(?:^    [^\n]*\n)+', (ROOT / 'README.md').read_text(), re.M)
    lines, = [block for block in blocks if 'load_model' in block]
    code = inspect.cleandoc(lines).replace('runs/digits', str(trained))
    code = code.replace("'digits'", repr(str(glyphs)))
    np.save(tmp_path / 'own.npy', np.eye(20)[None])  # (1, 20, 20)
    code = code.replace('my/scans', str(tmp_path / 'own.npy'))
    code = code.replace('load_data(', 'load_data(image_size=16, name=')
    names = {}
    exec(code, names)  # noqa: S102
    assert names['drawn'].shape == (8, 1, 16, 16) and names['drawn'].isfinite().all()


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_into_the_project_leads_somewhere(page):
    for link in re.findall(r'\]\(([^):#]+)(?:#[^)]*)?\)', page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_course_page_is_short_enough():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 350
