#!/usr/bin/env python3
"""Restores from object stores through wandb-restore: the stand-in for the service leads /files/... to addresses that the stores' own
clients signed. Prints a line for each case; exit status: 0 if each ended with the right bytes, or with the right exit status and text.

  cases.py --build FOLDER --tools FOLDER [--match TEXT] [--quick]

FOLDER of --build has examples/wandb-restore and tests/wandb-stand-in; that of --tools has versitygw and azurite-blob.
SPDX-License-Identifier: MIT
"""
import argparse
import concurrent.futures
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import urllib.parse

import stores
from stores import MIB, content, md5

AT_ONCE = 3  # cases
SECONDS = 60  # for one process; each of them ends sooner by its own timeouts
LARGE = 64 * MIB
BLOCK = 65536  # of the record of what arrived
MIDDLE = 24 * MIB  # where something happens midway
DONE, NOT_PERMITTED, NETWORK, CHECKSUM, INTERRUPTED = 0, 4, 5, 6, 130  # exit statuses
NAMES = ["a name.txt", " leading", "a+b.bin", "100%.txt", "%41%2F.txt", "a%20b", "hash#1.h5", "what?.txt", "a=b&c=d;e,f", "quote'\"`.txt",
    "(1)!*@$~[x]{y}|^<z>:", "ckpt/deep er/x+y/%.pt", "übergröße.txt", "日本語/模型.bin", "u\u0308.txt", "🙂 😀.bin", "-rf", "x" * 200]


class Wrong(Exception):
    """A promise was not kept."""


def check(holds, text):
    if not holds:
        raise Wrong(text)


def until(condition, what):
    end = time.monotonic() + SECONDS
    while not condition():
        check(time.monotonic() < end, f"not within {SECONDS} s: {what}")
        time.sleep(0.02)


@dataclasses.dataclass
class Outcome:
    """How a process ended."""
    status: int
    text: str  # standard error
    says: typing.Optional[dict]  # the object of --json
    path: pathlib.Path  # of the local copy, which need not exist


class Trial:
    """One case at one store: a run of its own, a folder for the local copies, and what was given out."""
    numbers = itertools.count(1)

    def __init__(self, world, store):
        self.world, self.store, number = world, store, next(self.numbers)
        self.service = world.services[bool(store.certificates)]
        self.run = f"stores/tests/run{number}"
        self.root, self.home = world.folder / f"root{number}", world.folder / f"home{number}"
        self.root.mkdir()
        self.home.mkdir()
        self.given, self.relays, self.running = [], [], []
        self.lead(lambda name: store.address(self.key(name)))

    # -- the store and the service

    def key(self, name):
        return f"{self.run}/{name}"

    def put(self, name, data, parts=False, **headers):
        self.store.put(self.key(name), data, parts, **headers)

    def tell(self, name, data, **node):
        """Tells the service of a file. `node` replaces properties."""
        self.service.add(self.run, name, **({"md5": md5(data), "sizeBytes": len(data)} | node))

    def add(self, name, data, parts=False, **headers):
        self.put(name, data, parts, **headers)
        self.tell(name, data)

    def lead(self, address):
        """From now on the service redirects to `address(name)`."""
        def recorded(name):
            self.given.append(address(name))
            return self.given[-1]
        self.service.addresses[self.run] = recorded

    def relay(self):
        """Returns a relay in front of the store. The addresses lead there from now on."""
        made = stores.Relay(self.store.port)
        self.relays.append(made)
        self.lead(lambda name: self.store.address(self.key(name), port=made.port))
        return made

    # -- the program

    def start(self, name, *more, connections=8, timeout=5, authorities=None):
        command = [self.world.build / "examples/wandb-restore", "--quiet", "--json", "--run-path", self.run, "--root", self.root,
            "--connections", str(connections), "--timeout", str(timeout), *more, "--", name]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "WANDB_BASE_URL": self.service.says["base_url"],
            "WANDB_API_KEY": self.service.says["key"], "SSL_CERT_FILE": str(authorities or self.world.bundle)}
        process = subprocess.Popen(command, env=environment, cwd=self.root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True)
        process.name = name
        self.running.append(process)
        return process

    def finish(self, process):
        try:
            out, text = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise Wrong(f"wandb-restore did not end within {SECONDS} s") from None
        self.no_secrets(out + text)
        says = json.loads(out.splitlines()[0]) if out.strip() else None
        return Outcome(process.returncode, text.strip(), says, self.root / process.name)

    def restore(self, name, *more, **how):
        return self.finish(self.start(name, *more, **how))

    def no_secrets(self, text):
        for address in self.given:
            query = urllib.parse.urlsplit(address).query
            secret_fields = ("x-amz-signature", "x-amz-credential", "sig")
            values = [value for key, value in urllib.parse.parse_qsl(query) if key.lower() in secret_fields]
            for secret in [query, *values, *map(urllib.parse.quote, values)]:
                check(not secret or secret not in text, f"the output has a part of a signature: {text}")
        check(stores.SECRET not in text and self.service.says["key"] not in text, f"the output has a secret: {text}")

    # -- what must hold

    def right(self, got, data, verified=True):
        check(got.status == DONE, f"status {got.status}: {got.text}")
        check(got.path.read_bytes() == data, f"other bytes ({got.path.stat().st_size}, not {len(data)})")
        check(got.says["size"] == len(data) and got.says["verified"] == verified, f"it says {got.says}")
        check(not self.hidden(), f"left behind: {self.hidden()}")

    def failed(self, got, status, *texts):
        check(got.status == status, f"status {got.status}, not {status}: {got.text}")
        check(not got.path.exists(), "a failed restore left a file")
        for text in texts:
            check(text in got.text, f"{text!r} is not in {got.text!r}")
        check("<" not in got.text and "\n" not in got.text, f"the text has markup or lines: {got.text!r}")

    def arrived(self):
        """Returns the number of bytes of the download that are on disk, in whole blocks: no end of a block of `content` is zero."""
        count = 0
        for path in self.root.rglob(".wandb-restore-*.part"):
            with path.open("rb") as part:
                for end in range(BLOCK, path.stat().st_size + 1, BLOCK):
                    part.seek(end - 16)
                    count += any(part.read(16))
        return count * BLOCK

    def resumed(self, relay, size, arrived):
        """Checks that the last call did not fetch what had arrived, but for what closed connections had under way."""
        check(relay.sent < size - arrived / 2, f"{relay.sent} bytes were fetched in the end although {arrived} of {size} had arrived")

    def hidden(self):
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob(".wandb-restore-*"))

    def close(self):
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for relay in self.relays:
            relay.close()
        shutil.rmtree(self.root)
        shutil.rmtree(self.home)


CASES = []


def over(connections):
    return f"{connections} connection{'s' * (connections > 1)}"


def case(title, quick=False, only=None):
    """Adds a function to the cases, one for each store. `only`: those whose title, with a colon, contains this."""
    def add(function):
        CASES.append((title, function, quick, only))
        return function
    return add


# ---- content


for size in (0, 1, 65536, 65537, 3 * MIB + 1):
    @case(f"an object of {size} bytes", quick=size == 0)
    def of_size(t, size=size):
        t.add("file.bin", content(size))
        t.right(t.restore("file.bin"), content(size))


for parts, connections in ((False, 1), (False, 8), (True, 1), (True, 8), (True, 32)):
    @case(f"64 MiB uploaded {'in parts' if parts else 'at once'}, {over(connections)}",
        quick=(parts, connections) == (True, 8))
    def large(t, parts=parts, connections=connections):
        data = content(LARGE)
        t.add("model.h5", data, parts)
        if parts:
            check(t.store.etag(t.key("model.h5")) != hashlib.md5(data).hexdigest(), "the entity tag is the md5")
        t.right(t.restore("model.h5", connections=connections), data)


@case("names with spaces, +, %, #, ?, quotes and letters of other scripts", quick=True)
def names(t):
    for number, name in enumerate(NAMES):
        t.add(name, content(1000, number))
    for number, name in enumerate(NAMES):
        t.right(t.restore(name), content(1000, number))


@case("Content-Type, Content-Disposition and Cache-Control do not matter")
def other_headers(t):
    t.add("page.html", b"<p>text</p>", content_type="text/html; charset=utf-16", content_disposition="attachment; filename=\"x\"",
        cache_control="no-store")
    t.right(t.restore("page.html"), b"<p>text</p>")


@case("Content-Encoding stored with the object: the bytes are kept as they were uploaded", quick=True)
def encoded(t):
    data = gzip.compress(content(9 * MIB))
    t.add("table.json.gz", data, content_encoding="gzip")
    t.right(t.restore("table.json.gz"), data)


@case("Content-Encoding stored with an object of several parts")
def encoded_in_parts(t):
    data = gzip.compress(content(20 * MIB))
    t.add("table.json.gz", data, parts=True, content_encoding="gzip")
    t.right(t.restore("table.json.gz"), data)


@case("aws-chunked, the coding of an upload, stored as Content-Encoding by the gateway", quick=True, only="s3, https")
def chunked(t):
    t.store.put_chunked(t.key("model.h5"), content(9 * MIB))
    t.tell("model.h5", content(9 * MIB))
    t.right(t.restore("model.h5"), content(9 * MIB))


@case("Content-Encoding, and size and md5 of the decoded bytes: refused, nothing is stored")
def decoded_digest(t):
    data = content(1000)
    t.put("table.json", gzip.compress(data), content_encoding="gzip")
    t.tell("table.json", data)
    t.failed(t.restore("table.json"), CHECKSUM)


@case("no md5 from the service: restored over one connection, not verified")
def without_md5(t):
    data = content(9 * MIB)
    t.put("model.h5", data, parts=True)
    t.tell("model.h5", data, md5=None)
    t.right(t.restore("model.h5"), data, verified=False)


@case("another md5 than the service's", quick=True)
def wrong_md5(t):
    data = content(9 * MIB)
    t.put("model.h5", data)
    t.tell("model.h5", data, md5=md5(b"other"))
    t.failed(t.restore("model.h5"), CHECKSUM)


@case("another size than the service's")
def wrong_size(t):
    for size in (999, 1001, LARGE):
        t.put(f"{size}.h5", content(1000))
        t.tell(f"{size}.h5", content(1000), sizeBytes=size)
        t.failed(t.restore(f"{size}.h5"), CHECKSUM)
    t.add("0.h5", content(1000))
    t.tell("0.h5", content(1000), sizeBytes=0)  # which stands for an unknown size
    t.right(t.restore("0.h5"), content(1000))


@case("a local copy is replaced, or kept if it is the same")
def refreshed(t):
    t.add("model.h5", content(MIB))
    t.right(t.restore("model.h5"), content(MIB))
    t.add("model.h5", content(MIB, 1))
    asked = len(t.given)
    t.right(t.restore("model.h5", "--refresh"), content(MIB, 1))
    check(len(t.given) == asked + 1, "not one redirect")
    t.right(t.restore("model.h5", "--refresh"), content(MIB, 1))
    check(len(t.given) == asked + 1, "downloaded again")


# ---- refusals of the store


@case("no such object: the store's 404", quick=True)
def no_object(t):
    t.tell("model.h5", content(1000))
    t.failed(t.restore("model.h5"), NETWORK, "404", t.store.missing)


@case("no such bucket: the store's 404")
def no_bucket(t):
    t.tell("model.h5", content(1000))
    t.lead(lambda name: t.store.address(name, bucket="none"))
    t.failed(t.restore("model.h5"), NETWORK, "404")


@case("signed with another key: the store's 403, asked for four addresses", quick=True)
def wrong_key(t):
    t.add("model.h5", content(1000))
    t.lead(lambda name: t.store.address(t.key(name), secret="another key"))
    t.failed(t.restore("model.h5"), NOT_PERMITTED, "403", t.store.forbidden)
    check(len(t.given) == 4, f"{len(t.given)} addresses")


@case("every address has expired")
def always_expired(t):
    t.add("model.h5", content(1000))
    expired = t.store.expired_address(t.key("model.h5"))
    t.lead(lambda name: expired)
    t.failed(t.restore("model.h5"), NOT_PERMITTED, "403")
    check(len(t.given) == 4, f"{len(t.given)} addresses")


@case("nobody listens at the address", only="s3, https")
def nobody(t):
    t.add("model.h5", content(1000))
    relay = t.relay()
    relay.enable(False)
    t.failed(t.restore("model.h5", timeout=1), NETWORK)


@case("a certificate that the program does not trust", only="https")
def untrusted(t):
    t.add("model.h5", content(1000))
    t.failed(t.restore("model.h5", authorities=t.service.says["ca"]), NETWORK, "certificate")


@case("from a service over https to a store over http: refused", only="http:")
def downgrade(t):
    t.service = t.world.services[True]
    t.lead(lambda name: t.store.address(t.key(name)))
    t.add("model.h5", content(1000))
    t.failed(t.restore("model.h5"), CHECKSUM, "from https to http")


# ---- addresses that expire


@case("the first address has expired, the next is good", quick=True)
def once_expired(t):
    data = content(9 * MIB)
    t.add("model.h5", data)
    addresses = iter([t.store.expired_address(t.key("model.h5"))])
    t.lead(lambda name: next(addresses, None) or t.store.address(t.key(name)))
    t.right(t.restore("model.h5"), data)
    check(len(t.given) == 2, f"{len(t.given)} addresses")


def expire_midway(t, connections, then):
    """Restores an object whose first address expires midway. `then(name, port)` gives the next ones. Returns the process."""
    data = content(MIDDLE)
    t.add("model.h5", data, parts=True)
    relay = t.relay()
    relay.rate = 8 * MIB // connections
    good_for = iter([2])  # seconds
    expiry = time.time() + 4
    t.lead(lambda name: then(name, relay.port) if next(good_for, None) is None else t.store.address(t.key(name), 2, port=relay.port))
    process = t.start("model.h5", connections=connections)
    until(lambda: t.arrived() > 12 * MIB, "a part of the download")
    relay.enable(False)
    relay.rate = None
    stores.wait_until(expiry)
    relay.enable(True)
    return process


@case("the address expires midway, over one connection, which is cut", quick=True, only="https")
def expires_on_one(t):
    process = expire_midway(t, 1, lambda name, port: t.store.address(t.key(name), port=port))
    t.right(t.finish(process), content(MIDDLE))
    check(len(t.given) > 1, f"{len(t.given)} address")


@case("addresses expire midway, again and again, over 8 connections", only="https")
def expire_on_eight(t):
    data = content(MIDDLE)
    t.add("model.h5", data, parts=True)
    relay = t.relay()
    relay.rate, relay.cut_after = MIB // 2, 5 * MIB // 4
    t.lead(lambda name: t.store.address(t.key(name), 2, port=relay.port))
    t.right(t.restore("model.h5"), data)
    check(len(t.given) > 1, f"{len(t.given)} address")


@case("the address expires midway, and no other is good; a later call continues", only="https")
def expires_for_good(t):
    process = expire_midway(t, 2, lambda name, port: t.store.address(t.key(name), port=port, secret="another key"))
    t.failed(t.finish(process), NOT_PERMITTED, "403", t.store.forbidden)
    arrived, again = t.arrived(), t.relay()
    t.right(t.restore("model.h5"), content(MIDDLE))
    t.resumed(again, MIDDLE, arrived)


# ---- objects that change midway


def midway(t, connections, change):
    """Restores an object. `change` is called midway, while the store cannot be reached. Returns the outcome."""
    relay = t.relay()
    relay.rate = 8 * MIB // connections
    process = t.start("model.h5", connections=connections)
    until(lambda: t.arrived() > 12 * MIB, "a part of the download")
    relay.enable(False)
    change()
    relay.rate = None
    relay.enable(True)
    return t.finish(process)


for connections in (1, 8):
    @case(f"the object is replaced midway, and the service says so, {over(connections)}", quick=connections == 8, only="https")
    def replaced(t, connections=connections):
        t.add("model.h5", content(MIDDLE), parts=True)
        got = midway(t, connections, lambda: t.add("model.h5", content(MIDDLE, 1), parts=True))
        t.right(got, content(MIDDLE, 1))

    @case(f"the object is replaced midway, the service does not know, {over(connections)}", quick=connections == 8, only="https")
    def replaced_unknown(t, connections=connections):
        t.add("model.h5", content(MIDDLE), parts=True)
        t.failed(midway(t, connections, lambda: t.put("model.h5", content(MIDDLE, 1), parts=True)), CHECKSUM)

    @case(f"the object is uploaded again midway, with another entity tag, {over(connections)}", only="https")
    def uploaded_again(t, connections=connections):
        t.add("model.h5", content(MIDDLE), parts=True)
        t.right(midway(t, connections, lambda: t.put("model.h5", content(MIDDLE))), content(MIDDLE))


@case("the object is replaced midway, and no md5 is known", only="https")
def replaced_without_md5(t):
    t.put("model.h5", content(MIDDLE), parts=True)
    t.tell("model.h5", content(MIDDLE), md5=None)
    got = midway(t, 1, lambda: t.put("model.h5", content(MIDDLE, 1), parts=True))
    t.right(got, content(MIDDLE, 1), verified=False)


@case("the object becomes shorter midway, and the service says so", only="https")
def shorter(t):
    t.add("model.h5", content(MIDDLE), parts=True)
    t.right(midway(t, 8, lambda: t.add("model.h5", content(10 * MIB, 1), parts=True)), content(10 * MIB, 1))


@case("the object becomes longer midway, and the service says so", only="https")
def longer(t):
    t.add("model.h5", content(MIDDLE), parts=True)
    t.right(midway(t, 8, lambda: t.add("model.h5", content(MIDDLE + 5 * MIB, 1), parts=True)), content(MIDDLE + 5 * MIB, 1))


@case("the object becomes shorter or longer midway, the service does not know", only="https")
def other_size_unknown(t):
    for size in (10 * MIB, MIDDLE + 5 * MIB):
        t.add("model.h5", content(MIDDLE), parts=True)
        t.failed(midway(t, 8, lambda size=size: t.put("model.h5", content(size, 1), parts=True)), CHECKSUM)


@case("the object is removed midway; once it is there again, a later call continues", only="https")
def removed(t):
    data = content(MIDDLE)
    t.add("model.h5", data)
    t.failed(midway(t, 8, lambda: t.store.remove(t.key("model.h5"))), NETWORK, "404", t.store.missing)
    t.put("model.h5", data, parts=True)
    arrived, again = t.arrived(), t.relay()
    t.right(t.restore("model.h5"), data)
    t.resumed(again, MIDDLE, arrived)


# ---- interruptions


for connections in (1, 8):
    @case(f"killed midway, then continued at another address, {over(connections)}", quick=connections == 8, only="https")
    def killed(t, connections=connections):
        data = content(LARGE)
        t.add("model.h5", data, parts=True)
        relay = t.relay()
        relay.rate = 24 * MIB // connections
        process = t.start("model.h5", connections=connections)
        until(lambda: t.arrived() > 32 * MIB, "a part of the download")
        process.kill()
        process.communicate()
        check(not (t.root / "model.h5").exists(), "a part of the file has the file's name")
        arrived, again = t.arrived(), t.relay()
        t.right(t.restore("model.h5", connections=connections), data)
        t.resumed(again, LARGE, arrived)


@case("interrupted midway, then continued", only="https")
def interrupted(t):
    data = content(LARGE)
    t.add("model.h5", data)
    relay = t.relay()
    relay.rate = 3 * MIB
    process = t.start("model.h5")
    until(lambda: t.arrived() > 32 * MIB, "a part of the download")
    process.send_signal(signal.SIGINT)
    t.failed(t.finish(process), INTERRUPTED)
    arrived, again = t.arrived(), t.relay()
    t.right(t.restore("model.h5"), data)
    t.resumed(again, LARGE, arrived)


@case("every connection is cut after 5 MiB", quick=True, only="https")
def cut(t):
    data = content(LARGE)
    t.add("model.h5", data)
    t.relay().cut_after = 5 * MIB
    t.right(t.restore("model.h5", connections=2), data)


@case("every request is 100 ms late", only="https")
def late(t):
    data = content(LARGE)
    t.add("model.h5", data)
    t.relay().late = 0.1
    t.right(t.restore("model.h5"), data)


@case("four processes restore one object: it is downloaded once", only="https")
def four(t):
    data = content(LARGE)
    t.add("model.h5", data, parts=True)
    relay = t.relay()
    for process in [t.start("model.h5") for _ in range(4)]:
        t.right(t.finish(process), data)
    check(relay.sent < 1.5 * LARGE, f"{relay.sent} bytes for a file of {LARGE}")


# ---- all of them


class World:
    """The servers, and the folder for everything."""

    def __init__(self, given):
        self.build = given.build
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="wandb-stores-"))
        self.programs = []
        certificates = stores.Certificates(self.folder)
        self.stores = [self.started(kind(given.tools, self.folder, tls)) for kind in (stores.S3, stores.Azure) for tls in (None, certificates)]
        self.services = {tls: self.started(stores.Service(given.build / "tests/wandb-stand-in", tls)) for tls in (False, True)}
        self.bundle = self.folder / "bundle.pem"
        self.bundle.write_text(certificates.authority.read_text() + pathlib.Path(self.services[True].says["ca"]).read_text())

    def started(self, program):
        self.programs.append(program)
        return program

    def close(self):
        for program in reversed(self.programs):
            program.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--tools", required=True, type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--match", default="", help="only cases whose store and title contain this")
    parser.add_argument("--quick", action="store_true", help="only the most telling cases")
    given = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stores end, too
    begin, failures, output = time.monotonic(), 0, threading.Lock()
    world = World(given)
    try:
        chosen = [(f"{store.title}: {title}", function, store) for store in world.stores for title, function, quick, only in CASES
            if (quick or not given.quick) and (only or "") in store.title + ":" and given.match in f"{store.title}: {title}"]

        def run(title, function, store):
            nonlocal failures
            since, problem = time.monotonic(), None
            trial = Trial(world, store)
            try:
                function(trial)
            except Wrong as wrong:
                problem = str(wrong)
            except Exception as error:  # of a store or its client
                problem = f"{type(error).__name__}: {error}"
            finally:
                trial.close()
            with output:
                failures += problem is not None
                print(f"{'FAILED' if problem else 'ok':6} {title} ({time.monotonic() - since:.1f} s)", flush=True)
                if problem:
                    print(f"       {problem}", flush=True)

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(run, *one) for one in chosen]:
                done.result()
    finally:
        world.close()
    print(f"{len(chosen)} cases, {failures} failed; {time.monotonic() - begin:.0f} s")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
