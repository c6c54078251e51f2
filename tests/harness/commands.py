"""The commands for many jobs, and jobs that consist of files alone."""
import fcntl
import json
import os
import time


def command(wrapper, *words, request=None, **keywords):
    """Run a command with the wrapper's directories; return (status, stdout, stderr) as texts.

    The request is a dict; the keywords are those of Wrapper.popen.
    """
    process = wrapper.popen(*(wrapper.arguments + list(words)), **keywords)
    with process:
        try:
            said = process.communicate(request and json.dumps(request).encode(), timeout=60)
        except BaseException:
            process.kill()
            raise
    return (process.returncode,) + tuple(text.decode('utf-8') for text in said)


class PaperJob:
    """A job that has a state file, and a lock file locked by the test, and no process."""

    def __init__(self, wrapper, number, **overrides):
        if not os.path.isdir(wrapper.state_dir):
            os.mkdir(wrapper.state_dir)
            os.chown(wrapper.state_dir, wrapper.user.pw_uid, wrapper.user.pw_gid)
        stem = os.path.join(wrapper.state_dir, 'v2v-import-20261123T192110-%d' % number)
        self.path, self.guest, self._owner = stem + '.state', 'guest%d' % number, wrapper.user
        self._lock = open(stem + '.lock', 'w')
        os.chown(stem + '.lock', wrapper.user.pw_uid, wrapper.user.pw_gid)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._state = {
            'started': True, 'vm_name': self.guest, 'disks': [], 'disk_count': 0,
            'started_at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
        self.update(**overrides)

    def update(self, **changes):
        """Publish a state with these keys changed."""
        self._state.update(changes)
        with open(self.path + '.new', 'w', encoding='utf-8') as stream:
            json.dump(self._state, stream)
        os.chown(self.path + '.new', self._owner.pw_uid, self._owner.pw_gid)
        os.rename(self.path + '.new', self.path)

    def copy(self, percent, **changes):
        """Publish that the only disk is copied so far."""
        self.update(disks=[dict({'path': '[ds] a', 'progress': percent}, **changes)],
                    disk_count=1, phase='Copying disk 1/1')

    def end(self, **changes):
        """Publish an ending with these keys, and give up the lock."""
        self.update(finished=True, **changes)
        self.die()

    def die(self):
        """Give up the lock."""
        self._lock.close()
