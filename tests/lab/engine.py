"""
A simulated oVirt engine: the REST API and the single sign-on, TLS on loopback.

It has a data center with one cluster, and one storage domain on one host (host.py), and answers
what is asked while a virtual machine is uploaded: by the scripts of virt-v2v -o rhv-upload (seen
with 2.2.0 and ovirt-engine-sdk-python 4.6.3), which want XML, and by whoever wants JSON; any other
call is refused with an answer that names it. As in oVirt, what takes time has not happened when
the call returns: disks and transfers are locked for a while, and a transfer is closed only when no
request of it runs any more. All values are strings, in JSON, too.
"""

import json
import re
import secrets
import threading
import time
import urllib.parse
import uuid
import xml.etree.ElementTree as ElementTree

from collections import namedtuple
from xml.sax.saxutils import escape, quoteattr

from web import Handler, WebServer

ROOT = "/ovirt-engine"
API = ROOT + "/api/"
OVF = "{http://schemas.dmtf.org/ovf/envelope/1/}"
JSON = "application/json"
FORMATS = {"raw": "raw", "cow": "qcow2"}


class Refused(Exception):
    """The call fails with this HTTP status and detail."""

    def __init__(self, status, detail):
        super().__init__(detail)
        self.status = status


class Call(namedtuple("Call", "query body all_content")):
    """What a call brings: {name: value}, the XML element of the body or None, and whether it wants
    also the attributes that are left out by default."""

    def search(self, key):
        """Return the value of the key in the query's search expression, or None."""
        found = re.search("(?:^| and )%s=(.*?)(?: and |$)" % key, self.query.get("search", ""))
        return found and found.group(1)


class Engine(WebServer):
    """The engine.

    Attributes for the tests: `url`; `disks`, `transfers` and `vms`, {id: what the API shows};
    `ovfs`, {VM's id: root element}; `faults`, what is to go wrong: "finalize" (of a transfer),
    "job" (the import of the VM).
    """

    def __init__(self, certificate, address, password, host):
        """Take a PEM file with certificate and key, the password of admin@internal, a `Host`."""
        # With a port in the URL, as of 2.6.0 virt-v2v's scripts for an upload fail.
        super().__init__(certificate, _Handler, self, address, 443)
        self.url = "https://%s%s" % (address, API.rstrip("/"))
        self.password, self.host = password, host
        self.faults, self.tokens, self.lock = set(), set(), threading.RLock()
        self.disks, self.transfers, self.vms, self.ovfs, self.jobs = {}, {}, {}, {}, {}
        self.cluster = thing("clusters", name="Default", cpu={"architecture": "x86_64"})
        self.storage = thing("storagedomains", name="store", type="data", status="active",
                             available=str(5 << 30))
        self.center = thing("datacenters", "storagedomains", "clusters", name="Default")

    def sign_on(self, form):
        """Return HTTP status and answer for a form that wants a token."""
        user = form.get("username")
        if form.get("grant_type") != "password" or form.get("scope") != "ovirt-app-api":
            return 400, {"error": "invalid_request", "error_code": "invalid_request"}
        if (user, form.get("password")) != ("admin@internal", self.password):
            text = "Cannot authenticate user '%s': The username or password is incorrect.." % user
            return 400, {"error": text, "error_code": "access_denied"}
        token = secrets.token_urlsafe(48)
        self.tokens.add(token)
        return 200, {"access_token": token, "scope": "ovirt-app-api", "token_type": "bearer",
                     "exp": str(int(time.time() + 3600) * 1000)}

    def sign_off(self, form):
        """Return HTTP status and answer for a form that gives a token back."""
        self.tokens.discard(form.get("token"))
        return 200, {}

    def disks_of(self, vm):
        """Return the ids of the disks that a VM was made with; raises Refused."""
        known(self.vms, vm)
        return [disk.get(OVF + "diskId") for disk in self.ovfs[vm].iter("Disk")]

    def call(self, method, path, call):
        """Return the tag and the content of the answer to a call of the API; raises Refused."""
        for wanted, pattern, answer in CALLS:
            match = re.fullmatch(pattern.replace("ID", "([0-9a-f-]{36})"), path)
            if wanted == method and match:
                with self.lock:
                    return answer(self, call, *match.groups())
        raise Refused(404, "the simulated engine does not know %s %s" % (method, path))


# What the API shows: dicts of strings, dicts and lists of dicts.

def thing(collection, *links, **values):
    """Return a new object of the collection with these values and links to what is below it."""
    values.setdefault("id", str(uuid.uuid4()))
    values["href"] = API + collection + "/" + values["id"]
    if links:
        values["link"] = [{"rel": link, "href": values["href"] + "/" + link} for link in links]
    return values


def reference(thing):
    return {"id": thing["id"], "href": thing["href"]}


def listed(tag, things):
    """Return tag and content of a collection; of an empty one there is no content."""
    return tag + "s", {tag: things} if things else {}


def to_xml(tag, value):
    """Return an element, or one for each member of a list."""
    if isinstance(value, list):
        return "".join(to_xml(tag, member) for member in value)
    attributes, content = "", escape(str(value))
    if isinstance(value, dict):
        attributes = "".join(" %s=%s" % (key, quoteattr(value[key]))
                             for key in ("id", "href", "rel") if key in value)
        content = "".join(to_xml(key, part) for key, part in value.items()
                          if key not in ("id", "href", "rel"))
    return "<%s%s>%s</%s>" % (tag, attributes, content, tag)


def known(things, key):
    if key not in things:
        raise Refused(404, "Entity not found: " + key)
    return things[key]


def later(do, *arguments):
    """Call a function in a fraction of a second, in a thread."""
    timer = threading.Timer(0.2, do, arguments)
    timer.daemon = True
    timer.start()


# The calls. Each takes the engine, the `Call` and the ids in the path, and returns tag and content.

DONE = "action", {"status": "complete"}


def list_centers(engine, call):
    found = call.search("storage.name") == engine.storage["name"]
    return listed("data_center", [engine.center] if found else [])


def list_domains(engine, call, center=None):
    found = center or call.search("name") == engine.storage["name"]
    return listed("storage_domain", [engine.storage] if found else [])


def list_clusters(engine, call, center):
    return listed("cluster", [engine.cluster])


def get_cluster(engine, call, key):
    return "cluster", known({engine.cluster["id"]: engine.cluster}, key)


def list_vms(engine, call):
    return listed("vm", [vm for vm in engine.vms.values() if vm["name"] == call.search("name")])


def get_vm(engine, call, key):
    return "vm", known(engine.vms, key)


def list_attachments(engine, call, key):
    disks = [engine.disks[disk] for disk in engine.disks_of(key) if disk in engine.disks]
    return listed("disk_attachment",
                  [{"id": disk["id"], "disk": reference(disk)} for disk in disks])


def list_jobs(engine, call):
    return listed("job", [job for correlation, job in engine.jobs.items()
                          if correlation == call.search("correlation_id")])


def add_disk(engine, call):
    name = call.body.findtext("storage_domains/storage_domain/name")
    if name != engine.storage["name"]:
        raise Refused(404, "Entity not found: StorageDomain: name=%s" % name)
    values = {key: call.body.findtext(key)
              for key in ("name", "format", "sparse", "provisioned_size")}
    disk = thing("disks", id=call.body.get("id") or str(uuid.uuid4()), status="locked", **values)
    engine.host.create_image(disk["id"], FORMATS[disk["format"]], int(disk["provisioned_size"]))
    engine.disks[disk["id"]] = disk
    later(disk.update, {"status": "ok"})
    return "disk", disk


def get_disk(engine, call, key):
    disk = known(engine.disks, key)
    vms = [reference(vm) for vm in engine.vms.values() if key in engine.disks_of(vm["id"])]
    return "disk", dict(disk, vms={"vm": vms}) if vms and call.all_content else disk


def remove_disk(engine, call, key):
    if known(engine.disks, key)["status"] == "locked":
        raise Refused(409, "[Cannot remove Virtual Disk. Related operation is currently in "
                           "progress. Please try again later.]")
    drop_disk(engine, key)
    return DONE


def drop_disk(engine, key):
    del engine.disks[key]
    engine.host.delete_image(key)


def add_transfer(engine, call):
    disk = known(engine.disks, call.body.find("disk").get("id"))
    if disk["status"] != "ok":
        raise Refused(409, "[Cannot transfer Virtual Disk: Disk is locked.]")
    disk["status"] = "locked"
    transfer = thing("imagetransfers", phase="initializing", disk=reference(disk))
    engine.transfers[transfer["id"]] = transfer
    later(open_transfer, engine, transfer, disk)
    return "image_transfer", transfer


def open_transfer(engine, transfer, disk):
    url = engine.host.serve_image(
        disk["id"], FORMATS[disk["format"]], int(disk["provisioned_size"]), transfer["id"])
    transfer.update(phase="transferring", transfer_url=url, proxy_url=url)


def get_transfer(engine, call, key):
    return "image_transfer", known(engine.transfers, key)


def end_transfer(engine, call, key, action):
    transfer = known(engine.transfers, key)
    if transfer["phase"] not in ("initializing", "transferring"):
        raise Refused(409, "[Cannot %s Image Transfer. The transfer is %s.]" % (
            action, transfer["phase"]))
    transfer["phase"] = "finalizing_" + ("cleanup" if action == "cancel" else "success")
    later(close_transfer, engine, transfer, action)
    return DONE


def close_transfer(engine, transfer, action):
    """Wait until the host no longer serves the image; then it is a disk, or it is removed."""
    disk = engine.disks[transfer["disk"]["id"]]
    engine.host.stop_serving(disk["id"])
    with engine.lock:
        if action == "cancel":
            drop_disk(engine, disk["id"])
            transfer["phase"] = "finished_cleanup"
        elif "finalize" in engine.faults:
            disk["status"], transfer["phase"] = "illegal", "finished_failure"
        else:
            disk["status"], transfer["phase"] = "ok", "finished_success"


def add_vm(engine, call):
    ovf = ElementTree.fromstring(call.body.findtext("initialization/configuration/data"))
    system = ovf.find("VirtualSystem")
    vm = thing("vms", "diskattachments", id=system.get(OVF + "id"), name=system.findtext("Name"),
               status="down")
    if vm["name"] in [other["name"] for other in engine.vms.values()]:
        raise Refused(409, "[Cannot import VM. VM name %s already exists.]" % vm["name"])
    for disk in ovf.iter("Disk"):
        known(engine.disks, disk.get(OVF + "diskId"))
    failed = "job" in engine.faults
    engine.jobs[call.query.get("correlation_id")] = thing(
        "jobs", description="Importing VM %s" % vm["name"],
        status="failed" if failed else "finished")
    if not failed:
        engine.vms[vm["id"]], engine.ovfs[vm["id"]] = vm, ovf
    return "vm", vm


CALLS = [
    ("GET", "datacenters", list_centers),
    ("GET", "datacenters/ID/storagedomains", list_domains),
    ("GET", "datacenters/ID/clusters", list_clusters),
    ("GET", "storagedomains", list_domains),
    ("GET", "clusters/ID", get_cluster),
    ("GET", "jobs", list_jobs),
    ("POST", "disks", add_disk),
    ("GET", "disks/ID", get_disk),
    ("DELETE", "disks/ID", remove_disk),
    ("POST", "imagetransfers", add_transfer),
    ("GET", "imagetransfers/ID", get_transfer),
    ("POST", "imagetransfers/ID/(cancel|finalize)", end_transfer),
    ("POST", "vms", add_vm),
    ("GET", "vms", list_vms),
    ("GET", "vms/ID", get_vm),
    ("GET", "vms/ID/diskattachments", list_attachments),
]


class _Handler(Handler):

    def do_GET(self):
        engine, body = self.server.model, self.body()
        url = urllib.parse.urlparse(self.path)
        sign = {ROOT + "/sso/oauth/token": engine.sign_on,
                ROOT + "/services/sso-logout": engine.sign_off}.get(url.path)
        if sign:
            status, answer = sign(dict(urllib.parse.parse_qsl(body)))
            self.answer(status, JSON, json.dumps(answer))
        elif self.headers.get("Authorization", "").replace("Bearer ", "") not in engine.tokens:
            self.answer(401, "text/html", "<html>Unauthorized</html>")
        else:
            self._answer_call(engine, url, body)

    do_POST = do_DELETE = do_GET

    def _answer_call(self, engine, url, body):
        call = Call(dict(urllib.parse.parse_qsl(url.query)),
                    ElementTree.fromstring(body) if body.startswith("<") else None,
                    self.headers.get("All-Content") == "true")
        status = 200
        try:
            if body and self.headers.get("Content-Type") not in ("application/xml", JSON):
                raise Refused(415, "")
            tag, content = engine.call(self.command, url.path.replace(API, "", 1), call)
        except Refused as error:
            status, tag = error.status, "fault"
            content = {"reason": "Operation Failed", "detail": str(error)}
        if self.headers.get("Accept") == JSON:
            self.answer(status, JSON, json.dumps(content))
        else:
            self.answer(status, "application/xml;charset=UTF-8", to_xml(tag, content))
