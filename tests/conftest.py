"""What every test can use.

Importing this module loads the script, whose file name Python cannot import, as the module
virt_v2v_wrapper; test modules just import that, and the modules in harness/.
"""
import glob
import os
import pwd
import re
import shutil
import signal
import sys
import uuid

import hypothesis
import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'harness'))

import blackbox                             # noqa: E402
import processes                            # noqa: E402
import script                               # noqa: E402
from eventually import eventually           # noqa: E402

# Not pytest's own directory: that one is closed to the users that the wrapper runs as.
SCRATCH = '/var/tmp'


script.load(script.SCRIPT)

# How long an example takes says more about the machine than about the script.
hypothesis.settings.register_profile('tests', deadline=None)
hypothesis.settings.load_profile('tests')


def pytest_addoption(parser):
    """Have the option --promise."""
    parser.addoption('--promise', type=int, action='append', metavar='N',
                     help='only the tests of this promise of tests/README.md; may be repeated')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests that start the wrapper as root; leave out those of other promises."""
    for item in items:
        if 'root_wrapper' in getattr(item, 'fixturenames', ()):
            item.add_marker('root')
    wanted = config.getoption('promise')
    if wanted:
        others = [item for item in items if not wanted_of(item, wanted)]
        items[:] = [item for item in items if wanted_of(item, wanted)]
        config.hook.pytest_deselected(items=others)


def wanted_of(item, numbers):
    """Return those of the promises with these numbers that a test is about."""
    return {mark.args[0] for mark in item.iter_markers('promise')} & set(numbers)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Remember whether the test itself passed, for job_name."""
    report = (yield).get_result()
    if call.when == 'call':
        item.test_passed = report.passed


@pytest.fixture(autouse=True)
def job_name(request, monkeypatch):
    """Give the test a name for its processes; fail it if one of them outlives it."""
    name = 'v2vw-' + uuid.uuid4().hex
    monkeypatch.setenv(processes.MARK, name)
    yield name
    # A test that failed left its processes where they were; that is no second failure.
    passed = getattr(request.node, 'test_passed', False)
    survivors = wait_or_kill(name, 10 if passed else 0)
    directory = os.path.join(SCRATCH, name)
    if os.path.exists(directory):
        remove_temporary_files(directory)
        shutil.rmtree(directory)
    if survivors and passed:
        pytest.fail('the test left processes behind: %s' % survivors)


def remove_temporary_files(directory):
    """Remove what jobs that were killed with all their processes had to leave in /var/tmp."""
    for path in glob.glob(os.path.join(directory, '**', '*-wrapper.log'), recursive=True):
        if not os.path.isfile(path):        # a FIFO that a test has put there
            continue
        with open(path, encoding='utf-8', errors='replace') as stream:
            for scratch in re.findall(r'temporary files in (/var/tmp/v2v-[0-9a-f]{8})$',
                                      stream.read(), re.MULTILINE):
                shutil.rmtree(scratch, ignore_errors=True)


def wait_or_kill(name, seconds):
    """Wait until no process has the name; return those that had to be killed for that."""
    try:
        eventually(lambda: not processes.marked(name), 'every process has ended', seconds)
        return {}
    except AssertionError:
        survivors = processes.marked(name)
    eventually(lambda: not kill(processes.marked(name)), 'killed processes are gone')
    return survivors


def kill(found):
    """Kill those processes that are still there; return what was given."""
    for process in found:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return found


def make_wrapper(name, caller, user):
    """Return a Wrapper with a directory of its own, which job_name removes."""
    directory = os.path.join(SCRATCH, name)
    os.mkdir(directory)
    os.chmod(directory, 0o755)
    return blackbox.Wrapper(name, directory, caller, user)


@pytest.fixture
def wrapper(job_name):
    """The script, started and running as an ordinary user."""
    user = blackbox.ordinary_user()
    return make_wrapper(job_name, user, user)


@pytest.fixture
def root_wrapper(job_name):
    """The script, started as root, so that it becomes vdsm; skipped where that cannot be."""
    problem = blackbox.vdsm_problem()
    if problem:
        pytest.skip(problem)
    return make_wrapper(job_name, pwd.getpwuid(0), pwd.getpwnam('vdsm'))
