"""The schemas of request and state in tests/schema/, and what is not as they say."""
import json
import os

from script import TESTS

try:
    from jsonschema import Draft202012Validator
except ImportError:     # with Python 3.6, which no version of it with this draft supports
    Draft202012Validator = None


def read_json(path):
    """Return what a JSON file has."""
    with open(path, encoding='utf-8') as stream:
        return json.load(stream)


def schema(name):
    """Return the schema of that name, "request" or "state"."""
    return read_json(os.path.join(TESTS, 'schema', name + '.json'))


VALIDATORS = {name: Draft202012Validator(schema(name)) for name in ('request', 'state')
              } if Draft202012Validator else {}


def violations(name, value):
    """Return a line for each part of a value that is not as its schema says."""
    return ['{}: {}'.format(error.json_path, error.message)
            for error in VALIDATORS[name].iter_errors(value)]


def valid_state(state):
    """Return a state. AssertionError if it is not as the schema says, where that can be told."""
    found = violations('state', state) if VALIDATORS else []
    assert not found, '\n'.join(['the state is not as tests/schema/state.json says'] + found)
    return state


def read_state(path):
    """Return the contents of a state file, which are as the schema says."""
    return valid_state(read_json(path))
