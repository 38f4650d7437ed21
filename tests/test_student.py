"""The exercise version (student.py) gives no solution away, and what students return is checked
task by task (check.py)."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import check
import student
from student import PROJECT, TASKS, find, put_back

ALL = [(task, file, name) for task, (file, names) in TASKS.items() for name in names]
# A line is trivial if it has fewer than 20 characters without its blanks (`return x`, `try:`), if
# it imports a library, or if it is one of these phrases of every PyTorch program.
PHRASES = {'optimizer.zero_grad()', 'x.requires_grad_(True)'}


@pytest.fixture(scope='module')
def exercise(tmp_path_factory):
    """The exercise version of all tasks."""
    out = tmp_path_factory.mktemp('exercise') / 'all'
    student.main(['--out', str(out)])
    return out


def code_of(line):
    """A line without its comment and its blanks."""
    return ''.join(re.sub(r'(^|\s)\s*# .*', '', line).split())


def solution_lines(file, names):
    """The lines of a script that are gone once `names` are taken out, without trivial ones."""
    text = (PROJECT / file).read_text()
    lines = [code_of(line) for line in student.take_out(text, '', names)[1]]
    return {line for line in lines
            if len(line) >= 20 and line not in PHRASES and not re.match('from|import', line)}


# --- the exercise version -------------------------------------------------------------------------

@pytest.mark.parametrize('task', TASKS)
def test_no_line_of_a_solution_survives(exercise, task):
    """Nowhere in the copy: not in another function, a test or the README, nor broken over lines."""
    lines = solution_lines(*TASKS[task])
    assert len(lines) >= 8  # else the rule above lets everything through
    for path in filter(Path.is_file, exercise.rglob('*')):
        if path.suffix != '.png':
            text = ''.join(map(code_of, path.read_text().split('\n')))
            found = [line for line in lines if line in text]
            assert not found, f'{path.relative_to(exercise)} still has {found}'


@pytest.mark.parametrize('task, file, name', ALL, ids=[name for *_, name in ALL])
def test_signature_and_docstring_stay(exercise, task, file, name):
    """A function still has both, and raises an error with the name of its task and its own."""
    before, after = (find(ast.parse((folder / file).read_text()), name)
                     for folder in (PROJECT, exercise))
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before) and ast.get_docstring(before) == ast.get_docstring(after)
    errors = [ast.unparse(node.exc) for node in ast.walk(after) if isinstance(node, ast.Raise)]
    assert f"NotImplementedError('task {task}: {name}')" in errors
    if name not in student.PARTS:
        assert len(errors) == 1 and len(after.body) == 2  # the docstring and the error


@pytest.mark.parametrize('task', TASKS)
def test_solutions_put_back_give_the_original(exercise, task, tmp_path):
    """Byte for byte, so its tests are green again, and so does the check of the task. Beside the
    script nothing but README differs, and with --tasks the other scripts are the originals."""
    file, names = TASKS[task]
    original = (PROJECT / file).read_bytes()
    taken_out = (exercise / file).read_bytes().decode()
    assert taken_out.encode() != original
    solved = put_back(taken_out, original.decode(), names)
    assert solved.encode() == original
    assert check.combine(original.decode(), solved, file, names) == solved
    assert check.combine(original.decode(), taken_out, file, names) == taken_out
    student.main(['--out', str(tmp_path / 'one'), '--tasks', task])
    copies = [path.relative_to(exercise) for path in exercise.rglob('*') if path.is_file()]
    changed = [str(path) for path in copies
               if (tmp_path / 'one' / path).read_bytes() != (PROJECT / path).read_bytes()]
    assert sorted(changed) == sorted(['README.md', file])


def test_the_update_and_the_core_of_each_mode_are_gone(exercise):
    """Where only a part of a function goes, the calls that are its solution have gone with it."""
    calls = {'train': 'get_logits energy_of_logits pyx_step draw sample store energy px_step '
                      'l2_step ways_to_noise matching_step zero_grad backward',
             'samples': 'draw guided', 'chain': 'draw stack', 'load_ood': 'stretch',
             'interpolate': ''}
    assert calls.keys() == student.PARTS.keys()
    for _, file, name in ALL:
        if name in calls:
            node = find(ast.parse((exercise / file).read_text()), name)
            tree = ast.walk(next((n for n in ast.walk(node) if isinstance(n, ast.While)), node))
            left = {getattr(n.func, 'attr', getattr(n.func, 'id', '')) for n in tree
                    if isinstance(n, ast.Call)}
            assert not left & set(calls[name].split()), f'{name} still calls {left}'


def test_the_lecturers_files_stay_at_home(exercise):
    """They hold the solutions, or mistakes in them."""
    names = {str(path.relative_to(exercise)) for path in exercise.rglob('*') if path.is_file()}
    assert {'README.md', '.gitignore', 'tests/conftest.py', 'tests/test_3_3_sampler.py'} <= names
    assert not {name for name in names
                if re.search(r'student|check\.py|planted|experiments|bench|TEACHING|pycache', name)}
    for link in re.findall(r'\]\(([^):#]+)[)#]', (exercise / 'README.md').read_text()):
        assert (exercise / link).exists(), link


def test_readme_quotes_no_solution():
    """A paragraph that quotes a removed line is left out, of code and tables only the line."""
    solution = '    return energy_real.mean() - energy_synth.mean()  # scalar'
    text = ('Gap.\n\nThe line `return energy_real.mean() -\nenergy_synth.mean()` is it.\n\n'
            f'    python train.py\n{solution}\n\n| px_step |\n| `{solution.strip()}` |\n\nEnd.\n')
    left = student.without_quotes(text, [solution])
    assert left == 'Gap.\n\n    python train.py\n\n| px_step |\n\nEnd.\n'
    assert student.without_quotes(text, []) == text


def start_pytest(folder, *words):
    """A process of pytest in a folder."""
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '--tb=line', *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_tests_fail_by_the_name_of_their_task(exercise, tmp_path):
    """One test of each marker. Those of 3.5 need a trained model, so only 3.5 is taken out there;
    one run does for all the others."""
    quick = 'range_mapping or fresh_energies or one_step_is or losses_by_hand or scores_by_hand'
    others = [task for task in TASKS if task != '3.5']
    markers = ' or '.join(f'task{task.replace(".", "")}' for task in others)
    files = [str(path) for path in sorted((exercise / 'tests').glob('test_3_*.py'))]
    student.main(['--out', str(tmp_path / 'one'), '--tasks', '3.5'])
    processes = [start_pytest(exercise, '-m', markers, '-k', quick, *files),  # side by side
                 start_pytest(tmp_path / 'one', '-m', 'task35', '-x', '-k', 'chain_starts',
                              'tests/test_3_5_generate.py')]
    said, said_of_one = [process.communicate()[0] for process in processes]
    for task in others:
        assert f'NotImplementedError: task {task}: ' in said, said
    assert 'passed' not in said
    assert 'NotImplementedError: task 3.5: ' in said_of_one, said_of_one


def test_folders_that_exist_are_refused(exercise, refused, tmp_path):
    """In one line, and nothing is written, also not into the project."""
    assert '--out' in refused(student.main, '--out', exercise)
    assert 'lies in the project' in refused(student.main, '--out', PROJECT / 'tests' / 'new')
    (tmp_path / 'file').touch()
    assert 'cannot be written' in refused(student.main, '--out', tmp_path / 'file' / 'new')
    assert '3.7' in refused(student.main, '--out', tmp_path / 'new', '--tasks', '3.7')
    assert not (PROJECT / 'tests' / 'new').exists() and not (tmp_path / 'new').exists()


# --- the check ------------------------------------------------------------------------------------

CONFTEST = '''
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_configure(config):
    config.addinivalue_line('markers', 'task33: of task 3.3')
'''
TEST = '''
import pytest
import sampler

pytestmark = pytest.mark.task33


def test_halves():
    assert sampler.halve(4) == 2, f'{sampler.halve(4)} instead of 2: is it divided twice?'


def test_others_are_the_references():
    assert sampler.LIMIT == 7 and sampler.rest() == 'reference'
'''
SAMPLER = '''"""A sampler."""
LIMIT = 7


def rest():
    return 'reference'


def halve(x):
    """x / 2."""
    return x / 2


class Chain:
    def draw(self):
        return halve(LIMIT)
'''
OWN = '''import math
LIMIT, UNUSED = 99, 1
TWO = 2
def rest():
    return 'the student'
@staticmethod
def helper(x):
    return math.floor(x / TWO)
def halve(x):
    return helper(x)
class Chain:
    draw = None
'''
SAYS = {  # what a student wrote: the row that it gets
    SAMPLER: 'passed',
    OWN.replace('draw = None', 'def draw(self): return 1'): 'passed',
    SAMPLER.replace('x / 2', 'x / 4'): 'failed 1 of 2',
    SAMPLER.replace('return x / 2', 'return exit(0)'): 'failed 1 of 2',
    SAMPLER.replace('return x / 2', 'import os; os._exit(0)'): 'exited with status 0',
    SAMPLER.replace('return x / 2', 'raise KeyboardInterrupt'): 'exited with status 2',
    SAMPLER.replace('x / 2', 'LATER'): 'failed 1 of 2',
    SAMPLER.replace('return x / 2', 'return (x'): 'sampler.py does not parse, line 11',
    SAMPLER.replace('halve', 'half'): 'sampler.py lacks halve',
    OWN: 'sampler.py lacks Chain.draw',
    'return \0': 'sampler.py does not parse',
    '': 'no sampler.py'}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A reference whose tests take no time, and a function that makes a student's folder."""
    monkeypatch.setitem(TASKS, '3.3', ('sampler.py', ['halve', 'Chain.draw']))
    monkeypatch.chdir(tmp_path)

    def make(name, text, tests):
        (tmp_path / name / 'tests').mkdir(parents=True)
        if text:
            (tmp_path / name / 'sampler.py').write_text(text)
        (tmp_path / name / 'tests' / 'test_3_3_sampler.py').write_text(tests)
        (tmp_path / name / 'tests' / 'conftest.py').write_text(CONFTEST)
        return name

    make('reference', SAMPLER, TEST)
    return make


def test_every_student_gets_a_row(toy, capsys):
    """With a helper, a constant and an import of his own he passes; a mistake is named, and so is
    what cannot be tested. His own tests, which pass always, are not run."""
    folders = [toy(f's{i}', text, 'def test(): pass') for i, text in enumerate(SAYS)]
    check.main(['--reference', 'reference', *folders, '--tasks', '3.3', '-v', '--jobs', '2'])
    printed = capsys.readouterr().out
    rows = Path('check.csv').read_text().split('\n')
    assert rows[0].strip() == 'student,3.3,3.3 says'
    for folder, row, said in zip(folders, rows[1:], SAYS.values(), strict=False):
        assert f'{folder}  3.3 {said}' in printed and f'{folder},{said}' in row.replace('"', '')
    message = '1.0 instead of 2: is it divided twice?'
    assert f'test_halves: AssertionError: {message}' in printed and message in rows[3]
    assert 'SystemExit' in rows[4] and 'LATER' in rows[7]


def test_endless_loops_are_stopped(toy, capsys):
    """After --limit seconds, with all processes of the test."""
    folder = toy('carl', SAMPLER.replace('return x / 2', 'while True: pass'), TEST)
    check.main(['--reference', 'reference', folder, '--tasks', '3.3', '--limit', '1.5'])
    assert 'carl  3.3 stopped after 1.5 s' in capsys.readouterr().out


def test_a_task_needs_no_other_task(exercise, tmp_path, capsys):
    """Of a student who has written only task 3.3, it passes by the tests of this project."""
    file, names = TASKS['3.3']
    text = put_back((exercise / file).read_text(), (PROJECT / file).read_text(), names)
    (tmp_path / file).write_text(text)
    out = tmp_path / 'check.csv'
    check.main([str(tmp_path), '--tasks', '3.3', '3.6', '--out', str(out)])
    assert '3.3 passed  3.6 no ood.py' in capsys.readouterr().out


def test_mistakes_of_the_lecturer_are_told(toy, refused):
    """In one line that names the folder or the flag."""
    folder = toy('anna', SAMPLER, TEST)
    assert 'nobody' in refused(check.main, 'nobody')
    assert 'elsewhere' in refused(check.main, folder, '--reference', 'elsewhere')
    assert '--jobs' in refused(check.main, folder, '--jobs', 0)
    assert '--out' in refused(check.main, folder, '--out', 'no/such/folder.csv')
    Path('old.csv').write_text('precious')
    assert 'old.csv' in refused(check.main, folder, '--out', 'old.csv')
    assert Path('old.csv').read_text() == 'precious'
