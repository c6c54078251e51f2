"""The rooms of the script, as its comments divide it, and the functions in them.

Tests that break a function find it here, so that no name is in a test that the script may lose.
"""
import ast
import collections
import functools
import re

from script import SCRIPT

with open(SCRIPT, encoding='utf-8') as stream:
    SOURCE = stream.read()


@functools.lru_cache(maxsize=None)
def rooms():
    """Return {name of a room: syntax trees of what is in it}, in the order of the script."""
    starts = [(SOURCE.count('\n', 0, match.end()), match.group(1))
              for match in re.finditer(r'^# --- (\w+)', SOURCE, re.MULTILINE)]
    found = collections.OrderedDict((name, []) for _, name in starts)
    for node in ast.parse(SOURCE).body:
        names = [name for line, name in starts if line < node.lineno]
        if names:
            found[names[-1]].append(node)
    return found


def functions(*names):
    """Return the functions ("f" or "Class.f") that are defined in these rooms."""
    found = []
    for name in names:
        for node in rooms()[name]:
            if isinstance(node, ast.FunctionDef):
                found.append(node.name)
            elif isinstance(node, ast.ClassDef):
                found += [node.name + '.' + method.name for method in node.body
                          if isinstance(method, ast.FunctionDef)
                          and (method.name == '__init__' or not method.name.startswith('__'))]
    return found


def is_public(function):
    """Say whether no part of the name says that it is for its room alone."""
    return not any(part.startswith('_') and part != '__init__' for part in function.split('.'))


def called(nodes, function):
    """Say whether syntax trees have the name of a function in them, as it would be called."""
    owner, _, name = function.rpartition('.')
    kind, field = (ast.Attribute, 'attr') if owner and name != '__init__' else (ast.Name, 'id')
    wanted = owner if name == '__init__' else name
    return any(isinstance(part, kind) and getattr(part, field) == wanted
               for node in nodes for part in ast.walk(node))


def boundary(*names):
    """Return those functions of these rooms that the rooms below them call."""
    order = list(rooms())
    found = []
    for name in names:
        below = [node for other in order[order.index(name) + 1:] for node in rooms()[other]]
        found += [function for function in functions(name)
                  if is_public(function) and called(below, function)]
    return found
