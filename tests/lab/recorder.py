"""Looks at a job's state file all the time, and whether each state may follow the one before."""

import json
import re
import threading
import time

from processes import is_running
from schemas import valid_state

INTERVAL = 0.05     # seconds


class Recorder(threading.Thread):
    """Runs until the state is final, or until it is ended.

    Attributes: `states`, all different ones it saw; `broken`, a line for each promise of
    README.md that one of them breaks.
    """

    def __init__(self, job):
        """Take the `Job`."""
        super().__init__(daemon=True)
        self.job = job
        self.states = []
        self.broken = []
        self._ended = threading.Event()
        self._seen = {}     # when virt-v2v had ended, when the state was final
        self.start()

    def run(self):
        while not self._final() and not self._ended.wait(INTERVAL):
            self._look()
            if self.states and not is_running(self.states[0]["pid"]):
                self._seen.setdefault("ended", time.monotonic())
            if self._final():
                self._seen["final"] = time.monotonic()

    def end(self):
        """Look for the last time, and wait until the thread has ended."""
        self._ended.set()
        self.join()
        self._look()

    def summary(self):
        """Return a line with how finely progress was told, and how soon the end."""
        steps = {tuple(disk["progress"] for disk in state["disks"]) for state in self.states}
        line = "%d states, %d steps of progress" % (len(self.states), len(steps))
        if len(self._seen) == 2:
            line += ", final %.2f s after virt-v2v" % (self._seen["final"] - self._seen["ended"])
        return line

    def _final(self):
        return self.states and "finished" in self.states[-1]

    def _look(self):
        try:
            with open(self.job.state_file) as stream:
                state = json.load(stream)
            if self.states[-1:] == [state]:
                return
            valid_state(state)
        except (OSError, ValueError, AssertionError) as error:
            self.broken.append(str(error))
            return
        self.broken += breaches(self.states[-1] if self.states else state, state)
        self.states.append(state)


def breaches(before, state):
    """Return a line for each promise that the state breaks after the one before it."""
    found = []

    def promise(kept, text):
        if not kept:
            found.append("%s: %s, then %s" % (text, json.dumps(before), json.dumps(state)))
    success = "finished" in state and "failed" not in state
    done = [disk["progress"] for disk in state["disks"]]
    done_before = [disk["progress"] for disk in before["disks"]]

    promise(before == state or "finished" not in before, "a state after the last one")
    gone = set(before) - set(state) - ({"last_message"} if success else set())
    promise(not gone, "keys are gone")
    promise(len(done) >= len(done_before), "disks are gone")
    promise(all(new >= old for old, new in zip(done_before, done)), "progress went back")
    copying = re.match("Copying disk ([0-9]+)/", state.get("phase", ""))
    promise(sum(0 < progress < 100 for progress in done) <= 1 and
            (not copying or done.count(100) >= int(copying.group(1)) - 1),
            "a disk has begun before another has 100")
    promise(not success or all(progress == 100 for progress in done),
            "succeeded without 100 of a disk")
    return found
