"""The README is true: its examples, commands and tables are those of the script."""
import collections
import functools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess

import pytest
import virt_v2v_wrapper as script

from blackbox import ABSENT, become
from eventually import eventually
from faults import guardian
from readme import HEADINGS, README, block, blocks
from schemas import VALIDATORS, schema, violations
from script import ROOT
from virt_v2v import bar, copying, die, error, phase, source, wait

STAGES = ['started', 'failed']
# What of the messages in the table of troubles is not the script's own.
OF_OTHERS = {'incorrect user name or password', 'No space left on device',
             'No such file or directory'}
# An example that is not named here is one that no test looks at.
TESTED = (['start', 'start-prompt', 'ssh', 'wait', 'show', 'cancel', 'alive', 'logs', 'tmpfiles',
           'sudoers', 'forty', 'request', 'answer', 'errors']
          + ['state ' + stage for stage in STAGES])
# Constants of the script, and how the README gives each of them.
CONSTANTS = {'MAX_REQUEST': 'at most {} bytes', 'MAX_TEXT': 'at most {} bytes',
             'STOP_GRACE': '{:.0f} s later', 'VDSM_LOG_DIR': '| `{}` |',
             'VDSM_STATE_DIR': '| `{}` |', 'VDDK_LIBDIR': '| `{}` |', 'MOUNT_POINT': '`{}`',
             'TEMPORARY_DIR': '`{}/v2v-', 'MAX_MESSAGE': 'at most {} characters',
             'START_PATIENCE': 'A start has {:.0f} s', 'END_PATIENCE': 'gets {:.0f} s to end'}


# --- reading the README ------------------------------------------------------------------

def example(name):
    """Return the value of the JSON block with that name."""
    return json.loads(block(name), object_pairs_hook=collections.OrderedDict)


def table(header):
    """Return the rows, as lists of cells, of the table whose header begins so."""
    lines = README[README.index('\n' + header) + 1:].split('\n\n')[0].splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def quoted(cell):
    """Return what is in backquotes."""
    return re.findall('`([^`]+)`', cell)


def first_cells(header):
    """Return what is in backquotes in the first column of a table."""
    return [text for row in table(header) for text in quoted(row[0])]


def test_every_example_is_tested():
    assert sorted(name for name, _ in blocks()) == sorted(TESTED)


# --- tables and constants ----------------------------------------------------------------

def test_the_request_table_has_the_keys_of_the_script():
    assert first_cells('| key | needed') == list(script._RULES)


def test_the_request_table_says_what_is_needed():
    needed = [row[1] for row in table('| key | needed')]
    assert needed == ['yes' if rule.default is script._MANDATORY else 'no'
                      for rule in script._RULES.values()]


def test_the_request_table_has_the_defaults():
    defaults = [row[3] for row in table('| key | needed')]
    assert defaults == [
        '' if rule.default is script._MANDATORY else '`%s`' % json.dumps(rule.default)
        for rule in script._RULES.values()]


def test_the_option_table_has_the_options_of_the_script(capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(['--help'])
    known = set(re.findall(r'--[a-z][a-z-]*', capsys.readouterr().out))
    directories = [quoted(row[3])[0] for row in table('| what | as')]
    assert directories == ['--' + name.replace('_', '-') for name in script.Options._fields
                           if name.endswith('dir')]
    commands = {text for text in first_cells('| command |') if text.startswith('--')}
    assert known == set(directories) | commands | {'--help', '--version', '--json'}
    assert [option for option in known if '`%s`' % option not in README] == []


def test_the_exit_statuses_are_those_of_the_script():
    statuses = {value for name, value in vars(script).items() if name.startswith('EXIT_')}
    assert {int(number) for row in table('| exit status |')
            for number in row[0].split(',')} == statuses


@pytest.mark.parametrize('name', sorted(CONSTANTS))
def test_limits_and_places_are_those_of_the_script(name):
    assert CONSTANTS[name].format(getattr(script, name)) in README


def test_the_files_it_names_are_there():
    named = re.findall(r'`(?:sudo )?(tests/[\w./-]+)', README)
    assert named
    assert [path for path in named if not os.path.exists(os.path.join(ROOT, path))] == []


def test_the_quick_start_commands_can_be_executed():
    commands = re.findall('`(?:sudo )?(tests/(?:run|lab/demo))[` ]', README)
    assert set(commands) == {'tests/lab/demo', 'tests/run'}
    assert all(os.access(os.path.join(ROOT, command), os.X_OK) for command in commands)


def test_the_messages_in_the_table_of_troubles_are_real():
    with open(script.__file__, encoding='utf-8') as stream:
        source_text = re.sub(r"'\s*\n\s*'", '', stream.read())
    parts = [part.strip() for text in first_cells('| message | cause')
             for part in re.split(r'\.\.\.|: |SIGKILL', text)]
    assert [part for part in parts if part not in source_text and part not in OF_OTHERS] == []


# --- its form ----------------------------------------------------------------------------

def test_the_promises_are_numbered():
    text = README.partition('## What it promises')[2].partition('\n## ')[0]
    assert re.findall(r'^([0-9]+)\. ', text, re.M) == [str(n) for n in range(1, 13)]


def test_it_is_short():
    assert len(README.splitlines()) <= 400
    assert max(map(len, README.splitlines())) <= 120


def anchor(heading):
    """Return the name by which a heading is linked to."""
    return re.sub('[^a-z0-9 -]', '', heading.lower()).replace(' ', '-')


def test_the_table_of_contents_has_all_headings():
    links = re.findall(r'\[([^]]+)\]\(#([^)]+)\)', README.partition('## ')[0])
    assert links == [(heading, anchor(heading)) for heading in HEADINGS]


def test_the_links_lead_to_headings():
    assert set(re.findall(r'\]\(#([^)]+)\)', README)) <= set(map(anchor, HEADINGS))


# --- schemas -----------------------------------------------------------------------------

@pytest.mark.skipif(not VALIDATORS, reason='needs jsonschema 4')
@pytest.mark.parametrize('name', ['request'] + ['state ' + stage for stage in STAGES])
def test_an_example_is_as_its_schema_says(name):
    assert violations(name.split()[0], example(name)) == []


# --- request and answer ------------------------------------------------------------------

def test_the_example_of_a_request_is_valid_and_has_all_keys():
    request = script.parse_request(block('request').encode('utf-8'))
    assert request.ignored == ()
    assert set(example('request')) >= {
        rule.key for rule in script._SOURCE_KEYS['vddk'] + script._TARGET_KEYS['export_domain']} - {
            'vmware_password_file'}


def without_numbers(paths):
    """Return {key: file name} with each number replaced."""
    return {key: re.sub(r'\d+', 'N', os.path.basename(path)) for key, path in paths.items()}


def test_the_example_of_an_answer_is_like_a_real_one(wrapper):
    answer = json.loads(wrapper.start().stdout.decode(),
                        object_pairs_hook=collections.OrderedDict)
    assert list(example('answer')) == ['wrapper_log', 'v2v_log', 'state_file']
    assert without_numbers(example('answer')) == without_numbers(answer)


def errors(first, end):
    """Return some lines of the examples of errors."""
    return ''.join(block('errors').splitlines(True)[first:end])


def test_the_examples_of_a_wrong_request_are_real(wrapper):
    job = wrapper.start(wrapper.request(vmware_uri='esx://root:password@esx.example.com',
                                        vmware_password=ABSENT, vmware_pasword='password',
                                        vmware_fingerprint='0A:0B'))
    assert (job.status, job.stderr.decode()) == (script.EXIT_REQUEST, errors(0, 4))


def test_the_examples_of_a_host_that_cannot_are_real(wrapper):
    job = wrapper.start(wrapper.request(export_domain=wrapper.home), '--log-dir', wrapper.log_dir,
                        '--state-dir', wrapper.state_dir, '--vddk-libdir', '/nonexistent',
                        environment={'PATH': wrapper.home})
    assert (job.status, job.stderr.decode()) == (script.EXIT_HOST, errors(4, 7))


# --- the state file ----------------------------------------------------------------------

def scenario(stage, disks):
    """Return what virt-v2v does up to that stage of a conversion of the disks."""
    if stage == 'started':
        return [wait('end')]
    return [phase('Opening the source'), [source(disk) for disk in disks],
            copying(1, len(disks)), bar(12), die(signal.SIGKILL)]


REACHED = {
    'started': lambda state: True,
    'failed': lambda state: 'finished' in state,
}


def real_state(wrapper, stage):
    """Return the state of a job in that stage, with the disks of the example."""
    disks = [disk['path'] for disk in example('state ' + stage)['disks']]
    wrapper.virt_v2v.play(scenario(stage, disks))
    job = wrapper.start(wrapper.request(source_disks=disks))
    job.wait_state(REACHED[stage], stage)
    with open(job.paths.state_file, encoding='utf-8') as stream:
        state = json.load(stream, object_pairs_hook=collections.OrderedDict)
    wrapper.virt_v2v.let('end')
    job.wait_finished()
    return state


def shape(value):
    """Return keys, in their order, and types."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        is_time = re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', value)
        return 'time' if is_time else 'string'
    return 'number'


@pytest.mark.parametrize('stage', STAGES)
def test_the_example_of_a_state_is_like_a_real_one(wrapper, stage):
    assert shape(example('state ' + stage)) == shape(real_state(wrapper, stage))


def test_the_state_table_has_the_keys_of_the_schema():
    assert set(first_cells('| key | there')) == set(schema('state')['properties'])


def test_the_state_table_says_what_is_always_there():
    always = [key for row in table('| key | there') if row[1] == 'always'
              for key in quoted(row[0])]
    assert set(always) == set(example('state started')) == set(schema('state')['required'])


# --- commands for a shell ----------------------------------------------------------------

class Shell:
    """Runs the README's commands as the wrapper's user, in its home, with the script on PATH."""

    def __init__(self, wrapper):
        self._wrapper = wrapper
        self._path = ':'.join([wrapper.virt_v2v.bin, os.path.dirname(shutil.which('jq')),
                               '/usr/bin', '/bin'])
        command = ' '.join(map(shlex.quote, wrapper.command()))
        wrapper.add_program('virt-v2v-wrapper.py', '#!/bin/sh\nexec %s "$@"\n' % command)

    def popen(self, text, job=None):
        """Start the commands; for a job, STATE is its state file."""
        environment = self._wrapper.environment(
            PATH=self._path, STATE=job.paths.state_file if job else None)
        return subprocess.Popen(
            ['bash', '-c', text], cwd=self._wrapper.home, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(become, self._wrapper.user))

    def run(self, text, job=None, stdin=b''):
        """Run the commands and return their status and output."""
        with self.popen(text, job) as process:
            output = process.communicate(stdin, timeout=60)[0].decode()
        return process.returncode, output

    def write_request(self, **overrides):
        """Write request.json where the commands look for it."""
        with open(os.path.join(self._wrapper.home, 'request.json'), 'w') as stream:
            json.dump(self._wrapper.request(**overrides), stream)


@pytest.fixture
def shell(wrapper):
    if not shutil.which('jq'):
        pytest.skip('jq is missing')
    return Shell(wrapper)


def ended(wrapper, *steps):
    """Return a job that played the steps and is over."""
    wrapper.virt_v2v.play(*steps)
    job = wrapper.start()
    job.wait_finished()
    return job


def test_starting_with_a_request_in_a_file(wrapper, shell):
    request = json.dumps(wrapper.request()).encode()
    status, output = shell.run(block('start') + 'cat "$STATE"', stdin=request)
    assert (status, json.loads(output)['started']) == (0, True)
    assert 'request.json' not in wrapper.files()


def test_nobody_else_can_read_the_request_file(wrapper, shell):
    shell.run(block('start').splitlines()[0], stdin=b'{}')
    path = os.path.join(wrapper.home, 'request.json')
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_starting_with_a_typed_password(wrapper, shell):
    shell.write_request(vmware_password=ABSENT)
    status, output = shell.run(block('start-prompt') + 'cat "$STATE"', stdin=b'it\'s "\\$1 ok\n')
    assert (status, json.loads(output)['started']) == (0, True)
    assert wrapper.recorded().password == b'it\'s "\\$1 ok'


def test_starting_over_ssh(wrapper, shell):
    wrapper.add_program('ssh', '#!/bin/sh\nshift\nexec sh -c "$*"\n')
    shell.write_request()
    status, output = shell.run(block('ssh'))
    assert (status, json.loads(output)['started']) == (0, True)


@pytest.mark.parametrize('steps, verdict', [([], 'converted\n'),
                                            ([error('no')], 'not converted\n')])
def test_waiting_for_the_end(wrapper, shell, steps, verdict):
    mark = os.path.join(wrapper.home, 'waited')
    wrapper.add_program('sleep', '#!/bin/sh\n: > %s\nexec /bin/sleep "$1"\n' % mark)
    wrapper.virt_v2v.play(wait('end'), *steps)
    job = wrapper.start()
    with shell.popen(block('wait'), job) as process:
        eventually(lambda: os.path.exists(mark), 'the command waits')
        wrapper.virt_v2v.let('end')
        assert process.communicate(timeout=60)[0].decode() == verdict


# What the loop waits with: first it brings the state file back.
SLEEP = """\
#!/bin/sh
[ ! -e {away} ] || mv {away} {state}
: > {mark}
exec /bin/sleep "$1"
"""


def test_forty_guests(wrapper, shell):
    wrapper.virt_v2v.play(error('it is broken'))
    os.mkdir(os.path.join(wrapper.home, 'requests'))
    for name in ('a', 'b'):
        path = os.path.join(wrapper.home, 'requests', "it's " + name + '.json')
        with open(path, 'w') as stream:
            json.dump(wrapper.request(vm_name=name), stream)
    lines = shell.run(block('forty'))[1].splitlines()
    assert sorted(lines[-2:]) == ['a: it is broken', 'b: it is broken']
    assert sorted(line.split()[:2] for line in lines[-5:-2]) == [
        ['GUEST', 'STATUS'], ['a', 'failed'], ['b', 'failed']]


def test_waiting_looks_twice_for_the_state_file(wrapper, shell):
    wrapper.virt_v2v.play(wait('end'))
    job = wrapper.start()
    state, mark = job.paths.state_file, os.path.join(wrapper.home, 'waited')
    wrapper.add_program('sleep', SLEEP.format(away=state + '.away', state=state, mark=mark))
    os.rename(state, state + '.away')
    with shell.popen(block('wait'), job) as process:
        eventually(lambda: os.path.exists(mark), 'the command waits')
        wrapper.virt_v2v.let('end')
        assert process.communicate(timeout=60)[0].decode().endswith('\nconverted\n')


def test_waiting_ends_when_the_state_file_is_gone(wrapper, shell):
    job = ended(wrapper)
    os.unlink(job.paths.state_file)
    assert shell.run(block('wait'), job)[1].endswith('not converted\n')


def test_showing_the_progress(wrapper, shell):
    job = wrapper.start_waiting(source('[ds] a/b c.vmdk'), copying(1, 2), bar(37))
    job.wait_state(lambda state: state['disks'] and state['disks'][0]['progress'], 'progress')
    assert shell.run(block('show'), job) == (0, '37% [ds] a/b c.vmdk\n')
    wrapper.virt_v2v.let('end')
    job.wait_finished()


def test_showing_why_it_failed(wrapper, shell):
    job = ended(wrapper, error('it is broken'))
    assert shell.run(block('show'), job) == (0, 'it is broken\n')


def test_showing_why_it_failed_shows_nothing_after_a_success(wrapper, shell):
    assert shell.run(block('show'), ended(wrapper)) == (0, '')


def test_cancelling(wrapper, shell):
    job = wrapper.start_waiting()
    assert shell.run(block('cancel'), job) == (0, '')
    message = job.wait_finished()['last_message']['message']
    assert message == 'the wrapper was told to stop by SIGTERM'


def test_cancelling_virt_v2v_itself(wrapper, shell):
    job = wrapper.start_waiting()
    command = re.search(r'`(kill -TERM "[^`]*\.pid[^`]*)`', README).group(1)
    assert shell.run(command, job) == (0, '')
    assert job.wait_finished()['failed'] is True


def test_nothing_is_killed_after_the_end(wrapper, shell):
    status, output = shell.run(block('cancel'), ended(wrapper))
    assert (status != 0, output) == (True, '')


def test_a_job_that_runs_is_alive(wrapper, shell):
    job = wrapper.start_waiting()
    assert shell.run(block('alive'), job) == (0, 'alive\n')
    wrapper.virt_v2v.let('end')
    job.wait_finished()


def test_a_job_that_has_ended_is_ended(wrapper, shell):
    job = ended(wrapper)
    wrapper.wait_gone()
    before = wrapper.files()
    assert shell.run(block('alive'), job) == (0, 'ended\n')
    assert wrapper.files() == before


@pytest.fixture
def dead(wrapper):
    """A job all of whose processes were killed."""
    job = wrapper.start_waiting()
    for process in guardian(job), job.state()['wrapper_pid']:
        os.kill(process, signal.SIGKILL)
    wrapper.wait_gone()
    eventually(lambda: not job.is_alive(), 'the kernel has unlocked the lock file')
    return job


def test_a_job_whose_processes_were_all_killed_is_dead(shell, dead):
    assert shell.run(block('alive'), dead) == (0, 'dead\n')
    assert 'finished' not in dead.state()


def test_a_dead_job_is_not_cancelled(wrapper, shell, dead):
    wrapper.add_program('kill', '#!/bin/sh\necho killed\n')
    status, output = shell.run('enable -n kill\n' + block('cancel'), dead)
    assert (status != 0, output) == (True, '')


def test_finding_errors_in_the_logs(wrapper, shell):
    job = ended(wrapper, error('it is broken'))
    status, output = shell.run(block('logs'), job)
    assert status == 0
    assert 'WARNING virt-v2v: it is broken\n' in output
    assert output.endswith('virt-v2v: error: it is broken\n')


def test_old_files_are_cleaned_up_where_they_are_but_no_lock():
    *rows, locks = [line.split() for line in block('tmpfiles').splitlines()]
    assert [row[:5] for row in rows] == [
        ['d', path, '0755', script.VDSM_USER, 'kvm']
        for path in (script.VDSM_STATE_DIR, script.VDSM_LOG_DIR)]
    assert all(re.fullmatch('[0-9]+d', row[5]) for row in rows)
    assert locks == ['x', script.VDSM_STATE_DIR + '/*.lock']


@pytest.mark.skipif(not shutil.which('visudo'), reason='needs sudo')
def test_sudo_understands_its_lines(tmp_path):
    (tmp_path / 'sudoers').write_text(block('sudoers'))
    assert subprocess.call(['visudo', '-c', '-q', '-f', str(tmp_path / 'sudoers')]) == 0


# --- what is outside of the script -------------------------------------------------------

def test_the_last_state_is_tried_for_as_long_as_promised():
    assert 'is tried for one hour' in README
    assert (script.FINAL_WRITE_PATIENCE, script.PUBLISH_RETRY <= 1) == (3600, True)


@pytest.mark.parametrize('words', [
    'local file system with hard links', 'PID 1', 'KillUserProcesses', 'TimeoutStopSec',
    'systemd-run --scope'])
def test_what_of_a_host_can_end_a_job_is_told(words):
    assert words in README
