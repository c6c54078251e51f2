"""
A simulated ESX server: TLS on loopback, at a port the kernel chooses.

It answers the SOAP calls that libvirt's ESX driver (seen with libvirt 9.0) makes to connect,
log in, find a virtual machine and read its description; any other call gets a fault that
names it. What it knows of the machines is the list `EsxServer.guests`, which may change while
the server runs. Disks are not served here: that is VDDK's part.
"""

import re
import time
import urllib.parse

from collections import namedtuple
from xml.sax.saxutils import escape, unescape

from web import Handler, VmwareServer

DATASTORE = "ds"

ENVELOPE = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"'
    ' xmlns:xsd="http://www.w3.org/2001/XMLSchema"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
    "<soapenv:Body>%s</soapenv:Body></soapenv:Envelope>"
)

ABOUT = {
    "name": "VMware ESXi",
    "fullName": "VMware ESXi 7.0.3 (simulated)",
    "vendor": "VMware, Inc.",
    "version": "7.0.3",
    "build": "1",
    "osType": "vmnix-x86",
    "productLineId": "embeddedEsx",
    "apiType": "HostAgent",
    "apiVersion": "7.0.3",
}

# The managers a client gets to know first: element, type and id.
MANAGERS = [
    ("rootFolder", "Folder", "root-folder"),
    ("propertyCollector", "PropertyCollector", "property-collector"),
    ("viewManager", "ViewManager", "view-manager"),
    ("sessionManager", "SessionManager", "session-manager"),
    ("perfManager", "PerformanceManager", "performance-manager"),
    ("fileManager", "FileManager", "file-manager"),
    ("virtualDiskManager", "VirtualDiskManager", "disk-manager"),
    ("searchIndex", "SearchIndex", "search-index"),
]


class Guest(namedtuple("Guest", "name id uuid disk_count networks")):
    """A virtual machine; its disks are GUEST.vmdk, GUEST_1.vmdk, ... on the datastore. It has one
    NIC in each network."""

    def disk_names(self):
        """Return the file names of the disks, the system disk first."""
        numbers = [""] + ["_%d" % n for n in range(1, self.disk_count)]
        return ["%s%s.vmdk" % (self.name, number) for number in numbers]

    def disk_paths(self):
        """Return the datastore paths of the disks, as a controller would list them."""
        return ["[%s] %s/%s" % (DATASTORE, self.name, disk) for disk in self.disk_names()]

    def mac_address(self, number):
        """Return the MAC address of the NIC."""
        return "00:50:56:82:%02x:%02x" % (int(self.id), number + 1)


class EsxServer(VmwareServer):
    """The server. `guests` may change while it runs."""

    def __init__(self, certificate, password, guests):
        """Take the path of a PEM file with certificate and key, the password of root, and
        the guests there are."""
        super().__init__(certificate, _Handler, self)
        self.password = password
        self.guests = list(guests)


# Values of the properties, as XML with the type libvirt checks.

def _element(tag, kind, content):
    return '<%s type="%s">%s</%s>' % (tag, kind, content, tag)


def _value(kind, content, attributes=""):
    return '<val xsi:type="%s"%s>%s</val>' % (kind, attributes, content)


def _text(content):
    return _value("xsd:string", escape(content))


def _reference(kind, name):
    return _value("ManagedObjectReference", name, ' type="%s"' % kind)


def _host_reference():
    reference = '<ManagedObjectReference xsi:type="ManagedObjectReference" type="HostSystem">'
    return _value("ArrayOfManagedObjectReference", reference + "host</ManagedObjectReference>")


def _cpu_features():
    """The CPUID leaves; bit 29 of the extended leaf's edx says that it is a 64-bit host."""
    none = ":".join(["0000"] * 8)
    long_mode = ":".join(["0010"] + ["0000"] * 7)
    leaves = ""
    for level, edx in ((0, none), (1, none), (-2147483648, long_mode), (-2147483647, long_mode)):
        registers = "<eax>%s</eax><ebx>%s</ebx><ecx>%s</ecx><edx>%s</edx>" % (none, none, none, edx)
        leaves += '<HostCpuIdInfo xsi:type="HostCpuIdInfo"><level>%d</level>%s</HostCpuIdInfo>' % (
            level, registers)
    return _value("ArrayOfHostCpuIdInfo", leaves)


def _session():
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return (
        "<key>session</key><userName>root</userName><fullName>Administrator</fullName>"
        "<loginTime>%s</loginTime><lastActiveTime>%s</lastActiveTime>"
        "<locale>en</locale><messageLocale>en</messageLocale>" % (now, now)
    )


def _guest_properties(guest):
    return {
        "name": _text(guest.name),
        "config.uuid": _text(guest.uuid),
        "config.instanceUuid": _text(guest.uuid),   # what libvirt 12 asks for
        "runtime.powerState": _value("VirtualMachinePowerState", "poweredOff"),
        "configStatus": _value("ManagedEntityStatus", "green"),
        "config.files.vmPathName": _text("[%s] %s/%s.vmx" % (DATASTORE, guest.name, guest.name)),
        "parent": _reference("Folder", "vm-folder"),
        "config.hardware.memoryMB": _value("xsd:int", "1024"),
    }


def _inventory(guests):
    """Return the properties of every object the server knows, by type and id."""
    inventory = {
        ("Datacenter", "ha-datacenter"): {
            "name": _text("ha-datacenter"),
            "vmFolder": _reference("Folder", "vm-folder"),
            "hostFolder": _reference("Folder", "host-folder"),
        },
        ("ComputeResource", "compute"): {
            "name": _text("esx.example.com"),
            "host": _host_reference(),
            "resourcePool": _reference("ResourcePool", "pool"),
        },
        ("HostSystem", "host"): {
            "name": _text("esx.example.com"),
            "hardware.systemInfo.uuid": _text("4c4c4544-0000-4000-8000-000000000000"),
            "hardware.cpuFeature": _cpu_features(),
            "runtime.inMaintenanceMode": _value("xsd:boolean", "false"),
            "configManager.datastoreSystem": _reference("HostDatastoreSystem", "stores"),
            "summary.hardware.cpuModel": _text("simulated"),
            "capability.maxSupportedVcpus": _value("xsd:int", "128"),
        },
        ("Datastore", "datastore"): {
            "summary.name": _text(DATASTORE),
            "summary.accessible": _value("xsd:boolean", "true"),
            "summary.type": _text("VMFS"),
            "summary.url": _text("/vmfs/volumes/" + DATASTORE),
        },
        ("SessionManager", "session-manager"): {
            "currentSession": _value("UserSession", _session()),
        },
    }
    for guest in guests:
        inventory["VirtualMachine", guest.id] = _guest_properties(guest)
    return inventory


def vmx(guest):
    """Return the guest's VMX file, from which libvirt makes its domain XML."""
    digits = guest.uuid.replace("-", "")
    pairs = [digits[i:i + 2] for i in range(0, 32, 2)]
    settings = {
        ".encoding": "UTF-8",
        "config.version": "8",
        "virtualHW.version": "14",
        "displayName": guest.name,
        "memSize": "1024",
        "numvcpus": "1",
        "guestOS": "debian10-64",
        "uuid.bios": " ".join(pairs[:8]) + "-" + " ".join(pairs[8:]),
        "scsi0.present": "true",
        "scsi0.virtualDev": "pvscsi",
    }
    for number, network in enumerate(guest.networks):
        settings["ethernet%d.present" % number] = "true"
        settings["ethernet%d.virtualDev" % number] = "vmxnet3"
        settings["ethernet%d.networkName" % number] = network
        settings["ethernet%d.addressType" % number] = "vpx"
        settings["ethernet%d.generatedAddress" % number] = guest.mac_address(number)
    for number, disk in enumerate(guest.disk_names()):
        settings["scsi0:%d.present" % number] = "true"
        settings["scsi0:%d.deviceType" % number] = "scsi-hardDisk"
        settings["scsi0:%d.fileName" % number] = disk
    return "".join('%s = "%s"\n' % setting for setting in settings.items())


# The calls. Each takes the server and the request and returns the content of the answer.

def _retrieve_service_content(esx, request):
    about = "".join("<%s>%s</%s>" % (key, value, key) for key, value in ABOUT.items())
    managers = "".join(_element(*manager) for manager in MANAGERS)
    return "<returnval>%s<about>%s</about></returnval>" % (managers, about)


def _login(esx, request):
    if (_field("userName", request), _field("password", request)) != ("root", esx.password):
        raise _Fault("Cannot complete login due to an incorrect user name or password.")
    return "<returnval>%s</returnval>" % _session()


def _logout(esx, request):
    return ""


def _session_is_active(esx, request):
    return "<returnval>true</returnval>"


def _find_by_uuid(esx, request):
    uuid = _field("uuid", request).lower()
    found = [guest.id for guest in esx.guests if guest.uuid == uuid]
    return _element("returnval", "VirtualMachine", found[0]) if found else ""


def _retrieve_properties(esx, request):
    """Give the wanted properties of the object named, or of all objects of the type wanted
    where the object named is but the place to start from (another type)."""
    wanted = re.search(r"<propSet[^>]*>.*?<type[^>]*>(\w+)</type>", request, re.S).group(1)
    names = re.findall(r"<pathSet[^>]*>([^<]+)</pathSet>", request)
    start = re.search(r'<obj [^>]*type="(\w+)"[^>]*>([^<]*)</obj>', request)
    if wanted == "ManagedEntity":
        wanted = start.group(1)
    answer = ""
    for (kind, name), properties in _inventory(esx.guests).items():
        if kind != wanted or (kind == start.group(1) and name != start.group(2)):
            continue
        values = "".join("<propSet><name>%s</name>%s</propSet>" % (key, properties[key])
                         for key in names if key in properties)
        answer += "<returnval>%s%s</returnval>" % (_element("obj", kind, name), values)
    return answer


CALLS = {
    "RetrieveServiceContent": _retrieve_service_content,
    "Login": _login,
    "Logout": _logout,
    "SessionIsActive": _session_is_active,
    "FindByUuid": _find_by_uuid,
    "RetrieveProperties": _retrieve_properties,
}


class _Fault(Exception):
    """The call is refused with this text."""


def _field(tag, request):
    found = re.search("<%s[^>]*>([^<]*)</%s>" % (tag, tag), request)
    return unescape(found.group(1), {"&quot;": '"', "&apos;": "'"}) if found else ""


class _Handler(Handler):

    def do_GET(self):
        name = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).split("/")[-1]
        for guest in self.server.model.guests:
            if name == guest.name + ".vmx":
                return self._answer(200, vmx(guest))
        self._answer(404, "not found")

    def do_POST(self):
        request = self.body()
        method = re.search(r"Body>\s*<(\w+)", request).group(1)
        try:
            if method not in CALLS:
                raise _Fault("the simulated server does not know the method " + method)
            content = CALLS[method](self.server.model, request)
        except _Fault as fault:
            self._answer(500, ENVELOPE % (
                "<soapenv:Fault><faultcode>ServerFaultCode</faultcode>"
                "<faultstring>%s</faultstring></soapenv:Fault>" % escape(str(fault))))
        else:
            self._answer(200, ENVELOPE % (
                '<%sResponse xmlns="urn:vim25">%s</%sResponse>' % (method, content, method)))

    def _answer(self, status, text):
        self.answer(status, "text/xml; charset=utf-8", text,
                    Set_Cookie='vmware_soap_session="session"; Path=/; Secure')
