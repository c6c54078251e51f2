"""
What an administrator of many guests sees of real conversions: --check, --wait, --list, --watch and
--cancel.

The conversions take place in the fixtures `many` and `ended`; the tests look at what came of them.
"""

import json
import os
import re
import signal
import subprocess

from collections import namedtuple

import pytest

from checks import VERY_SLOW, failure, is_copying
from lab import GUESTS, LUKS_KEY, WRAPPER, Job, administrators_environment, end, parent, poll, run

pytestmark = pytest.mark.lab

LAB1, LAB3, TWIN = GUESTS
LUKS = [{"device": "/dev/sda2", "key": LUKS_KEY}]
RATE = 7000000      # bytes a second: slow enough to see the copy


def listed(lab):
    """Return what --list tells of the jobs, {path of the state file: row}."""
    result = lab.run_wrapper(None, 0, "--list", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return {row["state_file"]: row for row in json.loads(result.stdout)}


def there_is(domain):
    """Return the paths of all files and directories that a conversion could leave behind."""
    return sorted(run(["find", "/run/vdsm", "/var/log/vdsm", "/var/tmp", domain.path,
                       "-not", "-path", "/var/tmp/v2v-cache-36/*"]).splitlines())


@pytest.fixture(scope="module")
def domain(session_lab):
    return session_lab.export_domain()


@pytest.fixture
def check(lab, domain):
    """A function that checks a request, and that nothing comes of that."""
    def check(request, *words):
        before = there_is(domain)
        result = lab.run_wrapper(request, 0, "--check", *words)
        assert there_is(domain) == before
        return result.returncode, result.stdout, result.stderr
    return check


def test_check_shows_guest_and_target(lab, domain, check):
    status, shown, stderr = check(lab.request("twin", domain.path, network_mappings=[
        {"source": "Storage", "destination": "back"}]))

    assert (status, stderr) == (0, "")
    *lines, target = shown.splitlines()
    assert lines == [
        "guest:    twin",
        "disk:     [ds] twin/twin.vmdk",
        "network:  VM Network %s goes to ovirtmgmt" % TWIN.mac_address(0),
        "network:  Storage %s goes to back" % TWIN.mac_address(1)]
    assert re.fullmatch(r"target:   export_domain, %s/%s, [0-9.]+ GiB free" % (
        domain.path, domain.uuid), target)


def test_check_of_an_upload_shows_the_room_in_the_storage(lab, domain, target, check):
    status, shown, stderr = check(lab.request("lab3", **target.keys()), "--json")

    assert (status, stderr) == (0, "")
    shown = json.loads(shown)
    assert shown["disks"] == LAB3.disk_paths()
    assert shown["free_bytes"] == int(target.engine.storage["available"])
    assert (shown["target"]["type"], shown["target"]["storage"]) == ("rhv_upload", "store")
    assert (target.engine.disks, target.engine.transfers) == ({}, {})


@pytest.mark.parametrize("key, value, words", [
    ("vmware_password", "wrong", "source: .*incorrect user name or password"),
    ("vm_name", "no-such-vm", "source: .*no-such-vm"),
    ("vmware_uri", "esx://root@127.0.0.1:1?no_verify=1",
     "vmware_uri: port 1 of 127.0.0.1 cannot be reached: .*Connection refused"),
])
@pytest.mark.parametrize("upload", [False, True])
def test_check_tells_what_is_wrong_with_the_source(
        lab, domain, target, check, upload, key, value, words):
    keys = target.keys() if upload else domain.keys()

    status, shown, stderr = check(lab.request("lab1", **dict(keys, **{key: value})))

    assert (status, shown) == (1, "")
    assert re.match("virt-v2v-wrapper: error: " + words, stderr)
    assert stderr.count("\n") == 1


def test_check_tells_the_right_thumbprint(lab, domain, check):
    wrong = ":".join(["0A"] * 20)

    assert check(lab.request("lab1", domain.path, vmware_fingerprint=wrong)) == (
        1, "", "virt-v2v-wrapper: error: vmware_fingerprint: the server has %s\n"
        % lab.esx.thumbprint)


def test_check_looks_at_a_guest_that_is_read_by_ssh(lab, domain, ssh, check):
    keys = ssh.keys("twin", ssh_key=ssh.key_text())

    status, shown, stderr = check(lab.request(export_domain=domain.path, **keys))

    assert (status, stderr) == (0, "")
    assert shown.splitlines()[:4] == [
        "guest:    " + keys["vm_name"],
        "disk:     [ds] twin/twin.vmdk",
        "network:  VM Network %s goes to ovirtmgmt" % TWIN.mac_address(0),
        "network:  Storage %s goes to ovirtmgmt" % TWIN.mac_address(1)]


@pytest.mark.parametrize("guest, has_key, words", [
    ("twin", False, "source: .*Permission denied"),
    ("no-such-vm", True, "source: .*No such file"),
])
def test_check_tells_what_is_wrong_by_ssh(lab, domain, ssh, check, guest, has_key, words):
    keys = {"ssh_key": ssh.key_text()} if has_key else {}

    status, shown, stderr = check(lab.request(
        export_domain=domain.path, **ssh.keys(guest, **keys)))

    assert (status, shown) == (1, "")
    assert re.match("virt-v2v-wrapper: error: " + words, stderr)


Many = namedtuple("Many", "status jobs watched")


@pytest.fixture(scope="module")
def many(session_lab, domain, tmp_path_factory):
    """Three guests, converted as the README says: the status of that; {guest: Job}; and what
    --watch said meanwhile."""
    lab, directory = session_lab, tmp_path_factory.mktemp("many")
    requests = {"lab1": {}, "lab3": {}, "twin": {"luks_keys": LUKS}}
    os.mkdir(str(directory / "requests"))
    for guest, keys in requests.items():
        (directory / "requests" / (guest + ".json")).write_text(json.dumps(
            lab.request(guest, domain.path, **keys)))
    command = directory / "virt-v2v-wrapper.py"
    command.write_text('#!/bin/sh\nexec "%s" --vddk-libdir "%s" "$@"\n' % (
        WRAPPER, lab.vddk(RATE)))
    command.chmod(0o755)
    environment = administrators_environment()
    environment["PATH"] = "%s:%s" % (directory, environment["PATH"])
    with open(os.path.join(os.path.dirname(WRAPPER), "README.md"), encoding="utf-8") as readme:
        line = re.search("^printf .* --wait .*$", readme.read(), re.M).group()

    def running():
        return [row for row in listed(lab).values() if row["status"] == "running"]

    with subprocess.Popen(["sh", "-c", line], cwd=str(directory), env=environment,
                          stdout=subprocess.PIPE, universal_newlines=True) as convert:
        poll(lambda: len(running()) == len(requests), 60)
        watched = lab.run_wrapper(None, 0, "--watch")
        answers, _ = convert.communicate(timeout=600)
    jobs = [Job(**json.loads(answer)) for answer in answers.splitlines()]
    return Many(convert.returncode, {job.state()["vm_name"]: job for job in jobs}, watched)


def test_guests_by_wait_and_xargs_arrive(lab, domain, many):
    assert many.status == 0
    assert sorted((vm.name, vm.disks) for vm in domain.vms()) == [
        (guest.name, guest.disk_count) for guest in GUESTS]


def test_list_tells_that_they_are_converted(lab, many):
    rows = listed(lab)

    assert {guest: rows[job.state_file]["status"] for guest, job in many.jobs.items()} == {
        guest.name: "converted" for guest in GUESTS}


def test_watch_follows_all_of_them_until_they_have_ended(lab, many):
    assert (many.watched.returncode, many.watched.stderr) == (0, "")
    for guest in GUESTS:
        lines = re.findall("(?m)^%s: (.*)$" % guest.name, many.watched.stdout)
        assert lines[-1] == "100% converted"
        assert [line for line in lines if line.endswith("Copying disk 1/%d" % guest.disk_count)]


Ended = namedtuple("Ended", "job domain images result")


def state_of(ended):
    """Return the last state of a job that was ended, of which no image is there any more."""
    assert ended.images
    assert ended.domain.files() == []
    return ended.job.state()


@pytest.fixture(scope="module")
def ended(session_lab):
    """Jobs that were ended in the copy, {how: Ended}: with the images that there were then, and
    the result of the command that ended it."""
    lab = session_lab
    domains = {how: lab.export_domain() for how in ("cancel", "interrupt", "kill")}
    with subprocess.Popen(
            [WRAPPER, "--vddk-libdir", lab.vddk(VERY_SLOW), "--wait"],
            env=administrators_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            universal_newlines=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as waiting:
        json.dump(lab.request("lab1", domains["interrupt"].path), waiting.stdin)
        waiting.stdin.close()
        jobs = {
            "cancel": lab.start(lab.request("lab3", domains["cancel"].path), rate=VERY_SLOW),
            "interrupt": Job(**json.loads(waiting.stdout.readline())),
            "kill": lab.start(lab.request("twin", domains["kill"].path, luks_keys=LUKS),
                              rate=VERY_SLOW),
        }
        states = {how: job.wait(is_copying) for how, job in jobs.items()}
        images = {how: domain.images() for how, domain in domains.items()}
        waiting.send_signal(signal.SIGINT)
        monitor = states["kill"]["wrapper_pid"]
        for process in parent(monitor), monitor, states["kill"]["pid"]:
            end(process)
        cancelled = lab.run_wrapper(None, 0, "--cancel", jobs["cancel"].state_file)
        waiting.wait(120)
    lab.wait_idle(20)
    assert "finished" not in jobs["kill"].state()
    results = {"cancel": cancelled, "interrupt": waiting,
               "kill": lab.run_wrapper(None, 0, "--list")}
    return {how: Ended(jobs[how], domains[how], images[how], results[how]) for how in jobs}


def test_cancel_ends_a_job_and_waits_for_that(lab, ended):
    job, _, _, result = ended["cancel"]

    assert (result.returncode, result.stdout, result.stderr) == (
        0, job.state_file + ": cancelled\n", "")
    assert state_of(ended["cancel"])["cancelled"] is True
    assert listed(lab)[job.state_file]["status"] == "cancelled"


def test_an_interrupt_of_wait_cancels_the_job(lab, ended):
    assert ended["interrupt"].result.returncode == 4
    assert state_of(ended["interrupt"])["cancelled"] is True


def test_list_ends_a_job_whose_processes_were_all_killed(lab, ended):
    job, _, _, result = ended["kill"]

    row, = [line for line in result.stdout.splitlines() if line.endswith(job.state_file)]
    assert row.split()[:2] == ["twin", "failed"]
    last = state_of(ended["kill"])
    assert "all processes of the wrapper were killed" in failure(last)
    assert "cancelled" not in last
    assert "left_behind" not in last
