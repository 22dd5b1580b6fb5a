#!/usr/bin/env python3
"""Runs wandb-restore through proxies and through toxiproxy, and checks the bytes, the errors and the time.

  networks.py --build FOLDER --toxiproxy SERVER --mitmdump PROGRAM [--in-namespace] [--match TEXT] [--list]

FOLDER has examples/wandb-restore and tests/wandb-stand-in. With --in-namespace this program is alone in a network and a
mount namespace; without it, the cases that need names and further addresses are left out. Exit status: 0 if no case failed.
"""
import argparse
import base64
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
KEY = "networks0123456789abcdef0123456789abcdef01"
PASSWORD = "p@ss:w/rd%1"
QUOTED = "p%40ss%3Aw%2Frd%251"
SMALL, SPLIT = 300_001, 17 * 1024 * 1024 + 7  # bytes: fetched by one request, and in ranges over several connections
AT_ONCE = 8  # cases; they wait more than they compute
LIVE, DEAD = "192.0.2.1", "192.0.2.2"  # addresses of this machine in the namespace (RFC 5737)
ADDRESSES = f"{LIVE} api.example.test store.example.test\n{DEAD} dead.example.test\n{LIVE} dead.example.test\n"
INNER = f"{LIVE} inner.example.test\n"  # a name that only squid can resolve

given = None  # the arguments
base = None  # the folder of this run
ports = itertools.count(21000)  # below the ephemeral ports
ports_lock = threading.Lock()
started = []  # every program


def free_port(host="127.0.0.1"):
    while True:
        with ports_lock:
            port = next(ports)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError:
                continue


def until(condition, what, seconds=20):
    """Waits until the condition holds, and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return value


def answers(port, host="127.0.0.1"):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def start(command, **how):
    log = open(base / f"{pathlib.Path(command[0]).name}-{len(started)}.log", "wb")
    process = subprocess.Popen([str(part) for part in command], stderr=log, **{"stdin": subprocess.DEVNULL, "stdout": log} | how)
    started.append(process)
    return process


# ---- programs -----------------------------------------------------------------------------------------------------------------


class StandIn:
    """The stand-in for the service. `service` and `storage` are what it calls its two servers; by default their own addresses."""

    def __init__(self, *arguments, service_port=0, storage_port=0, service="", storage="", plain=False, with_folder=True):
        command = [given.build / "tests/wandb-stand-in", "--run", "e/p/r", "--key", KEY,
            "--port", service_port, "--storage-port", storage_port, "--ca", base / f"ca-{free_port()}.pem", "--until-input-ends",
            *arguments]
        command += ["--folder", base / "files"] if with_folder else []
        command += ["--service-url", service] if service else []
        command += ["--storage-url", storage] if storage else []
        command += ["--plain"] if plain else []
        self.process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.says = {}
        for line in self.process.stdout:
            if line == "ready\n":
                break
            name, _, value = line.rstrip("\n").partition("=")
            self.says[name] = value
        else:
            raise SystemExit(f"wandb-stand-in did not start: {command}")
        self.url, self.ca = self.says["base_url"], self.says["ca"]

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Toxiproxy:
    """The interface of the toxiproxy server."""

    def __init__(self):
        self.port = free_port()
        start([given.toxiproxy, "-port", self.port, "-proxy-metrics"])
        until(lambda: answers(self.port), "toxiproxy")

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"User-Agent": "networks.py"}, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read().decode()

    def forward(self, listen, upstream):
        """Forwards from one address and port to another. Returns the name of the forwarder."""
        name = listen.replace("[", "").replace("]", "").replace(":", "_")
        self.ask("POST", "/proxies", {"name": name, "listen": listen, "upstream": upstream})
        return name

    def add(self, name, kind, attributes, stream="downstream"):
        self.ask("POST", f"/proxies/{name}/toxics", {"type": kind, "name": kind, "attributes": attributes, "stream": stream})

    def clear(self, name):
        for toxic in json.loads(self.ask("GET", f"/proxies/{name}/toxics")):
            self.ask("DELETE", f"/proxies/{name}/toxics/{toxic['name']}")

    def enable(self, name, enabled):
        self.ask("POST", f"/proxies/{name}", {"enabled": enabled})

    def sent(self, name):
        """Returns the bytes that went from the server to the client over connections that have ended."""
        found = re.findall(r'sent_bytes_total\{direction="downstream",[^}]*proxy="' + name + r'"[^}]*\} (\S+)',
            self.ask("GET", "/metrics"))
        return sum(int(float(value)) for value in found)


def start_squid():
    folder = base / "squid"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    hashed = subprocess.run(["openssl", "passwd", "-apr1", PASSWORD], capture_output=True, text=True, check=True).stdout
    (folder / "users").write_text(f"user:{hashed}")
    (folder / "hosts").write_text(ADDRESSES + INNER)
    helper = next(path for path in ("/usr/lib/squid/basic_ncsa_auth", "/usr/lib64/squid/basic_ncsa_auth") if os.path.exists(path))
    port = free_port()
    (folder / "squid.conf").write_text(f"""
http_port 127.0.0.1:{port}
auth_param basic program {helper} {folder}/users
auth_param basic children 2 startup=1
acl known proxy_auth REQUIRED
http_access allow known
http_access deny all
hosts_file {folder}/hosts
dns_nameservers 127.0.0.1
cache deny all
access_log none
cache_log {folder}/cache.log
pid_filename none
shutdown_lifetime 0 seconds
coredump_dir {folder}
pinger_enable off
visible_hostname squid.test
""")
    start(["squid", "-N", "-f", folder / "squid.conf"])
    until(lambda: answers(port), "squid")
    return port


def start_mitmproxy(server):
    """Returns the port of a proxy that inspects TLS, and the certificate of its authority."""
    folder, port = base / "mitmproxy", free_port()
    start([given.mitmdump, "--quiet", "--listen-host", "127.0.0.1", "--listen-port", port, "--set", f"confdir={folder}",
        "--set", f"ssl_verify_upstream_trusted_ca={server.ca}", "--set", "connection_strategy=lazy", "--scripts",
        HERE / "mitm.py"], env={**os.environ, "NETWORKS_STRIPPED": str(base / "stripped")})
    until(lambda: answers(port), "mitmproxy", 60)
    return port, folder / "mitmproxy-ca-cert.pem"


def start_nginx(upstreams):
    """Returns ports that nginx forwards to the given ones; its connections end after one second without a request."""
    folder = base / "nginx"
    folder.mkdir()
    listening = [free_port() for _ in upstreams]
    servers = "".join(f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }}\n"
                      for port, upstream in zip(listening, upstreams))
    paths = "".join(f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(f"""
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
access_log off; keepalive_timeout 1s; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
proxy_buffering off;
{paths}{servers}}}
""")
    start(["nginx", "-c", folder / "nginx.conf", "-e", folder / "error.log"])
    until(lambda: answers(listening[0]), "nginx")
    return listening


# ---- one run of wandb-restore -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    status: int
    lines: list
    text: str
    seconds: float


class Place:
    """A home and a root directory, and the environment of one case."""

    def __init__(self, server, **environment):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=base))
        self.root = self.folder / "root"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C.UTF-8", "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": server.url}
        if server.ca and "no_ca" not in environment:
            self.environment["SSL_CERT_FILE"] = server.ca
        environment.pop("no_ca", None)
        self.environment |= {name: str(value) for name, value in environment.items()}

    def begin(self, *names, timeout, with_terminal=False):
        """Starts a run. With a terminal for standard error, it shows progress; see `percent`."""
        command = [given.build / "examples/wandb-restore", "--json", "--run-path", "e/p/r", "--root", self.root, "--timeout",
            str(timeout), *names]
        self.began, self.timeout, self.shown = time.monotonic(), timeout, b""
        ends = os.openpty() if with_terminal else None
        process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=ends[1] if ends else subprocess.PIPE, text=True)
        if ends:
            os.close(ends[1])
            self.reader = threading.Thread(target=self.read_terminal, args=(ends[0],))
            self.reader.start()
        return process

    def read_terminal(self, terminal):
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while piece := os.read(terminal, 4096):
                self.shown += piece
        os.close(terminal)

    def percent(self):
        """Returns the latest progress that the terminal shows."""
        return max((int(value) for value in re.findall(rb" (\d+)% ", self.shown)), default=0)

    def end(self, process):
        # Trying again without progress ends after ten times --timeout; the last try takes a little longer.
        bound = 10 * self.timeout + 2 * self.timeout + 5
        try:
            output, text = process.communicate(timeout=bound - (time.monotonic() - self.began))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f"has not ended within {bound} s") from None
        if text is None:  # the last text on each line of the terminal
            self.reader.join()
            text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in self.shown.decode().split("\n"))
        assert KEY not in text and PASSWORD not in text and QUOTED not in text and "Signature" not in text, f"a secret: {text}"
        return Outcome(process.returncode, [json.loads(line) for line in output.splitlines()], text.strip(),
            time.monotonic() - self.began)

    def run(self, *names, timeout=5):
        return self.end(self.begin(*names, timeout=timeout))

    def restore(self, *names, timeout=5, source="downloaded"):
        """Restores the files; they must have the right bytes."""
        done = self.run(*names, timeout=timeout)
        assert done.status == 0, f"status {done.status}: {done.text}"
        self.check(names, done, source)
        return done

    def check(self, names, done, source="downloaded"):
        for name, line in zip(names, done.lines, strict=True):
            assert line["source"] == source and line["verified"], f"{line}"
            assert (self.root / name).read_bytes() == (base / "files" / name).read_bytes(), f"{name} has wrong bytes"

    def fail(self, name, *words, timeout=1, status=5):
        """Restoring must fail with this status and an error that has these words."""
        done = self.run(name, timeout=timeout)
        self.check_failure(done, name, *words, status=status)
        return done

    def check_failure(self, done, name, *words, status=5):
        assert done.status == status, f"status {done.status}, expected {status}: {done.text}"
        errors = [line for line in done.text.splitlines() if line.startswith("wandb-restore: ") and "warning:" not in line]
        assert len(errors) == 1 and name in errors[0] and len(errors[0]) < 1500, f"no clear error: {done.text}"
        for word in words:
            assert word.lower() in errors[0].lower(), f"the error does not say {word!r}: {errors[0]}"
        assert not (self.root / name).exists(), f"{name} exists after a failure"


# ---- cases --------------------------------------------------------------------------------------------------------------------

CASES = []  # (group, title, function, needs a namespace)
SHARED = {}  # programs that several cases use


def case(group, title, run, needs_namespace=False):
    CASES.append((group, title, run, needs_namespace))


class Line:
    """A stand-in with one file, and a forwarder of toxiproxy for each phase: question, redirect, content."""

    def __init__(self, file, host="127.0.0.1", name=None):
        self.toxiproxy = SHARED["toxiproxy"]
        bracketed = f"[{host}]" if ":" in host else host
        shown = name or bracketed
        service_port, storage_port = free_port(), free_port()
        ends = {phase: free_port(host) for phase in ("question", "redirect", "content")}
        # The service gives an address at the second forwarder. That is another origin, which gets no key: the run is public.
        node = {"text": (base / "files" / file).read_text(), "url": f"https://{shown}:{ends['redirect']}/files/e/p/r/{file}"}
        runs = base / f"runs-{service_port}.json"
        runs.write_text(json.dumps({"e/p/r": {"public": True, "files": {file: node}}}))
        self.server = StandIn("--runs", runs, *(["--host", name] if name else []), with_folder=False, service_port=service_port,
            storage_port=storage_port, service=f"https://{shown}:{ends['question']}", storage=f"https://{shown}:{ends['content']}")
        self.names = {phase: self.toxiproxy.forward(f"{bracketed}:{port}",
            f"127.0.0.1:{storage_port if phase == 'content' else service_port}")
                      for phase, port in ends.items()}
        self.file, self.size = file, (base / "files" / file).stat().st_size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stop()

    def fetched_by(self, run):
        """Calls `run`, and returns its value and the number of bytes of content that it received."""
        name = self.names["content"]
        before = self.toxiproxy.sent(name)
        value = run()
        until(lambda: self.toxiproxy.sent(name) > before, "the count of bytes")
        return value, self.toxiproxy.sent(name) - before


# -- toxics: each in each phase

FILES = {"small": "small.txt", "split": "split.txt"}
ATTRIBUTES = {
    "latency": {"latency": 400},
    "jitter": {"latency": 150, "jitter": 150},
    "bandwidth": {"rate": 1000},  # KB/s of each connection
    "slicer": {"average_size": 2000, "size_variation": 1000, "delay": 100},  # bytes, microseconds
    "limit_data": {"bytes": 200_000},
    "reset_peer": {"timeout": 0},
    "timeout": {"timeout": 0},  # nothing passes
    "timeout of what is sent": {"timeout": 0},
    "slow_close": {"delay": 1000},
}
KINDS = {"jitter": "latency", "timeout of what is sent": "timeout"}


def with_toxic(toxic, phase, file):
    attributes = dict(ATTRIBUTES[toxic])
    if phase != "content":
        attributes |= {"rate": 5} if toxic == "bandwidth" else {"bytes": 1000} if toxic == "limit_data" else {}
    # Cut connections bring the content in parts; all other phases need a whole answer.
    is_fatal = toxic.startswith(("reset_peer", "timeout")) or (toxic == "limit_data" and phase != "content")
    with Line(FILES[file]) as line:
        line.toxiproxy.add(line.names[phase], KINDS.get(toxic, toxic), attributes,
            "upstream" if toxic.endswith("is sent") else "downstream")
        place = Place(line.server)
        if is_fatal:
            place.fail(line.file, "127.0.0.1")
            line.toxiproxy.clear(line.names[phase])
        else:
            place.restore(line.file)
            line.toxiproxy.clear(line.names[phase])
            shutil.rmtree(place.root)
        place.restore(line.file)
        place.restore(line.file, source="local")


for _toxic, _phase, _file in itertools.product(ATTRIBUTES, ("question", "redirect", "content"), FILES):
    case("toxics", f"{_toxic}, {_phase}, {_file} file", lambda toxic=_toxic, phase=_phase,
        file=_file: with_toxic(toxic, phase, file))


# -- a download that breaks off midway, and the next call


def midway(fault):
    with Line("split.txt") as line:
        name = line.names["content"]
        line.toxiproxy.add(name, "bandwidth", {"rate": 1000})
        place = Place(line.server)
        process = place.begin(line.file, timeout=1, with_terminal=True)
        until(lambda: place.percent() >= 30, "30 percent")
        if fault == "unreachable":
            line.toxiproxy.enable(name, False)
        elif fault == "killed":
            process.kill()
        elif fault == "interrupted":
            process.terminate()
        else:
            line.toxiproxy.add(name, fault, {"timeout": 0})
        done = place.end(process)
        if fault == "killed":
            assert done.status == -9, f"status {done.status}: {done.text}"
        else:
            place.check_failure(done, line.file, "the next call resumes" if fault != "interrupted" else "",
                status=130 if fault == "interrupted" else 5)
        line.toxiproxy.enable(name, True)
        line.toxiproxy.clear(name)
        _, fetched = line.fetched_by(lambda: place.restore(line.file))
        assert fetched < 0.8 * line.size, f"fetched {fetched} bytes of {line.size}: what was there is not reused"
        place.restore(line.file, source="local")


for _fault in ("timeout", "reset_peer", "unreachable", "killed", "interrupted"):
    case("midway", f"{_fault}, then a second call", lambda fault=_fault: midway(fault))


def recovers(fault):
    """The fault ends before the limit without progress: the same call goes on."""
    with Line("split.txt") as line:
        name = line.names["content"]
        line.toxiproxy.add(name, "bandwidth", {"rate": 1000})
        place = Place(line.server)
        process = place.begin(line.file, timeout=3, with_terminal=True)
        until(lambda: place.percent() >= 20, "20 percent")
        if fault == "unreachable":
            line.toxiproxy.enable(name, False)
            line.toxiproxy.enable(name, True)
        else:
            line.toxiproxy.add(name, fault, {"timeout": 0})
        line.toxiproxy.clear(name)
        done = place.end(process)
        assert done.status == 0, f"status {done.status}: {done.text}"
        place.check([line.file], done)


for _fault in ("timeout", "reset_peer", "unreachable"):
    case("midway", f"{_fault} for a moment, one call", lambda fault=_fault: recovers(fault))


# -- addresses


def over_ipv6(file):
    with Line(FILES[file], host="::1") as line:
        Place(line.server).restore(line.file)


def with_dead_address(file):
    """The name's first address takes no connection: its queue of connections is full, so that the system drops further ones."""
    with Line(FILES[file], host=LIVE, name="dead.example.test") as line, contextlib.ExitStack() as stack:
        for phase in line.names:
            listener = stack.enter_context(socket.socket())
            listener.bind((DEAD, int(line.names[phase].rpartition("_")[2])))
            listener.listen(0)
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
        Place(line.server).restore(line.file)


for _file in FILES:
    case("addresses", f"IPv6, {_file} file", lambda file=_file: over_ipv6(file))
    case("addresses", f"the first address is dead, {_file} file", lambda file=_file: with_dead_address(file), needs_namespace=True)


# -- connections that the server ends after a second without a request


def short_keepalive(names):
    service_port, storage_port = free_port(), free_port()
    front = start_nginx([service_port, storage_port])
    server = StandIn("--rate", 150_000, service_port=service_port, storage_port=storage_port,
        service=f"http://127.0.0.1:{front[0]}",
        storage=f"http://127.0.0.1:{front[1]}", plain=True)
    Place(server).restore(*names)
    server.stop()


# Each small file takes two seconds, in which the connection to the service has no request.
case("nginx", "keepalive_timeout 1s, three files in one call", lambda: short_keepalive(["small.txt", "small-2.txt", "small-3.txt"]))


# -- squid: CONNECT with Basic authentication


def squid(password="", scheme="http", user="user"):
    return f"{scheme}://{user}:{password}@127.0.0.1:{SHARED['squid']}" if password else f"{scheme}://127.0.0.1:{SHARED['squid']}"


def through_squid(names, **environment):
    Place(SHARED["inner"], **environment).restore(*names)


def squid_refuses(environment, *words):
    Place(SHARED["inner"], **environment).fail("small.txt", *words)


for _variable in ("HTTPS_PROXY", "https_proxy", "WANDB_HTTPS_PROXY"):
    case("squid", f"{_variable}, right password",
        lambda variable=_variable: through_squid(["small.txt"], **{variable: squid(QUOTED)}), True)
    case("squid", f"{_variable}, wrong password",
        lambda variable=_variable: squid_refuses({variable: squid("wrong-password")}, "407", "proxy"), True)
    case("squid", f"{_variable}, no password", lambda variable=_variable: squid_refuses({variable: squid()}, "407", "proxy"), True)
case("squid", "no scheme in HTTPS_PROXY", lambda: through_squid(["small.txt"], HTTPS_PROXY=squid(QUOTED).partition("//")[2]), True)
case("squid", "split file", lambda: through_squid(["split.txt"], HTTPS_PROXY=squid(QUOTED)), True)
case("squid", "several files", lambda: through_squid(["small.txt", "small-2.txt", "small-3.txt"], HTTPS_PROXY=squid(QUOTED)), True)
case("squid", "Proxy-Authorization as an extra header", lambda: through_squid(["small.txt"], HTTPS_PROXY=squid(),
    WANDB__EXTRA_HTTP_HEADERS=json.dumps({"Proxy-Authorization": "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()})), True)
case("squid", "nothing listens at the proxy's port",
    lambda: squid_refuses({"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}"}, "proxy", "refused"), True)
case("squid", "a server that the proxy cannot reach", lambda: Place(SHARED["inner"], HTTPS_PROXY=squid(QUOTED),
    WANDB_BASE_URL=f"https://{LIVE}:1").fail("small.txt", "503"), True)
case("squid", "plain HTTP, right password",
    lambda: Place(SHARED["plain inner"], HTTP_PROXY=squid(QUOTED)).restore("small.txt", "split.txt"), True)
case("squid", "plain HTTP, wrong password",
    lambda: Place(SHARED["plain inner"], HTTP_PROXY=squid("wrong-password")).fail("small.txt", "407"), True)
case("squid", "WANDB_HTTPS_PROXY to this machine, right password",
    lambda: Place(SHARED["loopback"], WANDB_HTTPS_PROXY=squid(QUOTED)).restore("small.txt", "split.txt"))
case("squid", "WANDB_HTTPS_PROXY to this machine, wrong password",
    lambda: Place(SHARED["loopback"], WANDB_HTTPS_PROXY=squid("wrong-password")).fail("small.txt", "407"))


# -- NO_PROXY: the proxy refuses, so that a restore succeeds only if neither request goes through it


def no_proxy(server, value, way, variable="NO_PROXY", proxy="HTTPS_PROXY"):
    place = Place(SHARED[server], **{variable: value, proxy: squid("wrong-password")})
    if way == "direct":
        place.restore("small.txt")
    else:
        done = place.fail("small.txt", "407")
        question = SHARED[server].url.partition("//")[2].partition(":")[0]
        is_question = f"POST https://{question}" in done.text or "looking for" in done.text
        assert is_question == (way == "proxied"), f"expected: {way}; {done.text}"


NO_PROXY = [  # server, value, which requests go through the proxy: none, all, or those to storage
    ("named", "api.example.test,store.example.test", "direct"),
    ("named", "api.example.test", "storage proxied"),
    ("named", ".example.test", "direct"),
    ("named", "*.example.test", "direct"),
    ("named", "example.test", "direct"),
    ("named", "ample.test", "proxied"),
    ("named", "API.example.TEST, Store.Example.test", "direct"),
    ("named", "api.example.test:443,store.example.test:8443", "direct"),
    ("named", "api.example.test:443,store.example.test:443", "storage proxied"),
    ("named", "api.example.test:444", "proxied"),
    ("named", ".example.test:443", "storage proxied"),
    ("named", "*", "direct"),
    ("named", "192.0.2.0/24", "proxied"),  # no proxy's name is looked up, as in Go
    ("named", "", "proxied"),
    ("addressed", "192.0.2.1", "direct"),
    ("addressed", "192.0.2.1:9443", "storage proxied"),
    ("addressed", "192.0.2.0/24", "direct"),
    ("addressed", "192.0.3.0/24", "proxied"),
    ("addressed", "0.0.0.0/0", "direct"),
    ("addressed", "2.1", "proxied"),
]
for _server, _value, _way in NO_PROXY:
    case("NO_PROXY", f"{_value!r}, server {_server}: {_way}", lambda server=_server, value=_value,
        way=_way: no_proxy(server, value, way), True)
case("NO_PROXY", "no_proxy in lower case", lambda: no_proxy("named", ".example.test", "direct", variable="no_proxy"), True)
case("NO_PROXY", "does not count for WANDB_HTTPS_PROXY", lambda: no_proxy("named", "*", "proxied", proxy="WANDB_HTTPS_PROXY"), True)
case("NO_PROXY", "unset, a server on this machine", lambda: no_proxy("loopback", "", "direct"))


# -- mitmproxy: TLS is inspected


def inspected(*names, server="loopback", fails=None, timeout=5, **environment):
    port, authority = SHARED["mitmproxy"]
    directory = base / "authorities"
    values = {"@CA@": authority, "@CA_DIRECTORY@": directory, "@OTHER_CA@": SHARED[server].ca}
    environment = {name: values.get(value, value) for name, value in environment.items()}
    place = Place(SHARED[server], no_ca=True, WANDB_HTTPS_PROXY=f"http://127.0.0.1:{port}", **environment)
    if fails is None:
        return place.restore(*names, timeout=timeout)
    status, words = fails
    return place.fail(names[0], *words, status=status, timeout=timeout)


def without_range():
    inspected("strip-range.txt", SSL_CERT_FILE="@CA@")
    assert (base / "stripped").exists(), "no request had a Range"


def permanent(**environment):
    """The certificate is refused at once: a retry cannot help."""
    done = inspected("small.txt", fails=(5, ["certificate", "SSL_CERT_FILE"]), timeout=5, **environment)
    assert "gave up after" not in done.text, f"was retried: {done.text}"


for _variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
    case("mitmproxy", f"its authority in {_variable}", lambda variable=_variable: inspected("small.txt", **{variable: "@CA@"}))
for _variable in ("SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
    case("mitmproxy", f"its authority in a directory in {_variable}",
        lambda variable=_variable: inspected("small.txt", **{variable: "@CA_DIRECTORY@"}))
case("mitmproxy", "its authority nowhere", permanent)
case("mitmproxy", "another authority in SSL_CERT_FILE", lambda: permanent(SSL_CERT_FILE="@OTHER_CA@"))
case("mitmproxy", "WANDB_INSECURE_DISABLE_SSL", lambda: inspected("small.txt", WANDB_INSECURE_DISABLE_SSL="true"))
case("mitmproxy", "split file", lambda: inspected("split.txt", SSL_CERT_FILE="@CA@"))
case("mitmproxy", "it removes Range", without_range)
case("mitmproxy", "it compresses", lambda: inspected("compress.txt", SSL_CERT_FILE="@CA@",
    fails=(6, ['Content-Encoding is "gzip"', "a proxy may be compressing"])))
case("mitmproxy", "it answers with a login page", lambda: inspected("login.txt", SSL_CERT_FILE="@CA@",
    fails=(6, ["text/html", "Sign in to the network", "a login page or proxy may answer"])))


# ---- the run ------------------------------------------------------------------------------------------------------------------


def write_files():
    folder = base / "files"
    folder.mkdir()
    sizes = {"small.txt": SMALL, "small-2.txt": SMALL, "small-3.txt": SMALL, "login.txt": SMALL, "split.txt": SPLIT,
        "strip-range.txt": SPLIT}
    for seed, (name, size) in enumerate(sizes.items()):
        (folder / name).write_text(random.Random(seed).randbytes(size // 2 + 1).hex()[:size])
    (folder / "compress.txt").write_text("compressible " * 20_000)


def start_shared(chosen):
    """Starts the programs that several of the chosen cases use."""
    SHARED["toxiproxy"] = toxiproxy = Toxiproxy()
    groups = {group for group, *_ in chosen}
    if not groups & {"squid", "NO_PROXY", "mitmproxy"}:
        return
    SHARED["loopback"] = StandIn()
    if groups & {"squid", "NO_PROXY"}:
        SHARED["squid"] = start_squid()
    if "mitmproxy" in groups:
        SHARED["mitmproxy"] = start_mitmproxy(SHARED["loopback"])
        (base / "authorities").mkdir()
        shutil.copy(SHARED["mitmproxy"][1], base / "authorities" / "mitmproxy.pem")
        subprocess.run(["openssl", "rehash", base / "authorities"], check=True)
    if given.in_namespace:
        for name, host, store, service_port, storage_port, plain in (("named", "api.example.test", "store.example.test", 443,
            8443, False),
            ("addressed", LIVE, LIVE, 9443, 9444, False), ("inner", "inner.example.test", "inner.example.test", 7443, 7444, False),
            ("plain inner", "inner.example.test", "inner.example.test", 7080, 7081, True)):
            scheme, real = "http" if plain else "https", (free_port(), free_port())
            shown = f"{scheme}://{host}" + ("" if service_port == 443 else f":{service_port}")
            SHARED[name] = StandIn("--host", host, *(["--host", store] if store != host else []), service_port=real[0],
                storage_port=real[1],
                service=shown, storage=f"{scheme}://{store}:{storage_port}", plain=plain)
            for listening, port in ((service_port, real[0]), (storage_port, real[1])):
                toxiproxy.forward(f"{LIVE}:{listening}", f"127.0.0.1:{port}")


def enter_namespace():
    for command in ("ip link set lo up", f"ip address add {LIVE}/32 dev lo", f"ip address add {DEAD}/32 dev lo"):
        subprocess.run(command.split(), check=True)
    (base / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n" + ADDRESSES)
    subprocess.run(["mount", "--bind", base / "hosts", "/etc/hosts"], check=True)


def run_all(chosen):
    failed, output = 0, threading.Lock()

    def run(entry):
        nonlocal failed
        group, title, function, _ = entry
        began, problem = time.monotonic(), None
        try:
            function()
        except Exception as error:  # a failure of one case is no reason to leave out the others
            problem = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
        with output:
            failed += problem is not None
            took = f"{time.monotonic() - began:.1f} s"
            print(f"{'FAILED' if problem else 'ok'}  {group}: {title} ({took})" + (f": {problem}" if problem else ""), flush=True)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, chosen))
    return failed


def main():
    global given, base
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--toxiproxy", required=True)
    parser.add_argument("--mitmdump", required=True)
    parser.add_argument("--in-namespace", action="store_true")
    parser.add_argument("--match", default="", help="only cases whose group and title contain this")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    given = parser.parse_args()

    matching = [entry for entry in CASES if given.match in f"{entry[0]}: {entry[1]}"]
    chosen = [entry for entry in matching if given.in_namespace or not entry[3]]
    if given.list:
        print("\n".join(f"{group}: {title}" for group, title, *_ in matching))
        return 0
    if not chosen:
        print(f"no case contains {given.match!r}")
        return 1
    for entry in matching:
        if entry not in chosen:
            print(f"left out  {entry[0]}: {entry[1]} (needs a network namespace, and so root)")
    began = time.monotonic()
    base = pathlib.Path(tempfile.mkdtemp(prefix="wandb-networks-"))
    base.chmod(0o755)  # squid gives up root
    failed = None
    try:
        if given.in_namespace:
            enter_namespace()
        write_files()
        start_shared(chosen)
        failed = run_all(chosen)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        if failed is None:
            for log in sorted(base.glob("*.log")):
                print(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
        shutil.rmtree(base, ignore_errors=True)
    left_out = f", {len(matching) - len(chosen)} left out" if len(matching) > len(chosen) else ""
    print(f"{len(chosen)} cases, {failed} failed{left_out}; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
