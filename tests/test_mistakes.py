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
    """The folder we stand in: GLYPHS (a course folder), CHANGED (the same with two labels exchanged), LETTERS (class folders),
    runs on GLYPHS (run: two epochs; changed: a classifier of the other data; ebm: one of no classes), and what is mine."""
    shutil.copytree(glyphs, tmp_path / 'GLYPHS')
    shutil.copytree(trained, tmp_path / 'run')
    for name in 'ab':
        (tmp_path / 'LETTERS' / name).mkdir(parents=True)
        for i in range(10):
            Image.new('L', (20, 20), 20 * i).save(tmp_path / 'LETTERS' / name / f'{i}.png')
    shutil.copytree(glyphs, tmp_path / 'CHANGED')
    images, labels = bars(60, 0)
    save(tmp_path / 'CHANGED/train.npy', images, labels[[1, 0, *range(2, 60)]])
    checkpoint = torch.load(trained / 'best.pt', weights_only=True)
    other = {**checkpoint, 'args': {**checkpoint['args'], 'px_weight': 0.},
             'signature': {**checkpoint['signature'], 'brightness': [0., 0., 0.]}}
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
train --data GLYPHS --epochs 0                          | --epochs: '0' is not a whole number from 1
train --data GLYPHS --epochs -3                         | --epochs: '-3' is not a whole number from 1
train --data GLYPHS --epochs 1e3                        | --epochs: '1e3' is not a whole number
train --data GLYPHS --epochs 99999999999999999999       | --epochs ... is not a whole number from 1 to 2147483648
train --data GLYPHS --epoch 3                           | --epoch
train --data GLYPHS --batch-size 0                      | --batch-size: '0' is not a whole number from 1
train --data GLYPHS --batch-size 2.5                    | --batch-size: '2.5' is not a whole number from 1
train --data GLYPHS --batch-size 61                     | --batch-size 61: more than the 60 training images; make it smaller
train --data GLYPHS --sgld-steps 0                      | --sgld-steps: '0' is not a whole number from 1
train --data GLYPHS --reservoir 0                       | --reservoir: '0' is not a whole number from 1
train --data GLYPHS --reservoir 2147483648              | not enough memory; make ... --reservoir ... smaller
train --data GLYPHS --width 0                           | --width: '0' is not a whole number from 1
train --data GLYPHS --width 2000000                     | not enough memory; make ... --width ... smaller
train --data GLYPHS --image-size 8                      | --image-size: '8' is not a whole number from 16
train --data GLYPHS --image-size -56                    | --image-size: '-56' is not a whole number from 16
train --data GLYPHS --image-size 2000000                | --image-size
train --data GLYPHS --warmup 0                          | --warmup: '0' is not a whole number from 1
train --data GLYPHS --picture-every 0                   | --picture-every: '0' is not a whole number from 1
train --data GLYPHS --lr 0                              | --lr: '0' is not a number from
train --data GLYPHS --lr -1                             | --lr: '-1' is not a number from
train --data GLYPHS --lr nan                            | --lr: 'nan' is not a number from
train --data GLYPHS --lr inf                            | --lr: 'inf' is not a number from
train --data GLYPHS --lr fast                           | --lr: 'fast' is not a number from
train --data GLYPHS --lr 1e300                          | --lr: '1e300' is not a number from 1e-09 to 1e+38
train --data GLYPHS --lr-decay 1.5                      | --lr-decay: '1.5' is not a number from
train --data GLYPHS --clip-norm 0                       | --clip-norm: '0' is not a number from
train --data GLYPHS --step-size 0                       | --step-size: '0' is not a number from
train --data GLYPHS --noise -.1                         | --noise: '-.1' is not a number from 0
train --data GLYPHS --data-noise -1                     | --data-noise: '-1' is not a number from 0
train --data GLYPHS --alpha -1                          | --alpha: '-1' is not a number from 0
train --data GLYPHS --reinit 2                          | --reinit: '2' is not a number from 0 to 1
train --data GLYPHS --ema -1                            | --ema: '-1' is not a number from 0
train --data GLYPHS --px-weight -1                      | --px-weight: '-1' is not a number from 0
train --data GLYPHS --px-weight 0 --pyx-weight 0        | --px-weight ... --pyx-weight
train --data GLYPHS --init magic                        | --init: invalid choice: 'magic' (choose from
train --data GLYPHS --model gan                         | --model: invalid choice: 'gan' (choose from
train --data GLYPHS --model ebm --conditional           | --model ebm has no labels: leave out --conditional
train --data GLYPHS --seed -1                           | --seed: '-1' is not a whole number from 0
train --data GLYPHS --device tpu                        | --device: 'tpu' is none of auto, cpu, cuda
train --data GLYPHS --device cuda:99                    | --device: 'cuda:99' is not on this machine; use --device auto
train --data GLYPHS --precision fp8                     | --precision: invalid choice: 'fp8' (choose from
train --data nowhere                                    | --data nowhere: no such folder ... letterpress, digits, mnist
train --data GLYPHS/val.npy                             | --data GLYPHS/val.npy: no such folder
train --data letterpress --data-root note.txt           | note.txt ... cannot be written ... name another folder
train --data mnist --data-root note.txt                 | mnist: missing or damaged under --data-root note.txt
train --data GLYPHS --out note.txt                      | --out ... note.txt is a file; name a folder
train --data GLYPHS --out note.txt/new                  | --out ... note.txt is a file; name a folder
train --data GLYPHS --out run                           | --out run: best.pt is there already ... --resume ... --overwrite
train --data GLYPHS --out mine                          | --out mine: curves.png is there already ... another --out
train --data LETTERS --out LETTERS                      | --out LETTERS: lies in ... LETTERS ... read as data; name another
train --data LETTERS --out LETTERS/new/run              | --out LETTERS/new/run: lies in ... read as data; name another
train --data LONG                                       | LONG: File name too long; name another
train --data GLYPHS --out LONG                          | LONG ... File name too long; name another
train --data loop                                       | --data loop: no such folder
generate --ckpt run/best.pt --mode denoise --start loop | loop
train --data GLYPHS --out loop                          | loop: File exists; name another
train --data GLYPHS --out run --overwrite --width 2000000 | not enough memory
train --data GLYPHS --out run --resume --overwrite      | --resume and --overwrite exclude each other
train --out run --resume --width 6                      | --width: the run in run has 4 ... leave the flag out
train --out run --resume --seed 1                       | --seed: the run in run has 0 ... leave the flag out
train --out run --resume --lr .5                        | --lr: the run in run has ... leave the flag out
train --out run --resume --image-size 24                | --image-size: the run in run has 16 ... leave the flag out
train --out run --resume --model ebm                    | --model: the run in run has jem ... leave the flag out
train --out run --resume --data digits                  | last.pt: --data digits is not what this run was trained on
train --out run --resume --epochs 3 --data CHANGED      | last.pt: --data ... CHANGED is not what this run was trained on
train --out run --resume --epochs 1                     | --epochs 1: the run in run has 2
train --out new --resume                                | no last.pt in new; start without --resume
generate                                                | arguments are required: --ckpt
generate --ckpt run/best.pt --mode video                | --mode: invalid choice: 'video' (choose from
generate --ckpt run/best.pt --count 0                   | --count: '0' is not a whole number from 1
generate --ckpt run/best.pt --count 2147483648          | --count: '2147483648' is not a whole number from 1
generate --ckpt run/best.pt --steps 0                   | --steps: '0' is not a whole number from 1
generate --ckpt run/best.pt --step-size 0               | --step-size: '0' is not a number from
generate --ckpt run/best.pt --noise -1                  | --noise: '-1' is not a number from 0
generate --ckpt run/best.pt --classes                   | --classes: expected at least one argument
generate --ckpt run/best.pt --classes stand zebra       | --classes zebra: no such class; choose from stand lie lean
generate --ckpt run/best.pt --classes 3                 | --classes 3: no such class; choose from stand lie lean
generate --ckpt run/best.pt --device cuda:99            | --device: 'cuda:99' is not on this machine; use --device auto
generate --ckpt run/best.pt --guidance -1               | --guidance: '-1' is not a number from 0
generate --ckpt run/best.pt --mode denoise --start nowhere | nowhere
generate --ckpt run/best.pt --mode denoise --start note.txt | note.txt: not readable as an image
generate --ckpt run/best.pt --mode denoise --strengths 0 | --strengths: '0' is not a number from
generate --ckpt run/best.pt --mode denoise --images 0   | --images: '0' is not a whole number from 1
generate --ckpt run/best.pt --mode inpaint --mask Left  | --mask Left: no such image, and none of left, centre
generate --ckpt run/best.pt --mode inpaint --mask LETTERS | --mask LETTERS: no such image, and none of left, centre
generate --ckpt run/best.pt --mode inpaint --mask LETTERS/a/0.png | --mask LETTERS/a/0.png: all of one colour; make it white
generate --ckpt run/best.pt --start LETTERS             | --start: the mode samples has no use for it; leave the flag out
generate --ckpt run/best.pt --mode interpolate --noise .1 | --noise: the mode interpolate has no use for it
generate --ckpt run/best.pt --mode evaluate --classes lie | --classes: the mode evaluate has no use for it
generate --ckpt run/best.pt --mode concepts --gif       | --gif: the mode concepts has no use for it
generate --ckpt run/best.pt --mode denoise --start mine/denoise.npy --out mine | --start mine/denoise.npy: would be overwritten
generate --ckpt run/best.pt --mode denoise --start LETTERS --out LETTERS/a | --out LETTERS/a: lies in LETTERS
generate --ckpt run/best.pt --mode denoise --data CHANGED | --data CHANGED: its images or labels are not those
generate --ckpt run/best.pt --mode evaluate --judge changed/best.pt | --judge changed/best.pt: not trained on the data of
generate --ckpt ebm/best.pt --mode evaluate             | --mode evaluate: ebm/best.pt is a plain EBM, without classes
generate --ckpt run/best.pt --mode compose              | --mode compose: name two classes with --classes
generate --ckpt run/best.pt --mode compose --ckpt2 note.txt | note.txt: not a checkpoint
generate --ckpt run/best.pt --mode evaluate             | --mode evaluate: name an independent classifier with --judge
generate --ckpt run/best.pt --out note.txt              | --out ... note.txt is a file; name a folder
ood --ckpt run/best.pt --ood zebras                     | --ood zebras: ... choose from ood_ta
ood --ckpt run/best.pt --ood note.txt                   | note.txt: not readable as an image
ood --ckpt run/best.pt --ood GLYPHS                     | GLYPHS: no images here
ood --ckpt run/best.pt --judge nowhere                  | nowhere
ood --ckpt run/best.pt --judge LETTERS --ood noise      | --judge gives verdicts ... leave out --ood
ood --ckpt run/best.pt --ood LETTERS --out LETTERS      | --out LETTERS: lies in LETTERS
ood --ckpt run/best.pt --data CHANGED                   | --data CHANGED: its images or labels are not those
ood --ckpt ebm/best.pt --data CHANGED                   | --data CHANGED: its images or labels are not those
ood --ckpt run/best.pt --baseline note.txt              | note.txt: not a checkpoint
ood --ckpt run/best.pt --baseline run/last.pt           | --baseline run/last.pt: no plain classifier ... --px-weight 0
ood --ckpt run/best.pt --baseline changed/best.pt       | --baseline changed/best.pt: no plain classifier
ood --ckpt run/best.pt --trust --attacked 0             | --attacked: '0' is not a whole number from 1
ood --ckpt run/best.pt --ood                            | --ood: expected at least one argument
ood --ckpt run/best.pt --data nowhere                   | --data nowhere: no such folder
ood --ckpt run/best.pt --data LETTERS                   | --data LETTERS: its channels or classes are not those
ood --ckpt run/best.pt --data digits                    | --data digits: its channels or classes are not those
ood --ckpt run/best.pt --seed x                         | --seed: 'x' is not a whole number from 0
ood --ckpt run/best.pt --out note.txt/new               | --out ... note.txt is a file; name a folder
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
                       'one class only, and a JEM needs two; use --model ebm'),
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
    'one class': (lambda f: shutil.rmtree(f / 'b'), 'one class only, and a JEM needs two; use --model ebm'),
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
    check('train --data mnist --data-root .', 'damaged under --data-root . ... remove what is broken', desk, capsys)


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


NONE, OTHER = 'not a checkpoint: it cannot be read as one; train one', 'written by another program or version; train one'
UNFIT, NETWORK = 'do not fit its settings', {'num_classes': 3, 'channels': 1, 'width': 4}
FOREIGN = {  # what is done to a checkpoint, and what is said of it
    'a folder': (lambda path: (path.unlink(), path.mkdir()), NONE),
    'empty': (lambda path: path.write_bytes(b''), NONE),
    'text': (lambda path: path.write_text('weights'), NONE),
    'cut': (cut, NONE),
    'cut at the end': (lambda path: cut(path, .9999), NONE),
    'a pickle that runs code': (lambda path: path.write_bytes(pickle.dumps({'format': 1, 'weights': Bomb()})), NONE),
    'a checkpoint that runs code': (edit(weights=Bomb()), NONE),
    'a whole module': (lambda path: torch.save(EnergyModel(width=1), path), NONE),
    'a tensor': (lambda path: torch.save(torch.zeros(3), path), OTHER),
    'bare weights': (lambda path: torch.save(EnergyModel(width=1).state_dict(), path), OTHER),
    'a version to come': (edit(format=99), OTHER),
    'a number, no more': (lambda path: torch.save({'format': 1}, path), OTHER),
}
DAMAGED = {
    'missing': (Path.unlink, 'not a checkpoint: no such file; train one'),
    'of other classes': (edit(settings={**NETWORK, 'num_classes': 9}), UNFIT),
    'of other channels': (edit(settings={**NETWORK, 'channels': 3}), UNFIT),
    'of no network': (edit(settings={**NETWORK, 'width': -4}), UNFIT),
    'without weights': (edit(weights=7), UNFIT),
    'of NaN': (edit(weights={key: value * np.nan for key, value in EnergyModel(**NETWORK).state_dict().items()}),
               'weights are not finite ... lower --lr'),
}
RUNS = {
    'missing': (Path.unlink, 'no last.pt in run; start without --resume'),
    'best.pt in its place': (lambda path: shutil.copy(path.with_name('best.pt'), path), 'last.pt ... --out'),
    'of another network': (edit_run(lambda run: run.update(model=EnergyModel(1, 1, 4).state_dict())), 'last.pt ... --out'),
    'without its reservoir': (edit_run(lambda run: run['ranks'][0].pop('reservoir')), 'last.pt ... --out'),
    'of another reservoir': (edit_run(lambda run: run['ranks'][0]['reservoir'].update(chains=torch.zeros(1))),
                             'last.pt ... --out'),
    'of no process': (edit_run(lambda run: run['ranks'].clear()), 'last.pt ... --out'),
    'of NaN': (edit_run(lambda run: run['model']['head.bias'].fill_(np.nan)), 'last.pt ... --out'),
}


@pytest.mark.parametrize('script', ['generate', 'ood'])
@pytest.mark.parametrize('damage', [*FOREIGN, *DAMAGED])
def test_checkpoints(damage, script, desk, capsys):
    """Whatever is no checkpoint of ours is told, and no file can run code."""
    action, answer = {**FOREIGN, **DAMAGED}[damage]
    action(desk / 'run/best.pt')
    check(f'{script} --ckpt run/best.pt', f'run/best.pt: ... {answer}', desk, capsys)
    assert not (desk / 'exploded').exists()


@pytest.mark.parametrize('damage', [*FOREIGN, *RUNS])
def test_runs(damage, desk, capsys):
    """Whatever is no run that can go on is told by --resume."""
    action, answer = {**FOREIGN, **RUNS}[damage]
    action(desk / 'run/last.pt')
    check('train --resume --epochs 3 --out run', answer, desk, capsys)
    assert not (desk / 'exploded').exists()


def test_checkpoints_cut_anywhere(desk, capsys):
    """No length at which a checkpoint may have been cut makes it readable, or worse than unreadable."""
    content = (desk / 'run/best.pt').read_bytes()
    for length in np.random.default_rng(0).integers(len(content), size=25):
        (desk / 'run/best.pt').write_bytes(content[:length])
        check('generate --ckpt run/best.pt', f'run/best.pt: {NONE}', desk, capsys)


def test_energies_of_other_data(desk, capsys):
    """A model of colour images, and the grey data it was never trained on."""
    model = EnergyModel(3, channels=3, width=4)
    edit(settings=model.settings, weights=model.state_dict())(desk / 'run/best.pt')
    check('ood --ckpt run/best.pt', 'its channels or classes are not those', desk, capsys)


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
    assert done.stderr == f'generate.py: note.txt: {NONE} with python train.py\n'
