"""
Real conversions straight into oVirt, and from an ESX server by SSH.

What takes minutes is done once, side by side, by the fixtures `converted` and `failed`; the tests
look at what came of it.
"""

import contextlib
import json
import os
import re
import signal

import pytest

from checks import (
    SLOW, VERY_SLOW, assert_same_data, assert_secret_kept, failure, is_copying)
from lab import GUESTS, LUKS_KEY, MIB, UNIT, parent, poll, run
from ssh import agent
from upload import upload_target

pytestmark = pytest.mark.lab

LAB1, LAB3, TWIN = GUESTS
LUKS = {"device": "/dev/sda2", "key": LUKS_KEY}
# What make-guest has in a system's initrd, and what a conversion has the guest write there.
BEFORE, CONVERTED = "not an initrd\n", "an initrd with virtio\n"


@pytest.fixture(scope="module")
def domain(session_lab):
    return session_lab.export_domain()


@pytest.fixture(scope="module")
def faulty(session_lab, target):
    """Another target, whose engine cannot import what was uploaded."""
    with upload_target(session_lab) as faulty:
        faulty.engine.faults.add("job")
        yield faulty


@pytest.fixture(scope="module")
def converted(session_lab, target, domain, ssh):
    """The last states of conversions that succeed."""
    start, request = session_lab.start, session_lab.request
    jobs = {
        "three disks": start(request("lab3", **target.keys(source_disks=LAB3.disk_paths()))),
        "many keys": start(request("twin", **target.keys(
            new_vm_name="new name", root="/dev/sda1", luks_keys=[LUKS], output_format="qcow2",
            network_mappings=[
                {"source": "VM Network", "destination": "front"},
                {"source": "Nowhere", "destination": "back", "mac_address": TWIN.mac_address(1)},
            ]))),
        "ssh": start(request(export_domain=domain.path, **ssh.keys(
            "twin", new_vm_name="by ssh", luks_keys=[LUKS], ssh_key=ssh.key_text(),
            allocation="preallocated"))),
    }
    return {name: job.wait_finished() for name, job in jobs.items()}


@pytest.fixture(scope="module")
def failed(session_lab, target, faulty, ssh):
    """The last states of conversions that fail."""
    start, request = session_lab.start, session_lab.request
    with agent(ssh) as socket:
        jobs = {
            "import": start(request("lab1", **faulty.keys())),
            "wrong key": start(request("twin", **target.keys(luks_keys=[dict(LUKS, key="wrong")]))),
            "single": start(request(**ssh.keys("twin", **target.keys(
                new_vm_name="single", luks_keys=[LUKS], root="single"))), SSH_AUTH_SOCK=socket),
        }
        return {name: job.wait_finished() for name, job in jobs.items()}


def assert_succeeded(state):
    assert "failed" not in state, state
    assert (state["finished"], state["return_code"]) == (True, 0)


def images_of(target, state):
    """Check that the VM of the state is complete; return the paths of its images."""
    disks = target.engine.disks_of(state["vm_id"])
    assert {target.engine.disks[disk]["status"] for disk in disks} == {"ok"}
    return [target.host.image(disk) for disk in disks]


def initrd(image, offset):
    """Return the initrd of the system at the offset in the image."""
    return run(["debugfs", "-R", "cat /boot/initrd.img-6.1.0-99-amd64",
                "%s?offset=%d" % (image, offset)])


def decrypted(image, directory):
    """Return the path of what is in the encrypted partition of the image."""
    part, plain = str(directory / "part"), str(directory / "plain")
    run(["dd", "if=" + image, "of=" + part, "bs=1M", "skip=%d" % (UNIT // MIB), "count=127"])
    run(["qemu-img", "convert", "--object", "secret,id=key,data=" + LUKS_KEY, "--image-opts",
         "driver=luks,key-secret=key,file.filename=" + part, "-O", "raw", plain])
    return plain


def nics(ovf):
    """Return [(MAC address, network)] of an OVF."""
    rasd = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
    return [(item.findtext(rasd + "MACAddress"), item.findtext(rasd + "Connection"))
            for item in ovf.iter("Item") if item.findtext("Type") == "interface"]


def skip_if_1x(reason):
    if run(["virt-v2v", "--version"]).startswith("virt-v2v 1."):
        pytest.skip(reason)


def test_three_disks_are_uploaded_byte_for_byte(lab, target, converted):
    state = converted["three disks"]

    assert_succeeded(state)
    assert [(disk["path"], disk["progress"]) for disk in state["disks"]] == [
        (path, 100) for path in LAB3.disk_paths()]
    assert target.engine.vms[state["vm_id"]]["name"] == "lab3"
    assert_same_data(lab.disk_files(LAB3), images_of(target, state))


def test_nics_are_mapped_by_network_and_by_mac(lab, target, converted):
    state = converted["many keys"]

    assert_succeeded(state)
    assert nics(target.engine.ovfs[state["vm_id"]]) == [
        (TWIN.mac_address(0), "front"), (TWIN.mac_address(1), "back")]


def test_nics_without_a_mapping_are_in_ovirtmgmt(lab, target, converted):
    state = converted["three disks"]

    assert nics(target.engine.ovfs[state["vm_id"]]) == [(LAB3.mac_address(0), "ovirtmgmt")]


def test_a_vm_gets_its_new_name(lab, target, converted):
    state = converted["many keys"]

    assert target.engine.vms[state["vm_id"]]["name"] == "new name"


def test_an_upload_may_be_qcow2(lab, target, converted):
    image, = images_of(target, converted["many keys"])

    assert json.loads(run(["qemu-img", "info", "--output=json", image]))["format"] == "qcow2"


def test_the_system_that_is_named_is_converted(lab, target, converted, tmp_path):
    image, = images_of(target, converted["many keys"])
    raw = str(tmp_path / "raw")
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw])

    assert initrd(raw, MIB) == CONVERTED


def test_the_first_system_is_in_the_encrypted_device(lab, domain, converted, tmp_path):
    assert_succeeded(converted["ssh"])
    image, = domain.images()

    assert initrd(image, MIB) == BEFORE
    assert initrd(decrypted(image, tmp_path), 0) == CONVERTED


def test_a_guest_read_by_ssh_is_in_the_export_domain(lab, domain, converted):
    state = converted["ssh"]

    assert domain.vms() == [("by ssh", state["vm_id"], 1)]
    assert (state["disk_count"], [disk["progress"] for disk in state["disks"]]) == (1, [100])


def test_preallocated_disks_have_no_holes(lab, domain, converted):
    skip_if_1x("qemu-img makes holes where there are zeroes, whatever virt-v2v 1.x preallocated")
    image, = domain.images()

    assert os.stat(image).st_blocks * 512 >= 1024 * MIB


def test_a_wrong_luks_key_is_told(lab, target, failed):
    assert "/dev/sda2" in failure(failed["wrong key"])


def test_two_systems_are_refused_with_root_single(lab, target, failed):
    # To see that, scp, ssh and nbdkit of virt-v2v have all asked the caller's agent.
    assert "multi-boot" in failure(failed["single"])


def test_a_failed_import_leaves_nothing_in_the_engine(lab, faulty, failed):
    skip_if_1x("virt-v2v 1.x does not ask how the import ended")
    assert "Failed to create a VM" in failure(failed["import"])
    assert (faulty.engine.vms, faulty.engine.disks) == ({}, {})


@pytest.mark.parametrize("key, value, words", [
    ("rhv_password", "wrong", "The username or password is incorrect"),
    ("rhv_cluster", "no-such-cluster", "not in data center Default"),
    ("rhv_storage", "no-such-storage", "no data center has a storage domain of this name"),
    ("rhv_cafile", "/etc/passwd", ""),
])
def test_what_the_engine_does_not_know_is_refused(lab, target, key, value, words):
    result = lab.run_wrapper(lab.request("lab1", **target.keys(**{key: value})))

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("virt-v2v-wrapper: error: %s: " % key)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_certificate_of_another_ca_is_refused(lab, target, own_target):
    result = lab.run_wrapper(lab.request("lab1", **target.keys(rhv_cafile=own_target.ca)))

    assert result.returncode == 1
    assert "certificate verify failed" in result.stderr


def test_an_unknown_ssh_host_is_refused(lab, target, ssh):
    result = lab.run_wrapper(lab.request(**ssh.keys(
        "lab1", host="127.0.0.1", ssh_key=ssh.key_text(), **target.keys())))

    assert result.returncode == 1
    assert "ssh-keyscan -p %d 127.0.0.1" % ssh.port in result.stderr


def test_ssh_without_a_key_fails(lab, target, ssh):
    job = lab.start(lab.request(**ssh.keys("lab1", **target.keys())))

    # Of scp; from 2.5.1 on nbdkit's own client logs in.
    assert re.search("Permission denied|authentication methods failed",
                     failure(job.wait_finished()))


def wait_for_disks(engine, names):
    """Wait until these are the disks that the engine has: it removes them in its own time."""
    def present():
        return sorted(disk["name"] for disk in list(engine.disks.values()))
    with contextlib.suppress(TimeoutError):
        poll(lambda: present() == names, 60)
    assert present() == names


def test_endings_in_the_copy_leave_nothing_in_the_engine(lab, own_target):
    engine = own_target.engine
    with upload_target(lab) as dying:
        without_server = lab.start(lab.request("lab1", **dying.keys()), rate=SLOW)
        # The wrapper takes a guest for the same only if the URI is, too.
        jobs = {name: lab.start(
            lab.request("lab1", **own_target.keys(
                new_vm_name=name, vmware_uri="%s&job=%d" % (lab.esx.uri(), number))),
            rate=VERY_SLOW) for number, name in enumerate(("told to end", "killed", "all killed"))}
        without_server.wait(is_copying)
        dying.host.daemon.kill()
        states = {name: job.wait(is_copying) for name, job in jobs.items()}
        assert_secret_kept(lab)
        # It is qemu-img with virt-v2v 1.x.
        assert re.search("nbdcopy|qemu-img", failure(without_server.wait_finished()))
        wait_for_disks(dying.engine, [])

    os.kill(states["told to end"]["pid"], signal.SIGTERM)
    os.kill(states["killed"]["pid"], signal.SIGKILL)
    wrapper = states["all killed"]["wrapper_pid"]
    for process in (parent(wrapper), wrapper):
        os.kill(process, signal.SIGKILL)
    for name in ("told to end", "killed"):
        failure(jobs[name].wait_finished())
    wait_for_disks(engine, ["all killed-000"])

    # Nobody has the engine's password any more, until the next job brings it.
    lab.wait_idle(seconds=20)
    lab.start(lab.request("no-such-vm", **own_target.keys())).wait_finished()
    last = jobs["all killed"].wait(lambda state: state.get("finished"), seconds=20)
    assert "left_behind" not in last
    wait_for_disks(engine, [])
    assert engine.vms == {}
