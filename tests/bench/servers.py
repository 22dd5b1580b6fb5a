"""Starts nginx as the service and its storage, and builds the network between nginx and the contenders.
SPDX-License-Identifier: MIT"""

import base64
import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

MIB = 1024 * 1024

CONFIGURATION = """
{user}
daemon off;
worker_processes 2;  # the same for all contenders: one for each core here, as a server would have
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  default_type application/octet-stream;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  ssl_certificate {folder}/server.pem;
  ssl_certificate_key {folder}/server.key;
  server_tokens off;
  keepalive_requests 100000;

  # The service. The first segment of a base URL names the file, the storage and the run of the benchmark.
  map $file $md5 {{ {md5s} }}
  map $file $size {{ {sizes} }}
  map $kind $storage {{ free {free}; paced {paced}; far {far}; }}
  log_format service '$who question=$question status=$status';
  server {{
    listen {address}:{service_port} ssl;
    location ~ ^/(?<file>[a-z0-9]+)-(?<kind>free|paced|far)-(?<who>[a-z0-9]+)/graphql$ {{
      set $question graphql;
      access_log {folder}/access.log service;
      default_type application/json;
      return 200 '{answer}';
    }}
    location ~ ^/(?<file>[a-z0-9]+)-(?<kind>free|paced|far)-(?<who>[a-z0-9]+)/files/ {{
      set $question files;
      access_log {folder}/access.log service;
      return 302 https://{address}:$storage/$file?who=$who&X-Goog-Signature=0123456789abcdef;
    }}
  }}

  # Its storage: connections to the second port are paced by the kernel (pace.cpp).
  log_format storage '$arg_who question=storage status=$status bytes=$body_bytes_sent connection=$connection range=$http_range';
  server {{
    listen {address}:{free} ssl;
    listen {address}:{paced} ssl;
    root {folder}/files;
    access_log {folder}/access.log storage;
  }}
}}
"""

ANSWER = (
    '{"data":{"project":{"run":{"fileCount":1,"files":{"edges":[{"node":{"id":"1","name":"$file",'
    '"url":"https://ADDRESS:PORT/$file-$kind-$who/files/entity/project/run/$file","directUrl":"","sizeBytes":"$size",'
    '"mimetype":"application/octet-stream","updatedAt":"2024-01-01T00:00:00","md5":"$md5"},"cursor":"1"}],'
    '"pageInfo":{"endCursor":"1","hasNextPage":false}}}}}}'
)


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def make_certificates(folder, addresses):
    """Makes a CA, a server certificate, and a bundle of the distribution's CAs followed by this one."""
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=Benchmark CA",
        "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=benchmark",
        "-keyout", folder / "server.key", "-out", folder / "server.csr")
    names = folder / "names"
    names.write_text("subjectAltName=" + ",".join("IP:" + address for address in addresses))
    run("openssl", "x509", "-req", "-in", folder / "server.csr", "-CA", folder / "ca.pem", "-CAkey", folder / "ca.key",
        "-CAcreateserial", "-days", "30", "-extfile", names, "-out", folder / "server.pem")
    for bundle in ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"):
        if os.path.exists(bundle):
            both = Path(bundle).read_text() + (folder / "ca.pem").read_text()
            (folder / "bundle.pem").write_text(both)
            break


class Files:
    """Random files. Each is made once; every server serves them."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.md5, self.size = {}, {}

    def make(self, name, size):
        if name not in self.size:
            digest, left = hashlib.md5(), size
            with open(self.folder / name, "wb") as out:
                while left > 0:
                    piece = os.urandom(min(left, 4 * MIB))
                    digest.update(piece)
                    out.write(piece)
                    left -= len(piece)
            self.size[name], self.md5[name] = size, digest
        return name

    def hex(self, name):
        return self.md5[name].hexdigest()

    def base64(self, name):
        return base64.b64encode(self.md5[name].digest()).decode()


class Pace:
    """The memory that pace.cpp reads: the rates of connections to the paced port."""

    def __init__(self, path):
        self.path = path
        path.write_bytes(bytes(20))
        with open(path, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 20)

    def set(self, port, rate, slow=0, slow_rate=0):
        self.shared[:] = struct.pack("=5I", port, rate, slow_rate, slow, 0)

    def connections(self):
        return struct.unpack("=5I", self.shared[:])[4]


class Site:
    """A running nginx. `inside` and `from_` are command prefixes: they run a command in the server's or the clients' network."""

    def __init__(self, folder, files, pace_library, address="127.0.0.1", inside=(), from_=()):
        self.folder, self.files, self.address, self.from_ = folder, files, address, list(from_)
        self.counter = 0
        self.pace = Pace(folder / "pace")
        if inside:
            self.service_port, self.free, self.paced, self.far = 8443, 8444, 8445, 8446
        else:
            self.service_port, self.free, self.paced, self.far = free_ports(4)
        answer = ANSWER.replace("ADDRESS:PORT", "%s:%d" % (address, self.service_port))
        (folder / "nginx.conf").write_text(CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "", folder=folder, address=address, answer=answer,
            service_port=self.service_port, free=self.free, paced=self.paced, far=self.far,
            md5s=" ".join('%s "%s";' % (name, files.base64(name)) for name in files.size),
            sizes=" ".join("%s %d;" % item for item in files.size.items())))
        (folder / "files").symlink_to(files.folder)
        self.log = folder / "access.log"
        self.log.touch()
        environment = dict(os.environ, LD_PRELOAD=str(pace_library), PACE_FILE=str(self.pace.path))
        self.process = subprocess.Popen(
            [*inside, "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(folder / "start.log", "wb"))
        for _ in range(100):
            if subprocess.run([*self.from_, "curl", "-sk", "-o", "/dev/null", "https://%s:%d/" % (address, self.free)]).returncode == 0:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise SystemExit("nginx does not start: " + (folder / "start.log").read_text() +
                         (folder / "error.log").read_text())

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def base(self, file, kind="free"):
        """Returns a new base URL for a run, and the run's name in the log."""
        self.counter += 1
        who = "r%d" % self.counter
        return "https://%s:%d/%s-%s-%s" % (self.address, self.service_port, file, kind, who), who

    def storage(self, file, kind="free"):
        port = {"free": self.free, "paced": self.paced, "far": self.far}[kind]
        return "https://%s:%d/%s?who=peer" % (self.address, port, file)

    def requests(self, who):
        """Returns the log entries of one run, once no more are written."""
        size = -1
        while size != self.log.stat().st_size:
            size = self.log.stat().st_size
            time.sleep(0.15)
        found = []
        for line in self.log.read_text().splitlines():
            name, *fields = line.split(" ")
            if name == who:
                found.append(dict(field.split("=", 1) for field in fields))
        return found

    def bytes_sent(self, who):
        return sum(int(one["bytes"]) for one in self.requests(who) if one["question"] == "storage")


class Relay:
    """Delays the bytes from a server by `milliseconds`, and limits each connection to `rate` bytes a second (relay.cpp)."""

    def __init__(self, program, port, server, milliseconds, rate=0):
        self.process = subprocess.Popen([str(program), str(port), str(server), str(milliseconds), str(rate)], stdin=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise SystemExit("the relay does not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class ShapedLink:
    """Two network namespaces with a virtual cable. A token bucket limits the bytes from the server."""

    address = "10.213.77.2"

    def __init__(self, bytes_per_second):
        self.names = ["wandb-bench-%s-%d" % (end, os.getpid()) for end in ("client", "server")]
        client, server = self.names
        self.problem = None
        if os.geteuid() != 0:
            self.problem = "needs root (network namespaces and tc)"
        elif not shutil.which("ip") or not shutil.which("tc"):
            self.problem = "needs ip and tc (package iproute2)"
        if self.problem:
            return
        try:
            for name in self.names:
                run("ip", "netns", "add", name)
                run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "link", "add", "wire", "netns", client, "type", "veth", "peer", "name", "wire", "netns", server)
            for name, address in ((client, "10.213.77.1/24"), (server, self.address + "/24")):
                run("ip", "-n", name, "address", "add", address, "dev", "wire")
                run("ip", "-n", name, "link", "set", "wire", "up")
            # The bucket holds the bytes of 8 ms. The queue is long enough that no packet is dropped.
            run("tc", "-n", server, "qdisc", "add", "dev", "wire", "root", "tbf", "rate", "%dbit" % (8 * bytes_per_second),
                "burst", "2mb", "limit", "128mb")
        except subprocess.CalledProcessError as failure:
            self.problem = "cannot be set up here: " + failure.stderr.strip()
            self.close()

    def inside(self):
        return ["ip", "netns", "exec", self.names[1]]

    def from_(self):
        return ["ip", "netns", "exec", self.names[0]]

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def machine(programs):
    """Returns the machine and the versions that the figures depend on, as pairs of name and value."""
    def first(pattern, text):
        found = re.search(pattern, text, re.MULTILINE)
        return found.group(1).strip() if found else "unknown"

    cpu = first(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = int(first(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())) / MIB
    nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return [
        ("CPU", "%s, %d cores, shared by server and client" % (cpu, len(os.sched_getaffinity(0)))),
        ("memory", "%.0f GiB" % memory),
        ("kernel", os.uname().sysname + " " + os.uname().release +
         (", TCP " + control.read_text().strip() if control.exists() else "")),
        ("nginx", first(r"nginx/(\S+)", nginx) + ", 2 workers"),
        ("curl", first(r"^curl (\S+)", run("curl", "--version")) + ", " +
         first(r"^curl .*?(OpenSSL/\S+|GnuTLS/\S+)", run("curl", "--version"))),
        ("aria2", first(r"^aria2 version (\S+)", run("aria2c", "--version")) + ", " +
         first(r"^(?:Compiled|Libraries).*?((?:OpenSSL|GnuTLS)/\S+)", run("aria2c", "--version"))),
        ("OpenSSL", first(r"^OpenSSL (\S+)", run("openssl", "version"))),
        ("wandb-restore", first(r"(\S+)$", run(programs / "wandb-restore", "--version")) + ", -O2"),
    ]


if __name__ == "__main__":
    print(json.dumps(machine(Path(".")), indent=1))
