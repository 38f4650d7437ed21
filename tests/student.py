"""Write the exercise version: a copy of this project without the solutions of the course tasks.

    python tests/student.py --out exercise                    all tasks
    python tests/student.py --out exercise --tasks 3.2 3.3    these only, the others stay solved

A function of TASKS keeps its signature and docstring. Its body becomes a comment, with the shapes
on the way, and an error with the name of the task. All other text stays byte for byte. README.md
gets a table of the tasks below its title and loses what quotes a removed line: a paragraph, or of
code and tables the line. The lecturer's own files are not copied. The project itself is never
written to. tests/check.py checks what students return.
"""
import argparse
import ast
import re
import textwrap
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
TASKS = {  # file, and the functions that each task asks for
    '3.1': ('data.py', ['to_float', 'to_uint8', 'stretch', 'prepare', 'load_ood',
                        'draw_examples']),
    '3.2': ('model.py', ['swish_cnn', 'EnergyModel.get_logits', 'EnergyModel.forward',
                         'EnergyModel.energy', 'EnergyModel.energy_of_logits']),
    '3.3': ('sampler.py', ['sgld', 'chain_settings', 'temperature', 'prior', 'Reservoir.draw',
                           'Reservoir.store']),
    '3.4': ('train.py', ['px_step', 'l2_step', 'pyx_step', 'matching_step', 'train', 'perturb']),
    '3.5': ('generate.py', ['guided', 'samples', 'chain', 'interpolate']),
    '3.6': ('ood.py', ['all_scores', 'detection', 'find_threshold'])}
# Of these functions only some statements go: from the one that begins with the first text to the
# one that begins with the second. The third text says what the lines below need. Comments on lines
# of their own stay.
PARTS = {
    'load_ood': [('low, high = x.amin(', 'return to_uint8(made', 'Return the set as uint8.')],
    'train': [
        ('logits = model.get_logits(', 'if args.matching:',
         ('Give `loss`, a scalar, and `numbers`, a dict of the scalars: loss_pyx; with chains '
          'loss_px, loss_reg (times alpha), energy_real and energy_synth; with the matching '
          'term loss_matching (times its weight).')),
        ('optimizer.zero_grad()', 'loss.backward()', 'Give each weight the gradient of the loss.')],
    'samples': [('y, streams, z = start_samples(', 'x = draw(',
                 'Give x (N, C, H, W), the last states of the chains.')],
    'chain': [('states = draw(', 'e = torch.stack(',
               'Give the states at the steps `shown`, x, and their energies, e.')],
    'interpolate': [('z = rho.sqrt()', 'z = rho.sqrt()', 'Mix the starts z1 and z2.')]}
HINTS = {  # what a docstring does not say and the tests expect
    'swish_cnn': 'The first is a `FirstConv2d`. From (B, C, 56, 56) the convolutions give '
                 '(B, 32, 30, 30), (B, 64, 15, 15), (B, 128, 8, 8), (B, 128, 4, 4), '
                 '(B, 128, 2, 2).'}
COPIED = ['README.md', '.github/EXPERIMENTS.md', '.github/images/*.png', '*.py', 'requirements.txt',
          '.gitignore', 'tests/conftest.py', 'tests/hints.py', 'tests/test_3_*.py',
          'tests/test_files.py', 'tests/test_gpu.py', 'tests/test_mistakes.py',
          'tests/test_ranks.py', 'tests/test_runs.py', 'tests/faults.py']
SHAPE = re.compile(r'\s*([a-z][\w, ]*?),? = .*  # (?:\(.*-> )?(\([^()]*\)(?:, \([^()]*\)| both)*)')


def find(tree, name):
    """The node that defines `name`, which may be Class.method; None if there is none."""
    for part in name.split('.'):
        found = [node for node in getattr(tree, 'body', []) if getattr(node, 'name', '') == part]
        tree = found[-1] if found else None  # a later definition replaces an earlier one
    return tree


def first_line(node):
    """The number of a definition's first line, counted from 0, with its decorators."""
    return min(part.lineno for part in [node, *getattr(node, 'decorator_list', [])]) - 1


def holes(text, names):
    """The solutions in a script: (first line, line after the last one, name, hint), in order."""
    tree, lines, found = ast.parse(text), text.split('\n'), []
    for name in names:
        node = find(tree, name)
        statements = [part for part in ast.walk(node) if isinstance(part, ast.stmt)]
        for *texts, hint in PARTS.get(name, []):
            first, last = (next(part for part in statements
                                if lines[part.lineno - 1].strip().startswith(begin))
                           for begin in texts)
            found.append((first.lineno - 1, last.end_lineno, name, hint))
        if name not in PARTS:  # all that follows the docstring
            found.append((node.body[0].end_lineno, node.end_lineno, name, HINTS.get(name, '')))
    return sorted(found)


def take_out(text, task, names):
    """A script without the solutions of `names`, and the lines that were removed."""
    lines, removed = text.split('\n'), []
    for start, end, name, hint in reversed(holes(text, names)):
        solution = lines[start:end]
        removed += solution
        code = next(line for line in solution if squeeze(line))
        indent = code[:len(code) - len(code.lstrip())]
        labels = [line for line in solution if name in PARTS and not squeeze(line) and line]
        shapes = [f'{match[1]} {match[2]}' for match in map(SHAPE.match, solution) if match]
        comment = f'Task {task}. {hint}'.strip()
        if shapes:
            comment += f' Shapes on the way: {"; ".join(dict.fromkeys(shapes))}.'
        comment = re.sub(r'\([^()]*\)', lambda shape: shape[0].replace(' ', '\xa0'), comment)
        comment = textwrap.wrap(comment, 98 - len(indent))  # a shape is not broken
        lines[start:end] = [*(indent + label.strip() for label in labels),
                            *(f'{indent}# {line}'.replace('\xa0', ' ') for line in comment),
                            f"{indent}raise NotImplementedError('task {task}: {name}')"]
    return '\n'.join(lines), removed


def put_back(text, original, names):
    """A script with the definitions of `names` as in another one; of Class.method the whole class.
    The inverse of `take_out`."""
    lines, source = text.split('\n'), original.split('\n')
    tree, other = ast.parse(text), ast.parse(original)
    owners = {name.split('.')[0] for name in names}
    for name in sorted(owners, key=lambda name: -find(tree, name).lineno):  # from the end
        old, new = find(tree, name), find(other, name)
        lines[first_line(old):old.end_lineno] = source[first_line(new):new.end_lineno]
    return '\n'.join(lines)


def squeeze(line):
    """A line of code without its comment and its blanks."""
    return ''.join(line.split('  #')[0].split()) if line.strip()[:1] != '#' else ''


def without_quotes(readme, removed):
    """README.md without what quotes a line of at least 20 characters of the removed ones."""
    secrets = {code for code in map(squeeze, removed) if len(code) >= 20}

    def is_open(text):
        return not any(secret in ''.join(text.split()) for secret in secrets)

    blocks = []
    for block in readme.split('\n\n'):
        if block.startswith(('    ', '|')):  # code or a table: line by line
            block = '\n'.join(filter(is_open, block.split('\n')))
        blocks += [block] * is_open(block)
    return '\n\n'.join(blocks)


def write_exercise(out, tasks, project=PROJECT):
    """Write the exercise version of `project` into the new folder `out`."""
    files = {path.relative_to(project): path.read_bytes()
             for pattern in COPIED for path in sorted(project.glob(pattern))}
    all_removed = []
    for task in tasks:
        file, names = TASKS[task]
        text, removed = take_out(files[Path(file)].decode(), task, names)
        files[Path(file)] = text.encode()
        all_removed += removed
    readme = without_quotes(files[Path('README.md')].decode(), all_removed)
    # Pages for lecturers, results and lessons, which train models, stay with them: links become
    # plain text.
    readme = re.sub(r'\[([^\]]*)\]\(\.github/(?:TEACHING|RESULTS|lessons)[^)]*\)', r'\1', readme)
    title, rest = readme.split('\n', 1)
    todo = '\n'.join(f'| {task} | `{TASKS[task][0]}` | {", ".join(TASKS[task][1])} | '
                     f'`python -m pytest -m task{task.replace(".", "")}` |' for task in tasks)
    files[Path('README.md')] = (
        f'{title}\n\nThis is the exercise version. Write the functions below; their docstrings say '
        f'what they\ndo, and the last column checks a task.\n\n| task | file | functions | check |'
        f'\n|---|---|---|---|\n{todo}\n{rest}').encode()
    for path, content in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder to write, a new one')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS), metavar='TASK',
                        help=f'tasks to take out: {" ".join(TASKS)} (default: all)')
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f'--out {args.out}: exists; name a new folder')
    if args.out.resolve().is_relative_to(PROJECT):
        parser.error(f'--out {args.out}: lies in the project; name a folder outside of it')
    try:
        write_exercise(args.out, list(dict.fromkeys(args.tasks)))
    except OSError as error:
        parser.error(f'--out {args.out}: cannot be written ({error.strerror}); name another folder')
    print(f'{args.out}: without the solutions of {" ".join(args.tasks)}')


if __name__ == '__main__':
    main()
