"""What a user can get wrong, through the real command lines.

Every mistake ends with exit status 2 and one line that names the flag or the file, without a
traceback, a warning or a changed file. Only lines that tell what data.py took or left out may stand
before it. In the tables ` ... ` in an answer stands for any words. All commands are given in the
same folder, see `desk`. What a script alone can be told wrongly stands in the tests of its task.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import data
import generate
import model
import ood
import train
from conftest import QUICK, bars

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
    """The folder we stand in: GLYPHS (a course folder), FEWER (with fewer images), LETTERS (class
    folders), run (two epochs on GLYPHS), ebm.pt (a checkpoint without classes) and own files."""
    shutil.copytree(glyphs, tmp_path / 'GLYPHS')
    shutil.copytree(glyphs, tmp_path / 'FEWER')
    save(tmp_path / 'FEWER/train.npy', *bars(30, 0))
    for name in 'ab':
        (tmp_path / 'LETTERS' / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'LETTERS' / name / f'{i}.png')
    shutil.copytree(trained, tmp_path / 'run')
    checkpoint = torch.load(trained / 'best.pt', weights_only=True)
    torch.save({**checkpoint, 'class_names': []}, tmp_path / 'ebm.pt')
    (tmp_path / 'own').mkdir()
    save(tmp_path / 'own/denoise.npy', IMAGES)
    Image.new('L', (20, 20)).save(tmp_path / 'own/curves.png')
    (tmp_path / 'note.txt').write_text('own')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    """Every file and folder below `folder`, files with their bytes if they may be read."""
    return {path: path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
            for path in folder.rglob('*')}


def check(command, answer, desk, capsys):
    """Give `command` on the desk and hold its end against the rules above."""
    script, *words = shlex.split(command)
    main, quick = SCRIPTS[script]
    before = snapshot(desk)
    capsys.readouterr()  # what fixtures printed
    with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as stop:
        warnings.simplefilter('always')
        main([*quick, *words])
    said = re.sub('.*\r', '', capsys.readouterr().err).strip()  # without bars that were wiped
    *notes, line = said.split('\n')
    assert all(re.search('entries left out|folders are classes', note) for note in notes), said
    assert stop.value.code == 2 and not re.search('\r|Traceback', line), said
    assert re.search('.*'.join(map(re.escape, answer.split(' ... '))), line), line
    assert not warned and snapshot(desk) == before, 'warnings, or files changed'


# --- flags ----------------------------------------------------------------------------------------

FLAGS = '''
train --data GLYPHS --epochs 1e3                               | --epochs ... '1e3'
train --data GLYPHS --epochs 0                                 | --epochs: 0
train --data GLYPHS --image-size 8                             | --image-size: 8
train --data GLYPHS --lr 1e300                                 | --lr: 1e300
train --data GLYPHS --reinit 1.5                               | --reinit: 1.5
train --data GLYPHS --step-size 0                              | --step-size: 0
train --data GLYPHS --step-size inf                            | --step-size: inf
train --data GLYPHS --grad-clip 0                              | --grad-clip: 0
train --data GLYPHS --init magic                               | --init ... 'magic' ... reservoir
train --data GLYPHS --batch-size 61                            | --batch-size ... 60
train --data GLYPHS --width 99999999999999999999               | --width: 9999 ... 10000000
train --data GLYPHS --width 2000000 --out run --overwrite      | memory ... --width ... allocate
train --data GLYPHS --px-weight 0 --pyx-weight 0               | --px-weight ... --pyx-weight
train --data GLYPHS --contrast 0 --matching 0 --pyx-weight 0   | --contrast, --matching ... out
train --data GLYPHS --model ebm --contrast 0 --matching 0      | --contrast, --matching ... out
train --data GLYPHS --contrast -1                              | --contrast: -1
train --data GLYPHS --chains-after 1.5                         | --chains-after ... '1.5'
train --data GLYPHS --chains-after 60                          | --chains-after ... --contrast 0
train --data GLYPHS --model ebm --conditional                  | --model ebm ... --conditional
train --data GLYPHS --model ebm --px-weight 0                  | --model ebm ... --px-weight 0
train --data GLYPHS --out run --resume --overwrite             | --overwrite ... --resume
train --data nowhere --out run --overwrite                     | --data nowhere ... letterpress
train --data GLYPHS --out run --overwrite --batch-size 61      | --batch-size
train --data GLYPHS --out own                                  | own/curves.png ... --overwrite
train --data GLYPHS --out note.txt/new                         | note.txt/new
train --data LETTERS --out LETTERS/new/run --batch-size 8      | --out ... LETTERS/new/run: lies in
train --data GLYPHS/val.npy                                    | --data GLYPHS/val.npy
train --data letterpress --data-root note.txt                  | note.txt ... cannot be written
train --data FEWER --out run --resume --epochs 3               | --data ... FEWER
train --out run --resume --epochs 1                            | --epochs 1: this run has 2
generate                                                       | --ckpt
generate --ckpt ebm.pt --classes stand                         | --classes ... EBM
generate --ckpt ebm.pt --mode evaluate --judge run/best.pt     | --mode evaluate
generate --ckpt run/best.pt --mode evaluate                    | --judge
generate --ckpt run/best.pt --mode inpaint --start own/denoise.npy --guidance 2 | --guidance
generate --ckpt run/best.pt --mode denoise --start nowhere     | nowhere
generate --ckpt run/best.pt --mode denoise --start note.txt    | note.txt
generate --ckpt run/best.pt --mode inpaint --start .           | --out ... lies in .
generate --ckpt run/best.pt --mode denoise --start own/denoise.npy --out own | --start own/
generate --ckpt run/best.pt --mode inpaint --mask Left         | --mask Left ... left
generate --ckpt run/best.pt --mode inpaint --mask own/curves.png | --mask own/curves.png
generate --ckpt run/best.pt --data FEWER --mode inpaint        | --data FEWER ... counts
ood --ckpt run/best.pt --data FEWER                            | --data FEWER ... counts
ood --ckpt run/best.pt --ood zebras                            | --ood zebras ... ood_ta
ood --ckpt run/best.pt --ood GLYPHS                            | GLYPHS ... no images
ood --ckpt run/best.pt --ood LETTERS --out LETTERS             | --out ... LETTERS: lies in LETTERS
ood --ckpt run/best.pt --check nowhere                         | nowhere
ood --ckpt run/best.pt --check LETTERS --ood noise             | --check ... --ood
'''.strip().splitlines()


@pytest.mark.parametrize('row', FLAGS, ids=lambda row: ' '.join(row.split('|')[0].split()))
def test_flags(row, desk, capsys):
    """A flag out of range, of another kind, against another flag, or with a wrong path."""
    command, answer = row.split('|')
    check(command, answer.strip(), desk, capsys)


# --- data -----------------------------------------------------------------------------------------

def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[:7 * len(content) // 10])


def with_value(value):
    """IMAGES with one pixel of this value."""
    images = IMAGES.copy()
    images[3, 4, 5] = value
    return images


def relabel(folder, labels):
    """Three splits of IMAGES with these labels, without names."""
    for part in ('train', 'val', 'test'):
        save(folder / f'{part}.npy', IMAGES, labels)
    (folder / 'classes.txt').unlink()


def split(folder, *parts):
    """LETTERS inside folders with the names of splits."""
    for part in parts:
        shutil.copytree(folder, folder.parent / 'inside' / part)
    shutil.rmtree(folder)
    (folder.parent / 'inside').rename(folder)


def blank(folder):
    """Give every image of LETTERS a single level."""
    for path in folder.rglob('*.png'):
        Image.new('L', (20, 20), 99).save(path)


def keep(folder, count):
    """Leave `count` images in a class folder."""
    for path in sorted(folder.iterdir())[count:]:
        path.unlink()


VAL = {  # what is done to the file, and what is said of it
    'text': (lambda f: f.write_text('a picture of an a\n' * 99), 'not readable ... save images'),
    'cut': (cut, 'not readable ... save images'),
    'one array': (lambda f: save(f, IMAGES), '(6, 20, 20); save ... labels'),
    'objects': (lambda f: save(f, IMAGES.astype(object), LABELS), 'pickle ... save images'),
    'complex numbers': (lambda f: save(f, IMAGES + 1j, LABELS), 'complex ... save'),
    'flat images': (lambda f: save(f, IMAGES.reshape(6, 400), LABELS), '(6, 400) ... save images'),
    'two channels': (lambda f: save(f, np.stack([IMAGES] * 2, 3), LABELS), '20, 2) ... save'),
    'no images': (lambda f: save(f, IMAGES[:0], LABELS[:0]), '(0, 20, 20) ... save'),
    'a NaN': (lambda f: save(f, with_value(np.nan), LABELS), 'finite'),
    'beyond float32': (lambda f: save(f, with_value(1e300), LABELS), 'finite'),
    'labels: negative': (lambda f: save(f, IMAGES, LABELS - 1), 'label -1; ... 0, 1'),
    'labels: fractions': (lambda f: save(f, IMAGES, LABELS / 2), 'label 0.5; ... 0, 1'),
    'labels: too few': (lambda f: save(f, IMAGES, LABELS[:5]), 'labels ... (5,)'),
}
GLYPHS = {
    'no training split': (lambda f: (f / 'train.npy').unlink(),
                          'GLYPHS/test.npy: ... no training split ... add one'),
    'labels with a gap': (lambda f: relabel(f, LABELS * 2), 'train ... class 1 ... without a gap'),
    'labels of val beyond train': (lambda f: save(f / 'val.npy', IMAGES, LABELS + 1),
                                   'val has labels up to 3, but train has 3 classes; number'),
    'huge labels': (lambda f: save(f / 'val.npy', IMAGES, LABELS + 2 ** 40), 'val has labels'),
    'a single class': (lambda f: relabel(f, LABELS * 0), 'one class only ... --model ebm'),
    'OOD images cut': (lambda f: cut(f / 'ood_ta.npy'), 'ood_ta.npy: not readable ... save images'),
    'a name twice': (lambda f: (f / 'classes.txt').write_text('lie\nlie\nlean\n'), 'classes.txt'),
    'names in Latin-1': (lambda f: (f / 'classes.txt').write_bytes(b'st\xe4nd\nlie\nlean\n'),
                         'classes.txt: ... UTF-8'),
}
LETTERS = {
    'no class folder': (lambda f: (shutil.rmtree(f), f.mkdir()), 'LETTERS ... class folder'),
    'no images in a class': (lambda f: keep(f / 'b', 0), 'LETTERS/b: no images'),
    'seven in a class': (lambda f: keep(f / 'b', 7), 'class b has 7 ... add some'),
    'a text': (lambda f: (f / 'b/5.png').write_text('no picture'), 'b/5.png: not readable'),
    'a cut image': (lambda f: cut(f / 'b/5.png'), 'b/5.png: not readable'),
    'a NaN': (lambda f: Image.fromarray(np.full((9, 9), np.nan, 'f4')).save(f / 'b/x.tif'),
              'b/x.tif: ... finite'),
    'a page too large': (lambda f: (f / 'b/x.pgm').write_bytes(b'P5 99999 99999 255\n'),
                         'b/x.pgm: ... pixels'),
    'all of one grey': (lambda f: blank(f), '20 of the 20 train images are blank'),
    'another class in val': (lambda f: (split(f, 'train', 'val', 'test'),
                                        (f / 'val/b').rename(f / 'val/c')), 'val/c: a class'),
}
DAMAGES = {'GLYPHS/val.npy': VAL, 'GLYPHS': GLYPHS, 'LETTERS': LETTERS}


@pytest.mark.parametrize('path, kind', [(path, kind) for path in DAMAGES for kind in DAMAGES[path]])
def test_data(path, kind, desk, capsys):
    """Data sets that are not what they should be: the file or the folder is named."""
    action, answer = DAMAGES[path][kind]
    action(desk / path)
    if path == 'GLYPHS/val.npy':
        answer = f'{path}: ... {answer}'
    check(f'train --data {path.split("/")[0]} --batch-size 4', answer, desk, capsys)


def test_folders_that_are_taken_for_classes(desk, capsys):
    """Splits under unusual names would become classes: a line says what the classes are."""
    (desk / 'LETTERS/a').rename(desk / 'LETTERS/trainset')
    (desk / 'LETTERS/b').rename(desk / 'LETTERS/testset')
    assert data.load_data('LETTERS', 16).class_names == ['testset', 'trainset']
    assert "LETTERS: no splits, so folders are classes: ['testset', 'trainset']" in (
        capsys.readouterr().err)


def test_damaged_torchvision_files(desk, capsys):
    """A set of torchvision's whose files are there and broken is not downloaded over them."""
    raw = desk / 'MNIST/raw'
    raw.mkdir(parents=True)
    head = np.array([2051, 100, 28, 28], '>i4').tobytes()  # of 100 images, of which 40 are missing
    for stem in ('train', 't10k'):
        (raw / f'{stem}-images-idx3-ubyte').write_bytes(head + bytes(60 * 28 * 28))
        (raw / f'{stem}-labels-idx1-ubyte').write_bytes(bytes(8))
    check('train --data mnist --data-root .', 'mnist: ... damaged ... --data-root', desk, capsys)


@pytest.mark.parametrize('path, mode, command, answer', [
    ('GLYPHS/val.npy', 0o200, 'train --data GLYPHS', 'GLYPHS/val.npy: ... Permission denied'),
    ('own', 0o500, 'train --data GLYPHS --out own/new', 'own/new/last.pt: cannot be written'),
    ('own', 0o500, 'generate --ckpt run/best.pt --out own', '--out own')])
def test_without_permission(path, mode, command, answer, desk, capsys):
    """What may not be read or not be written into is named."""
    (desk / path).chmod(mode)
    if os.access(desk / path, os.R_OK | os.W_OK):
        pytest.skip('the administrator may read and write everything')
    try:
        check(command, answer, desk, capsys)
    finally:
        (desk / path).chmod(0o700)


# --- checkpoints ----------------------------------------------------------------------------------

class Bomb:
    """What runs a command when a careless program loads it."""

    def __reduce__(self):
        return os.mkdir, ('exploded',)  # a changed file for `check`


@pytest.mark.parametrize('content', [{'weights': Bomb()}, [7]], ids=['bomb', 'list'])
@pytest.mark.parametrize('command', [
    'train --resume --out own', 'generate --ckpt own/last.pt', 'ood --ckpt own/last.pt',
    'generate --ckpt run/best.pt --mode evaluate --judge own/last.pt',
    'generate --ckpt run/best.pt --mode compose --ckpt2 own/last.pt',
    'ood --ckpt run/best.pt --baseline own/last.pt'])
def test_every_flag_that_reads_a_checkpoint(command, content, desk, capsys):
    """Whatever is no checkpoint of ours is told, and no file can run code."""
    torch.save(content, desk / 'own/last.pt')
    check(command, 'own/last.pt: damaged', desk, capsys)


RUNS = {  # what is done to the run in last.pt
    'none, as in best.pt': lambda checkpoint: checkpoint.update(run=None),
    'another reservoir': lambda checkpoint: checkpoint['run']['ranks'][0]['reservoir'].clear(),
    'weights of another network': lambda checkpoint: checkpoint['run']['model'].popitem(),
}


@pytest.mark.parametrize('damage', RUNS)
def test_checkpoints_that_hold_no_run(damage, desk, capsys):
    """A checkpoint may be whole and --resume have nothing to go on with."""
    checkpoint = torch.load(desk / 'run/last.pt', weights_only=True)
    RUNS[damage](checkpoint)
    torch.save(checkpoint, desk / 'run/last.pt')
    check('train --resume --epochs 3 --out run', 'run/last.pt ... --overwrite', desk, capsys)


# --- from outside ---------------------------------------------------------------------------------

def test_as_a_process(desk):
    """As an operating system sees it: status 2, nothing on stdout, one line on stderr."""
    before = snapshot(desk)
    done = subprocess.run([sys.executable, generate.__file__, '--ckpt', 'note.txt', *CPU],
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and snapshot(desk) == before
    assert re.fullmatch('generate.py: note.txt: damaged.*\n', done.stderr), done.stderr


def test_a_notebook_that_calls_the_script(desk):
    """`!python generate.py` there inherits a matplotlib backend that may not be installed."""
    backend = 'module://matplotlib_inline.backend_inline'
    done = subprocess.run([sys.executable, generate.__file__, '--ckpt', 'run/best.pt', *CPU,
                           '--count', '1', '--steps', '2'], capture_output=True, text=True,
                          env={**os.environ, 'MPLBACKEND': backend})
    assert done.returncode == 0, done.stderr


def test_names_in_any_alphabet(desk):
    """Where the output cannot hold a letter, as in a file on Windows, it is written as a code."""
    (desk / 'LETTERS/a/0.png').rename(desk / 'ſ.png')
    done = subprocess.run([sys.executable, ood.__file__, '--ckpt', 'run/best.pt', *CPU,
                           '--check', 'ſ.png'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONIOENCODING': 'cp1252'})
    assert done.returncode == 0 and r'\u017f.png' in done.stdout, done.stderr


@pytest.mark.parametrize('cores, threads, asked, left', [
    (4, 4, None, [3]), (2, 2, None, [1]), (1, 1, None, []), (4, 2, None, []), (4, 4, '4', [])])
def test_a_core_is_left_to_other_programs(cores, threads, asked, left, monkeypatch, desk):
    """Threads wait for each other. One that shares its core with another program holds up all of
    them, up to 25 times: so not all cores get a thread, unless the user wants it."""
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    if asked:
        monkeypatch.setenv('OMP_NUM_THREADS', asked)
    chosen = []
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    train.parse_args([*QUICK, '--data', 'GLYPHS'])
    assert chosen == left


@pytest.mark.parametrize('gpus, name, told', [(1, 'auto', 1), (0, 'auto', 0), (1, 'cpu', 0)])
def test_a_gpu_that_does_not_compute_is_told(gpus, name, told, monkeypatch, capsys):
    """An old driver, or a torch without kernels for this GPU: a line says that the CPU is used."""
    ones = torch.ones

    def broken(size, device):
        if device != 'cpu':
            raise RuntimeError('no kernel image is available for execution on the device')
        return ones(size)

    monkeypatch.setattr(torch, 'ones', broken)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    assert model.choose_device(name) == torch.device('cpu')
    assert capsys.readouterr().err.count('does not fit this torch or its driver') == told


# --- silent faults --------------------------------------------------------------------------------

@pytest.mark.parametrize('gap, seen', [(0., True), (-1e-9, False), (None, False)])
def test_a_collapsed_network_is_trouble(gap, seen):
    """Data and samples have the very same energy where a network has become constant, also before
    the guard looks at the gap. A run without chains has no gap."""
    args = train.parse_args([*QUICK])
    row = {'loss': 2.3} if gap is None else {'loss': 2.3, 'loss_px': gap}
    trouble = train.find_trouble(row, {'updates': [], 'step': 39}, args)
    assert ('all energies are equal' in trouble) == seen and bool(trouble) == seen


def test_a_class_without_validation_images_is_levelled():
    """Its level is that of all validation images; the others get the median 0 of their own."""
    torch.manual_seed(0)
    network, args = model.EnergyModel(3, 1, 4, .1), train.parse_args([*QUICK])
    network.head.bias.data = torch.tensor([5., -3., 9.])
    images = torch.randint(256, (9, 1, 16, 16), dtype=torch.uint8)
    split = data.Split(images, torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0]))
    x, y = split.batch(slice(None))
    with torch.no_grad():
        before = network.get_logits(x)  # (9, 3)
        told = before.gather(1, y[:, None]).squeeze(1)  # (9,)
        train.validate(network, split, args)
        after = network.get_logits(x)
    for k, level in enumerate([told[y == 0].median(), told[y == 1].median(), told.median()]):
        torch.testing.assert_close(after[:, k], before[:, k] - level)


def test_experts_of_two_temperatures_are_composed_as_laws(desk, monkeypatch):
    """The product of exp(-E1 / T1) and exp(-E2 / T2) is that of E1 + T1 / T2 E2 at T1."""
    checkpoint = torch.load('run/best.pt', weights_only=True)
    checkpoint['settings']['temperature'] *= 4
    torch.save(checkpoint, 'hot.pt')
    caught = []

    def draw(energy, start, args, streams):
        caught.append((energy, start))
        raise data.DataError('enough')

    monkeypatch.setattr(generate, 'draw', draw)
    with pytest.raises(SystemExit):
        generate.main([*CPU, '--precision', 'fp32', '--ckpt', 'run/best.pt', '--mode', 'compose',
                       '--ckpt2', 'hot.pt', '--classes', 'lie', 'lean', '--count', '2'])
    (energy, x), = caught  # x (10, 1, 16, 16): two each of 1, 2, 1 and 2, 1 or 2, 1 not 2
    network, _ = model.load_model('run/best.pt')
    e1, e2 = network.energy(x[4:6], 1), network.energy(x[4:6], 2) / 4  # (2,) both
    torch.testing.assert_close(energy(x[4:6], torch.tensor([4, 5])), e1 + e2)
