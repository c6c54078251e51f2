"""The tests themselves: each promise has some, and they keep to the rules of tests/README.md."""
import ast
import collections
import functools
import glob
import os
import re

import pytest

import rooms
from faults import tamper
from script import ROOT, TESTS

MODULES = sorted(glob.glob(os.path.join(TESTS, '*', 'test_*.py')))
ALL = sorted(glob.glob(os.path.join(TESTS, '**', '*.py'), recursive=True))


def read(path):
    """Return the text of a file."""
    with open(path, encoding='utf-8') as stream:
        return stream.read()


def tree(path):
    """Return the syntax tree of a file."""
    return ast.parse(read(path))


def named_tests(node):
    """Return the functions in a syntax tree that pytest takes for tests."""
    return [part for part in ast.walk(node)
            if isinstance(part, ast.FunctionDef) and part.name.startswith('test')]


# --- promises ----------------------------------------------------------------------------

def promises_in(nodes):
    """Return the numbers of the marks "promise" in syntax trees."""
    return [ast.literal_eval(part.args[0]) for node in nodes for part in ast.walk(node)
            if isinstance(part, ast.Call) and getattr(part.func, 'attr', None) == 'promise']


@functools.lru_cache(maxsize=None)
def promised():
    """Return {number of a promise: names of its tests}."""
    found = collections.defaultdict(set)
    for module in map(tree, MODULES):
        scopes = [(module, [node.value for node in module.body if isinstance(node, ast.Assign)
                            and getattr(node.targets[0], 'id', None) == 'pytestmark'])]
        scopes += [(node, node.decorator_list) for node in ast.walk(module)
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        for scope, marks in scopes:
            for number in promises_in(marks):
                found[number].update(test.name for test in named_tests(scope))
    return found


def numbers():
    """Return the numbers of the promises in the table of tests/README.md."""
    return [int(number) for number in re.findall(
        r'^\| (\d+) \|', read(os.path.join(TESTS, 'README.md')), re.MULTILINE)]


def test_each_promise_has_tests():
    assert [number for number in numbers() if not promised().get(number)] == []


def test_each_mark_is_of_a_promise():
    assert numbers() == list(range(1, len(numbers()) + 1))
    assert set(promised()) == set(numbers())


def test_each_promise_of_the_readme_has_a_number():
    """They are the first ones, in the order of the README."""
    _, _, rest = read(os.path.join(ROOT, 'README.md')).partition('\n## What it promises\n')
    listed = re.findall(r'^(?:\*|-|\d+\.) ', rest.partition('\n## ')[0], re.MULTILINE)
    assert 0 < len(listed) <= len(numbers())


# --- rules -------------------------------------------------------------------------------

def test_names_are_short():
    assert [test.name for path in MODULES for test in named_tests(tree(path))
            if len(test.name) > 60] == []


def imported(path):
    """Return the names of the modules that a file imports."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or '')
    return found


def test_nothing_imports_a_test_module():
    names = {os.path.basename(path)[:-len('.py')] for path in MODULES}
    assert [(os.path.relpath(path, TESTS), name) for path in ALL for name in imported(path)
            if name.rpartition('.')[2] in names] == []


# --- tampering ---------------------------------------------------------------------------

class Tampered:
    """What tamper() needs of a wrapper."""

    script = None

    def __init__(self, directory):
        self.directory = str(directory)


@pytest.mark.parametrize('changes', [
    'module.nothing_of_this_name = None',
    'def change(function=module.nothing_of_this_name):\n    pass',
    'module.Secret.nothing_of_this_name = None',
    'module.Secret.store = module.nothing_of_this_name.reveal'])
def test_what_is_tampered_with_has_to_be_there(tmp_path, changes):
    wrapper = Tampered(tmp_path)
    with pytest.raises(AssertionError) as caught:
        tamper(wrapper, changes)
    assert 'nothing_of_this_name' in str(caught.value)
    assert (wrapper.script, os.listdir(wrapper.directory)) == (None, [])


@pytest.mark.parametrize('name', rooms.functions(*rooms.rooms()))
def test_what_is_found_in_the_script_can_be_tampered_with(tmp_path, name):
    wrapper = Tampered(tmp_path)
    tamper(wrapper, 'module.{0} = module.{0}'.format(name))
    assert wrapper.script is not None


def test_other_rooms_call_something_in_most_rooms():
    """So there is something for a fault to be injected at."""
    found = {name: rooms.boundary(name) for name in rooms.rooms()}
    assert len([name for name in found if found[name]]) >= len(found) / 2
