"""What comes out, in the form in which tests compare it."""
import os
import stat

import pytest

from virt_v2v_wrapper import HostError


def mode(path):
    """Return the permission bits of a file, not of what it may link to."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def error_line(problem):
    """Return the bytes of stderr for one problem."""
    return 'virt-v2v-wrapper: error: {}\n'.format(problem).encode()


def refusal(function, *arguments, error=HostError):
    """Return the texts of the problems that a function has with what it is given."""
    with pytest.raises(error) as caught:
        function(*arguments)
    return [': '.join(problem) for problem in caught.value.problems]
