"""What a user can get wrong, through the real command lines: every mistake ends with exit status 2 and one line that names
the flag or the file and the way out, without a traceback, a warning or a changed file.

In the tables ` ... ` in an answer stands for any words. All commands are given on the same desk, see `desk`.
"""
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import ood
import train
from conftest import QUICK, bars
from model import EnergyModel

CPU = ['--device', 'cpu']
SCRIPTS = {'train': (train.main, QUICK), 'generate': (generate.main, CPU), 'ood': (ood.main, CPU)}
IMAGES, LABELS = np.random.default_rng(0).random((6, 20, 20)), np.arange(6) % 3


def save(path, *arrays):
    """Arrays one after the other in one file, as in the course's folder."""
    with open(path, 'wb') as file:
        for array in arrays:
            np.save(file, array)


@pytest.fixture
def desk(tmp_path, glyphs, trained, monkeypatch):
    """The folder we stand in: GLYPHS (a course folder), FEWER (the same with fewer images), LETTERS (class folders),
    runs on GLYPHS (run: two epochs; changed: a classifier of the other data; ebm: one of no classes), and what is mine."""
    shutil.copytree(glyphs, tmp_path / 'GLYPHS')
    shutil.copytree(trained, tmp_path / 'run')
    for name in 'ab':
        (tmp_path / 'LETTERS' / name).mkdir(parents=True)
        for i in range(10):
            Image.new('L', (20, 20), 20 * i).save(tmp_path / 'LETTERS' / name / f'{i}.png')
    shutil.copytree(glyphs, tmp_path / 'FEWER')
    save(tmp_path / 'FEWER/train.npy', *bars(30, 0))
    checkpoint = torch.load(trained / 'best.pt', weights_only=True)
    other = {**checkpoint, 'args': {**checkpoint['args'], 'px_weight': 0.},
             'data': {**checkpoint['data'], 'class_counts': {}}}
    for name, made in {'changed': other, 'ebm': {**checkpoint, 'class_names': []}}.items():
        (tmp_path / name).mkdir()
        torch.save(made, tmp_path / name / 'best.pt')
    (tmp_path / 'mine').mkdir()
    save(tmp_path / 'mine/denoise.npy', IMAGES)
    Image.new('L', (20, 20)).save(tmp_path / 'mine/curves.png')
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'note.txt').write_text('mine')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    """Every file below `folder` with its bytes, every folder and every link."""
    return {path: path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None for path in folder.rglob('*')}


def check(command, answer, desk, capsys):
    """Give `command` on the desk and hold its end against the rules above."""
    script, *words = shlex.split(command)
    main, quick = SCRIPTS[script]
    before = snapshot(desk)
    capsys.readouterr()  # what fixtures printed
    with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as stop:
        warnings.simplefilter('always')
        main([*quick, *words])
    line = re.sub('.*\r', '', capsys.readouterr().err).strip()  # without bars that were wiped
    assert stop.value.code == 2 and not re.search('[\r\n]|Traceback', line) and not warned, (line, warned)
    assert re.search('.*'.join(map(re.escape, answer.split(' ... '))), line), line
    assert snapshot(desk) == before, 'files changed'


# --- flags ----------------------------------------------------------------------------------------------------------------

FLAGS = '''
train --data GLYPHS --epochs 0                          | --epochs: 0
train --data GLYPHS --epochs 1e3                        | --epochs ... '1e3'
train --data GLYPHS --epoch 3                           | --epoch
train --data GLYPHS --batch-size 61                     | --batch-size ... at most 60
train --data GLYPHS --width 2000000                     | memory
train --data GLYPHS --image-size 8                      | --image-size: 8
train --data GLYPHS --lr nan                            | --lr: nan
train --data GLYPHS --lr 1e300                          | --lr: 1e300
train --data GLYPHS --lr-decay 1.5                      | --lr-decay: 1.5
train --data GLYPHS --step-size 0                       | --step-size: 0
train --data GLYPHS --noise -.1                         | --noise: -.1
train --data GLYPHS --px-weight 0 --pyx-weight 0        | --px-weight ... --pyx-weight
train --data GLYPHS --init magic                        | --init: invalid choice: 'magic' (choose from
train --data GLYPHS --model ebm --conditional           | --model ebm has no labels: leave out --conditional
train --data GLYPHS --seed -1                           | --seed: -1
train --data GLYPHS --device tpu                        | --device: tpu ... use --device cpu
train --data GLYPHS --device cuda:99                    | --device: cuda:99 ... use --device cpu
train --data nowhere                                    | nowhere ... letterpress, digits, mnist
train --data GLYPHS/val.npy                             | GLYPHS/val.npy
train --data letterpress --data-root note.txt           | note.txt ... cannot be written
train --data mnist --data-root note.txt                 | mnist ... note.txt
train --data GLYPHS --out note.txt                      | note.txt
train --data GLYPHS --out note.txt/new                  | note.txt/new
train --data GLYPHS --out run                           | --out: run/last.pt exists ... --resume ... --overwrite
train --data GLYPHS --out mine                          | --out: mine/curves.png exists ... another --out
train --data LETTERS --out LETTERS/new/run --batch-size 8 | --out LETTERS/new/run
train --data LONG                                       | File name too long
train --data GLYPHS --out run --resume --overwrite      | --overwrite ... --resume
train --out run --resume --width 6                      | --width: this run has 4
train --out run --resume --data digits                  | digits
train --out new --resume                                | last.pt
generate                                                | arguments are required: --ckpt
generate --ckpt run/best.pt --mode video                | --mode: invalid choice: 'video' (choose from
generate --ckpt run/best.pt --count 0                   | --count: 0
generate --ckpt run/best.pt --classes stand zebra       | --classes zebra ... stand lie lean
generate --ckpt run/best.pt --mode denoise --start nowhere | nowhere
generate --ckpt run/best.pt --mode denoise --start note.txt | note.txt
generate --ckpt run/best.pt --mode inpaint --mask Left  | --mask Left
generate --ckpt run/best.pt --mode inpaint --mask LETTERS/a/0.png | --mask LETTERS/a/0.png
generate --ckpt run/best.pt --start LETTERS             | --start
generate --ckpt run/best.pt --mode denoise --start mine/denoise.npy --out mine | --start mine/denoise.npy
generate --ckpt run/best.pt --mode evaluate --judge changed/best.pt | --judge changed/best.pt
generate --ckpt ebm/best.pt --mode evaluate             | --mode evaluate
generate --ckpt run/best.pt --mode compose              | --mode compose
generate --ckpt run/best.pt --mode compose --ckpt2 note.txt | note.txt
generate --ckpt run/best.pt --mode evaluate             | --judge
generate --ckpt run/best.pt --out note.txt              | note.txt
ood --ckpt run/best.pt --ood zebras                     | --ood zebras ... ood_ta
ood --ckpt run/best.pt --ood GLYPHS                     | GLYPHS
ood --ckpt run/best.pt --check nowhere                  | nowhere
ood --ckpt run/best.pt --check LETTERS --ood noise      | --check ... --ood
ood --ckpt run/best.pt --ood LETTERS --out LETTERS      | --out LETTERS
ood --ckpt run/best.pt --data FEWER                     | FEWER ... class counts
ood --ckpt run/best.pt --baseline run/last.pt           | --baseline run/last.pt ... --px-weight 0
ood --ckpt run/best.pt --data digits                    | digits
'''.strip().splitlines()


@pytest.mark.parametrize('row', FLAGS, ids=lambda row: ' '.join(row.split('|')[0].split()))
def test_flags(row, desk, capsys):
    """A flag out of range, of another kind or against another flag."""
    command, answer = (text.replace('LONG', 300 * 'o') for text in row.split('|'))
    check(command, answer.strip(), desk, capsys)


# --- data -----------------------------------------------------------------------------------------------------------------

def cut(path, share=.5):
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])


FORMAT = 'images (N, H, W), then integer labels (N,)'
NUMBERS = 'images must be finite real numbers'
RULE = 'labels must be 6 integers from 0 on'
COURSE = {  # what is done to GLYPHS/val.npy, and what is said of it
    'missing': (Path.unlink, f'not readable as {FORMAT} ... No such file'),
    'a folder': (lambda path: (path.unlink(), path.mkdir()), f'not readable as {FORMAT}'),
    'empty': (lambda path: path.write_bytes(b''), f'not readable as {FORMAT}'),
    'text': (lambda path: path.write_text('a picture of an a\n' * 99), f'not readable as {FORMAT}'),
    'cut in the header': (lambda path: cut(path, .001), f'not readable as {FORMAT}'),
    'cut in the images': (cut, f'not readable as {FORMAT}'),
    'cut in the labels': (lambda path: cut(path, .999), f'not readable as {FORMAT}'),
    'one array': (lambda path: save(path, IMAGES), f'not readable as {FORMAT}'),
    'an .npz': (lambda path: np.savez(open(path, 'wb'), IMAGES, LABELS), f'not readable as {FORMAT}'),
    'objects': (lambda path: save(path, IMAGES.astype(object), LABELS), f'not readable as {FORMAT} ... pickle'),
    'texts': (lambda path: save(path, IMAGES.astype(str), LABELS), f'{NUMBERS} ... {FORMAT}'),
    'complex numbers': (lambda path: save(path, IMAGES + 1j, LABELS), f'{NUMBERS} ... {FORMAT}'),
    'dates': (lambda path: save(path, IMAGES.astype('M8[s]'), LABELS), f'{NUMBERS} ... {FORMAT}'),
    'in colour': (lambda path: save(path, IMAGES[..., None].repeat(2, -1), LABELS), 'images must be finite'),
    'flat images': (lambda path: save(path, IMAGES.reshape(6, 400), LABELS), 'images must be finite'),
    'no images': (lambda path: save(path, IMAGES[:0], LABELS[:0]), 'images must be finite'),
    'images of no width': (lambda path: save(path, IMAGES[..., :0], LABELS), 'images must be finite'),
    'a NaN': (lambda path: save(path, np.where(IMAGES == IMAGES[3, 4, 5], np.nan, IMAGES), LABELS), 'images must be finite'),
    'infinite': (lambda path: save(path, np.where(IMAGES == IMAGES[3, 4, 5], -np.inf, IMAGES), LABELS), NUMBERS),
    'beyond float32': (lambda path: save(path, IMAGES * 1e300, LABELS), 'images must be finite'),
    'labels: negative': (lambda path: save(path, IMAGES, LABELS - 1), RULE),
    'labels: fractions': (lambda path: save(path, IMAGES, LABELS / 2), RULE),
    'labels: texts': (lambda path: save(path, IMAGES, LABELS.astype(str)), RULE),
    'labels: too few': (lambda path: save(path, IMAGES, LABELS[:5]), RULE),
    'labels: one-hot': (lambda path: save(path, IMAGES, np.eye(3, dtype=int)[LABELS]), RULE),
    'labels: huge': (lambda path: save(path, IMAGES, LABELS + 2 ** 40), RULE),
    'labels: not in train': (lambda path: save(path, IMAGES, LABELS + 1), '3 classes in train.npy; number them 0, 1, ...'),
}


@pytest.mark.parametrize('damage', COURSE)
def test_course_folder(damage, desk, capsys):
    """A file of the course folder that is not what it should be."""
    action, answer = COURSE[damage]
    action(desk / 'GLYPHS/val.npy')
    check('train --data GLYPHS --batch-size 4', f'val.npy: ... {answer}', desk, capsys)


REST = {  # what is done to the rest of the course folder
    'labels with a gap': (lambda f: [save(f / f'{part}.npy', IMAGES, LABELS * 2) for part in ('train', 'val', 'test')],
                          'train.npy: labels up to 4, but 3 classes in train.npy; number them 0, 1, ...'),
    'a single class': (lambda f: [save(f / f'{part}.npy', IMAGES, LABELS * 0) for part in ('train', 'val', 'test')],
                       'one class only ... --model ebm'),
    'OOD images: cut': (lambda f: cut(f / 'ood_ta.npy'), 'ood_ta.npy: not readable as one array of images (N, H, W)'),
    'OOD images: flat': (lambda f: save(f / 'ood_ta.npy', IMAGES[0]), 'ood_ta.npy: images must be finite'),
    'a name too few': (lambda f: (f / 'classes.txt').write_text('stand\nlie\n'),
                       'classes.txt: 2 different names for 3 classes; write one name a line, or remove the file'),
    'names in Latin-1': (lambda f: (f / 'classes.txt').write_bytes('st\u00e4nd\nlie\nlean\n'.encode('latin-1')),
                         'classes.txt: not in UTF-8; save it in that encoding, one name a line'),
    'a name twice': (lambda f: (f / 'classes.txt').write_text('lie\nlie\nlean\n'),
                     'classes.txt: 2 different names for 3 classes; write one name a line, or remove the file'),
}


@pytest.mark.parametrize('damage', REST)
def test_rest_of_the_course_folder(damage, desk, capsys):
    """Labels, OOD sets and class names that do not fit together."""
    action, answer = REST[damage]
    for file in ('GLYPHS/classes.txt',) if 'class' in damage or 'gap' in damage else ():
        (desk / file).unlink()
    action(desk / 'GLYPHS')
    check('train --data GLYPHS --batch-size 4', answer, desk, capsys)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def split(folder, *parts):
    """LETTERS inside train, val and test folders."""
    for part in parts:
        shutil.copytree(folder, folder.parent / 'inside' / part)
    shutil.rmtree(folder)
    (folder.parent / 'inside').rename(folder)


IMAGE = 'not readable as an image ... replace it or take it away'
LETTERS = {  # what is done to LETTERS
    'nothing in it': (lambda f: (shutil.rmtree(f), f.mkdir()), 'LETTERS ... class folder ... give every class a folder'),
    'hidden folders only': (lambda f: (shutil.rmtree(f), (f / '.a').mkdir(parents=True)), 'LETTERS ... no class folder'),
    'files only': (lambda f: (shutil.rmtree(f), f.mkdir(), (f / 'a.png').write_bytes(b'')), 'LETTERS ... class folder'),
    'a class without images': (lambda f: empty(f / 'b'), 'LETTERS ... classes b ... give every class a folder with images'),
    'other files': (lambda f: [path.rename(path.with_suffix('.doc')) for path in (f / 'b').iterdir()], 'classes b'),
    'a class of 7': (lambda f: [(f / 'b' / f'{i}.png').unlink() for i in range(3)], "class 'b' has 7 images ... add images"),
    'one class': (lambda f: shutil.rmtree(f / 'b'), 'one class only ... --model ebm'),
    'an empty file': (lambda f: (f / 'b/5.png').write_bytes(b''), f'b/5.png: {IMAGE}'),
    'a text': (lambda f: (f / 'b/5.png').write_text('no picture'), f'b/5.png: {IMAGE}'),
    'a cut image': (lambda f: cut(f / 'b/5.png', .7), f'b/5.png: {IMAGE}'),
    'a cut JPEG': (lambda f: (Image.open(f / 'b/5.png').save(f / 'b/5.jpg'), cut(f / 'b/5.jpg', .9)), f'b/5.jpg: {IMAGE}'),
    'a link to nowhere': (lambda f: (f / 'b/x.png').symlink_to('nowhere'), f'b/x.png: {IMAGE}'),
    'a NaN': (lambda f: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(f / 'b/x.tif'), f'b/x.tif: {IMAGE}'),
    'infinite': (lambda f: Image.fromarray(np.diag([np.float32('inf')] * 9)).save(f / 'b/x.tif'), f'b/x.tif: {IMAGE}'),
    'a page too large': (lambda f: (f / 'b/x.pgm').write_bytes(b'P5 99999 99999 255\n'), f'b/x.pgm: {IMAGE}'),
    'train alone': (lambda f: split(f, 'train'), 'LETTERS/val ... in each of train, val and test'),
    'another class in val': (lambda f: (split(f, 'train', 'val', 'test'), (f / 'val/b').rename(f / 'val/c')),
                             'train, val and test must hold the same class folders'),
    'none of a class in val': (lambda f: (split(f, 'train', 'val', 'test'), empty(f / 'val/b')), 'classes b ... give every'),
}


@pytest.mark.parametrize('damage', LETTERS)
def test_class_folders(damage, desk, capsys):
    """Class folders that cannot be split, and files in them that are no images."""
    action, answer = LETTERS[damage]
    action(desk / 'LETTERS')
    check('train --data LETTERS --batch-size 4', answer, desk, capsys)


@pytest.mark.parametrize('folder, mode, command, answer', [
    ('LETTERS/b', 0o100, 'train --data LETTERS', 'LETTERS ... classes b ... images that may be read'),
    ('GLYPHS/val.npy', 0o200, 'train --data GLYPHS', 'GLYPHS/val.npy: ... Permission denied'),
    ('LETTERS', 0o500, 'train --data letterpress --data-root LETTERS', 'LETTERS/letterpress ... cannot be written'),
    ('.', 0o500, 'train --data GLYPHS --out new', 'cannot be written ... name another folder'),
    ('.', 0o500, 'generate --ckpt run/best.pt --out new', 'cannot be written into; name another folder'),
    ('.', 0o500, 'ood --ckpt run/best.pt', 'cannot be written into; name another folder')])
def test_without_permission(folder, mode, command, answer, desk, capsys):
    """What may not be read or not be written into is named."""
    (desk / folder).chmod(mode)
    if os.access(desk / folder, os.R_OK | os.W_OK):
        pytest.skip('the administrator may read and write everything: run as another user')
    try:
        check(command, answer, desk, capsys)
    finally:
        (desk / folder).chmod(0o700)


def test_damaged_torchvision_files(desk, capsys):
    """A set of torchvision's whose files are there and broken is not downloaded over; its folder is named."""
    raw = desk / 'MNIST/raw'
    raw.mkdir(parents=True)
    for stem in ('train', 't10k'):
        (raw / f'{stem}-images-idx3-ubyte').write_bytes(np.array([2051, 100, 28, 28], '>i4').tobytes() + bytes(28 * 28 * 60))
        (raw / f'{stem}-labels-idx1-ubyte').write_bytes(np.array([2049, 100], '>i4').tobytes() + bytes(100))
    check('train --data mnist --data-root .', 'damaged under --data-root', desk, capsys)


# --- checkpoints ----------------------------------------------------------------------------------------------------------

class Bomb:
    """What runs a command when a careless program loads it."""

    def __reduce__(self):
        return os.mkdir, ('exploded',)


def edit(**changes):
    """Change entries of a checkpoint that is otherwise whole."""
    def action(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return action


def edit_run(change):
    """Change the state of the run in last.pt."""
    def action(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint['run'])
        torch.save(checkpoint, path)
    return action


NETWORK = {'num_classes': 3, 'channels': 1, 'width': 4}
FOREIGN = {  # what is done to a checkpoint
    'missing': Path.unlink,
    'a folder': lambda path: (path.unlink(), path.mkdir()),
    'empty': lambda path: path.write_bytes(b''),
    'cut': cut,
    'a pickle that runs code': lambda path: path.write_bytes(pickle.dumps({'weights': Bomb()})),
    'a checkpoint that runs code': edit(weights=Bomb()),
    'a whole module': lambda path: torch.save(EnergyModel(width=1), path),
    'a tensor': lambda path: torch.save(torch.zeros(3), path),
    'of other classes': edit(settings={**NETWORK, 'num_classes': 9}),
    'without weights': edit(weights=7),
}
RUNS = {
    'best.pt in its place': lambda path: shutil.copy(path.with_name('best.pt'), path),
    'of another network': edit_run(lambda run: run.update(model=EnergyModel(1, 1, 4).state_dict())),
    'without its reservoir': edit_run(lambda run: run['ranks'][0].pop('reservoir')),
    'of another reservoir': edit_run(lambda run: run['ranks'][0]['reservoir'].update(chains=torch.zeros(1))),
    'of no process': edit_run(lambda run: run['ranks'].clear()),
}


@pytest.mark.parametrize('script', ['generate', 'ood'])
@pytest.mark.parametrize('damage', FOREIGN)
def test_checkpoints(damage, script, desk, capsys):
    """Whatever is no checkpoint of ours is told, and no file can run code."""
    FOREIGN[damage](desk / 'run/best.pt')
    check(f'{script} --ckpt run/best.pt', 'run/best.pt: ... train', desk, capsys)
    assert not (desk / 'exploded').exists()


@pytest.mark.parametrize('damage', [*FOREIGN, *RUNS])
def test_runs(damage, desk, capsys):
    """Whatever is no run that can go on is told by --resume."""
    {**FOREIGN, **RUNS}[damage](desk / 'run/last.pt')
    check('train --resume --epochs 3 --out run', 'last.pt', desk, capsys)
    assert not (desk / 'exploded').exists()


def test_checkpoints_cut_anywhere(desk, capsys):
    """No length at which a checkpoint may have been cut makes it readable, or worse than unreadable."""
    content = (desk / 'run/best.pt').read_bytes()
    for length in np.random.default_rng(0).integers(len(content), size=25):
        (desk / 'run/best.pt').write_bytes(content[:length])
        check('generate --ckpt run/best.pt', 'run/best.pt: damaged', desk, capsys)


def test_classes_of_a_model_without(desk, capsys):
    """A plain EBM has no classes to ask for."""
    edit(class_names=[])(desk / 'run/best.pt')
    check('generate --ckpt run/best.pt --classes stand', '--classes: ... without classes; leave the flag out', desk, capsys)


# --- from outside ---------------------------------------------------------------------------------------------------------

def test_as_a_process(desk):
    """A mistake as an operating system sees it: status 2, nothing on stdout, one line on stderr."""
    before = snapshot(desk)
    done = subprocess.run([sys.executable, Path(generate.__file__), '--ckpt', 'note.txt'], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and snapshot(desk) == before
    assert done.stderr.startswith('generate.py: note.txt: damaged') and done.stderr.count('\n') == 1
