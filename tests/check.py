"""Check what students wrote, each task by itself, by the tests of the reference.

    python tests/check.py anna ben                 all tasks of two folders, each with data.py ...
    python tests/check.py class/* --tasks 3.3 -v   one task of a class, with what the tests say
    python tests/check.py --reference ORIGINAL DIR the reference is the project in ORIGINAL

THE CODE OF STUDENTS IS EXECUTED. Run this in a container, or in an account that can read and write
nothing of value.

For each student and task, the reference is copied to a temporary folder, and only the functions of
this task (TASKS in tests/student.py) are replaced by the student's; of a method, its whole class.
What else the student defined or imported in the file, and the reference does not have, comes along.
Then `pytest -m task33` runs there. So task 3.4 needs no task 3.2 of the student's, and no test of
the student's is ever run. Prints a row a student; check.csv also has the most frequent message of
each task. Linux and macOS only: a task that takes too long ends with all of its processes.
"""
import argparse
import ast
import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from student import PROJECT, TASKS, find, first_line, put_back


class NotChecked(Exception):
    """Why a student's file cannot be tested."""


def names_of(node):
    """The names that a statement at the top of a file defines."""
    if getattr(node, 'module', '') == '__future__':  # it may stand at the top of a file only
        return set()
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {name.asname or name.name.split('.')[0] for name in node.names}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return {part.id for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return {node.name} if hasattr(node, 'name') else set()


def combine(reference, student, file, names):
    """The text of the reference's file with the student's functions and what they need."""
    try:
        tree = ast.parse(student)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, 'lineno', None) or '?'
        raise NotChecked(f'{file} does not parse, line {line}') from error
    missing = [name for name in names if find(tree, name) is None]
    if missing:
        raise NotChecked(f'{file} lacks {", ".join(missing)}')
    own = ast.parse(reference)
    known = set().union(*map(names_of, own.body))
    lines = student.split('\n')
    added = []
    for node in tree.body:
        new, old = names_of(node) - known, names_of(node) & known
        if new and (isinstance(node, (ast.Import, ast.ImportFrom)) or not old):
            added += lines[first_line(node):node.end_lineno]
    text = put_back(reference, student, names).split('\n')
    start = min(first_line(find(own, name.split('.')[0])) for name in names)
    return '\n'.join([*text[:start], *added, *text[start:]])  # before the first function replaced


def run_tests(folder, task, limit):
    """pytest -m task33 in a folder: how it ended, and (test, message) of each failure."""
    files = [str(path) for path in (folder / 'tests').glob(f'test_{task.replace(".", "_")}_*.py')]
    command = [sys.executable, '-m', 'pytest', '-m', f'task{task.replace(".", "")}', *files,
               '-p', 'no:cacheprovider', '--junitxml=report.xml']
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise NotChecked(f'stopped after {limit:g} s') from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what the tests have started
        process.wait()
    report, failures = folder / 'report.xml', []
    cases = list(ElementTree.parse(report).iter('testcase')) if report.exists() else []
    for case in cases:
        for failure in [*case.findall('failure'), *case.findall('error')]:
            text = failure.text or failure.get('message', '')
            told = [line[1:].strip() for line in text.split('\n') if line.startswith('E ')]
            failures.append((case.get('name'), told[0] if told else text.split('\n')[0]))
    if status == 0 and cases:
        return 'passed', []
    if not failures:  # pytest did not come to its end
        raise NotChecked(f'exited with status {status} in the middle of a test')
    return f'failed {len(failures)} of {len(cases)}', failures


def check(reference, student, task, limit):
    """One task of a student: 'passed' or what is wrong, and (test, message) of each failure."""
    file, names = TASKS[task]
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / 'tests').mkdir()
            for path in [*reference.glob('*.py'), *reference.glob('tests/*.py')]:
                (folder / path.relative_to(reference)).write_bytes(path.read_bytes())
            if not (student / file).is_file():
                raise NotChecked(f'no {file}')
            text = combine((reference / file).read_text('utf-8'),
                           (student / file).read_text('utf-8-sig'), file, names)
            (folder / file).write_text(text, 'utf-8')
            return run_tests(folder, task, limit)
    except NotChecked as reason:
        return str(reason), []
    except (OSError, UnicodeError, ElementTree.ParseError) as error:
        return f'{file}: not readable ({" ".join(str(error).split())})', []


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag('students', type=Path, nargs='+', metavar='DIR', help='a folder for each student')
    flag('--reference', type=Path, default=PROJECT, help='the original (default: this project)')
    flag('--tasks', nargs='+', choices=TASKS, default=list(TASKS), metavar='TASK',
         help=f'which of {" ".join(TASKS)} (default: all)')
    flag('--limit', type=float, default=300, help='seconds for a task (default: 300)')
    flag('--jobs', type=int, default=1, help='tasks that are checked at a time (default: 1)')
    flag('--out', type=Path, default=Path('check.csv'), help='the table (default: check.csv)')
    flag('-v', '--verbose', action='store_true', help='print what the failing tests say')
    args = parser.parse_args(argv)
    if args.jobs < 1 or not args.limit > 0:
        parser.error('--jobs, --limit: name a number above 0')
    for folder in [args.reference / 'tests', *args.students]:
        if not folder.is_dir():
            parser.error(f'{folder}: no such folder; name a project')
    pool = ThreadPoolExecutor(args.jobs)
    try:
        with open(args.out, 'x', newline='', encoding='utf-8') as file:
            report(args, pool, file)
    except OSError as error:
        parser.error(f'--out {args.out}: cannot be written ({error.strerror}); name another file')
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)


def report(args, pool, file):
    """Check all students and write a row for each, as soon as it is known."""
    writer = csv.writer(file)
    writer.writerow(['student', *args.tasks, *(f'{task} says' for task in args.tasks)])
    rows = [[pool.submit(check, args.reference, student, task, args.limit) for task in args.tasks]
            for student in args.students]
    for student, row in zip(args.students, rows):
        results = [result.result() for result in row]
        said = [said for said, _ in results]
        print(student, *(f'{task} {text}' for task, text in zip(args.tasks, said)), sep='  ')
        counts = [Counter(message for _, message in failures) for _, failures in results]
        for task, count, (_, failures) in zip(args.tasks, counts, results):
            for message, times in count.most_common() if args.verbose else []:
                first = next(test for test, told in failures if told == message)
                print(f'    {task} {first}{f" and {times - 1} more" * (times > 1)}: {message}')
        writer.writerow([student, *said, *(count.most_common(1)[0][0] if count else ''
                                           for count in counts)])
        sys.stdout.flush()
        file.flush()


if __name__ == '__main__':
    main()
