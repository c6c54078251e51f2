"""The script, whose file name Python cannot import, as the module virt_v2v_wrapper."""
import importlib.util
import inspect
import os
import sys

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
SCRIPT = os.path.join(ROOT, 'virt-v2v-wrapper.py')


def load(path):
    """Return the script at a path as a module, registered under a name that can be imported."""
    spec = importlib.util.spec_from_file_location('virt_v2v_wrapper', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def loading(path):
    """Return the text of a program that begins with the script at a path as "module"."""
    return LOADING.format(function=inspect.getsource(load), path=path)


LOADING = """\
import importlib.util
import sys

sys.dont_write_bytecode = True


{function}

module = load({path!r})
"""
