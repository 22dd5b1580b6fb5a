"""Measures objects of an object store (versitygw), a large one and many small ones: this library against s5cmd, the client of AWS's CRT, the Python SDK, curl and
aria2c. run.sh --store starts it and describes the arguments.
SPDX-License-Identifier: MIT"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "stores"))
import bench
import report
import stores
from servers import MIB, Relay, machine, run

REGION = "us-east-1"
CRT = """
import sys
from awscrt import auth, http, io, s3
authority, port, key, path = sys.argv[1:]
tls = io.TlsContextOptions()
tls.override_default_trust_store_from_path(None, authority)
credentials = auth.AwsCredentialsProvider.new_static("tests", "%s")
client = s3.S3Client(region="%s", tls_mode=s3.S3RequestTlsMode.ENABLED,
                     signing_config=s3.create_default_s3_signing_config(region="%s", credential_provider=credentials),
                     tls_connection_options=io.ClientTlsContext(tls).new_connection_options())
request = http.HttpRequest("GET", "/%s/" + key, http.HttpHeaders([("Host", "127.0.0.1:" + port)]))
client.make_request(type=s3.S3RequestType.GET_OBJECT, request=request, recv_filepath=path).finished_future.result()
""" % (stores.SECRET, REGION, REGION, stores.BUCKET)
SDK_MANY = """
import sys, wandb
for file in wandb.Api().run(sys.argv[1]).files():
    file.download(root=sys.argv[2], replace=True)
"""
SDK = "import sys, wandb\nwandb.restore(sys.argv[1], run_path=sys.argv[2], root=sys.argv[3], replace=True)\n"


class MadeCertificates:
    """The benchmark's certificates, as stores.S3 wants them."""

    def __init__(self, folder):
        self.authority, self.certificate, self.key = folder / "ca.pem", folder / "server.pem", folder / "server.key"


class StoreBench(bench.Bench):
    def __init__(self, arguments, work):
        super().__init__(arguments, work)
        (work / "home").mkdir()
        self.gateway = stores.S3(Path(arguments.tools), work, MadeCertificates(work))
        self.service = stores.Service(Path(arguments.stand_in), True)
        self.both = work / "both.pem"
        self.both.write_text(self.ca.read_text() + Path(self.service.says["ca"]).read_text())
        self.service.addresses[bench.RUN] = self.address
        self.port, self.far, self.slow = self.gateway.port, stores.free_port(), stores.free_port()
        self.life = 3600  # seconds that a signed address is good for

    def close(self):
        self.service.stop()
        self.gateway.stop()

    def environment(self, base="", ca=None):
        """For every contender: the run's service, and the store's account and authority."""
        made = super().environment(self.service.says["base_url"], self.both)
        return dict(made, WANDB_API_KEY=self.service.says["key"], REQUESTS_CA_BUNDLE=str(self.both), WANDB_SILENT="true",
                    WANDB_ERROR_REPORTING="false", AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY=stores.SECRET,
                    AWS_REGION=REGION, AWS_CA_BUNDLE=str(self.ca), AWS_EC2_METADATA_DISABLED="true")

    def fresh(self):
        super().fresh()
        (self.work / "home").mkdir()

    def timed(self, file, *command):
        self.fresh()
        return self.checked(self.measure(command), file)

    def curl_md5(self, file, md5):
        then = '"$@" && [ "$(md5sum < "%s")" = "%s  -" ]' % (self.out / file, md5)
        return self.timed(file, "sh", "-c", then, "sh", *self.curl_command(file))

    def curl_command(self, file):
        return ["curl", "-sSf", "--cacert", self.ca, "-o", self.out / file, self.address(file)]

    def aria2_command(self, file, *more):
        return ["aria2c", "--no-conf", "-q", *more, "-x8", "-s8", "-k1M", "--file-allocation=none", "--ca-certificate=%s" % self.ca,
                "-d", self.out, "-o", file, self.address(file)]

    def address(self, file):
        return self.gateway.address(file, self.life, self.port)

    def make(self, file, size):
        self.files.make(file, size)
        self.gateway.put(file, (self.files.folder / file).read_bytes(), parts=size > 8 * MIB)
        self.service.add(bench.RUN, file, md5=self.files.base64(file), sizeBytes=size)

    def contenders(self, file):
        peers, hexadecimal = Path(self.arguments.peers), self.files.hex(file)
        return {
            "ours": lambda: self.timed(file, *self.restore(file)),
            "s5cmd": lambda: self.timed(file, s5cmd_in(peers), "--endpoint-url", "https://127.0.0.1:%d" % self.port, "--log", "error",
                                        "cp", "s3://%s/%s" % (stores.BUCKET, file), self.out / file),
            "AWS CRT": lambda: self.timed(file, peers / "bin/python", "-c", CRT, self.ca, self.port, file, self.out / file),
            "wandb.restore": lambda: self.timed(file, self.arguments.sdk + "/bin/python", "-c", SDK, file, bench.RUN, self.out),
            "aria2c -x8 -s8": lambda: self.timed(file, *self.aria2_command(file)),
            "aria2c --checksum": lambda: self.timed(file, *self.aria2_command(file, "--checksum=md5=" + hexadecimal)),
            "curl": lambda: self.timed(file, *self.curl_command(file)),
            "curl && md5sum": lambda: self.curl_md5(file, hexadecimal),
        }

    def measured(self, case, title, file, size, contenders):
        times = self.rounds(case, contenders)
        for name in list(times)[1:]:
            verifies = "verifies" if name in ("aria2c --checksum", "curl && md5sum") else "does not verify"
            started = ", of which %s start Python and import" % report.seconds(self.imports[name]) if name in self.imports else ""
            self.row(case, "%s, %s: ours %s (verifies), %s %s (%s%s)" % (bench.amount(size), title, report.seconds(times["ours"]), name,
                     report.seconds(times[name]), verifies, started), "%.2f" % (times["ours"] / times[name]), "(for information)", None)
        self.group("An object store over TLS, " + title, "%s; ours, aria2c --checksum and md5sum verify" % bench.amount(size), times)

    def store(self):
        peers, size, file = Path(self.arguments.peers), self.arguments.size, "model.h5"
        self.imports = {name: self.measure([python, "-c", "import " + module])["seconds"] for name, python, module in (
            ("AWS CRT", peers / "bin/python", "awscrt.s3"), ("wandb.restore", self.arguments.sdk + "/bin/python", "wandb"))}
        self.make(file, size)
        self.make("small", 1024)
        self.measured("store", "loopback", file, size, self.contenders(file))
        self.measured("store-small", "loopback, new process", "small", 1024, self.contenders("small"))
        with Relay(self.programs / "relay", self.far, self.gateway.port, 50, bench.RATE):
            self.port = self.far
            several = {name: contender for name, contender in self.contenders(file).items() if not name.startswith("curl")}
            self.measured("store-far", "50 ms, 20 MB/s a connection", file, size, several)
        self.notes.append("versitygw, its folder in memory; addresses signed for an hour. Each contender is a new process. Ours and "
                          "wandb.restore ask the service first, and follow its redirect; the others are given the object's name or address. "
                          "Ours and the two commands with an md5 verify the md5 of the file; the others check no content, beside TLS. "
                          "`store-far`: what the store sends arrives 50 ms later, on each connection at 20 MB/s (relay.cpp).")

    def many(self):
        """Many small files."""
        times = self.files_of_a_run("many", 1000, 20 * 1024, True)
        peak = max(one["peak_kib"] for one in self.raw["store-many"]["ours"]) / 1024
        self.row("store-many", "1000 files of 20 KiB: memory of ours", "%.1f MiB" % peak, "≤ 64 MiB", peak <= 64)
        ratio = round(times["one after another"] / times["ours"], 2)
        self.row("store-many", "1000 files of 20 KiB: ours, against one after another", "%.2f" % ratio, "≥ 15 times as fast", ratio >= 15)

    def shards(self):
        """The parts of a model, at 20 MB/s a connection."""
        self.files_of_a_run("shards", 40, 24 * MIB, False, bench.RATE)

    def files_of_a_run(self, case, count, size, with_slow_ones, rate=0):
        """All files of a run, from a service and a store that are 20 ms away. `with_slow_ones`: also those that take one file after another."""
        delay, run_ = 20, "entity/project/" + case
        folder, peers = self.files.folder, Path(self.arguments.peers)
        names = ["%s/%04d.bin" % (case, number) for number in range(count)]
        (folder / case).mkdir()
        far_service, service_port = stores.free_port(), stores.free_port()
        url = "https://127.0.0.1:%d" % far_service
        service = stores.Service(Path(self.arguments.stand_in), True, ["--port", str(service_port), "--service-url", url])
        authorities = self.work / (case + ".pem")
        authorities.write_text(self.ca.read_text() + Path(service.says["ca"]).read_text())
        service.addresses[run_] = lambda name: self.gateway.address(name, 3600, self.far)
        for name in names:
            content = os.urandom(size)
            (folder / name).write_bytes(content)
            self.gateway.put(name, content, parts=size > 8 * MIB)
            service.add(run_, name, md5=base64.b64encode(hashlib.md5(content).digest()).decode(), sizeBytes=size,
                        directUrl=self.gateway.address(name, 3600, self.far))
        environment = dict(self.environment(), WANDB_BASE_URL=url, WANDB_API_KEY=service.says["key"], SSL_CERT_FILE=str(authorities),
                           REQUESTS_CA_BUNDLE=str(authorities))
        ours = [self.programs / "wandb-restore", "--run-path", run_, "--root", self.out, "--no-progress"]

        def timed(*command):
            self.fresh()
            taken = self.measure(command, environment)
            if any((folder / name).read_bytes() != (self.out / name).read_bytes() for name in names):
                raise SystemExit("a contender ended with a wrong file")
            return taken

        try:
            with Relay(self.programs / "relay", far_service, service_port, delay), \
                    Relay(self.programs / "relay", self.far, self.gateway.port, delay, rate):
                contenders = {
                    "ours": lambda: timed(*ours, case + "/"),
                    "s5cmd": lambda: timed(s5cmd_in(peers), "--endpoint-url", "https://127.0.0.1:%d" % self.far, "--log", "error",
                                           "cp", "s3://%s/%s/*" % (stores.BUCKET, case), str(self.out / case) + "/"),
                }
                if with_slow_ones:
                    contenders["one after another"] = lambda: timed(*ours, *names)
                    contenders["SDK, files()"] = lambda: timed(self.arguments.sdk + "/bin/python", "-c", SDK_MANY, run_, self.out)
                times = self.rounds("store-" + case, contenders)
        finally:
            service.stop()
        title = "%d files of %s, %d ms" % (count, bench.amount(size), delay) + (", 20 MB/s a connection" if rate else "")
        for name in list(times)[1:]:
            self.row("store-" + case, "%s: ours %s, %s %s" % (title, report.seconds(times["ours"]), name, report.seconds(times[name])),
                     "%.2f" % (times[name] / times["ours"]), "(for information)", None)
        self.group(title + ", over TLS", "ours verifies", times)
        return times

    def expiring(self):
        """An address that expires every two seconds, against the time that eight connections at their limit take."""
        size, rate, file = 200 * MIB, 5_000_000, "expiring.h5"
        self.make(file, size)
        self.port, self.life = self.slow, 2
        with Relay(self.programs / "relay", self.slow, self.gateway.port, 0, rate):
            times = self.rounds("store-expiring", {"ours": lambda: self.timed(file, *self.restore(file))})
        self.port, self.life = self.gateway.port, 3600
        least, taken = size / (8 * rate), times["ours"]
        self.row("store-expiring", "%s, 5 MB/s a connection, addresses of 2 s: ours %s; the rate allows %s" % (
            bench.amount(size), report.seconds(taken), report.seconds(least)), "%.2f" % (taken / least),
            "≤ 1.15 times the time that the rate allows", round(taken / least, 2) <= 1.15)


CASES = ["store", "expiring", "many", "shards"]


def main():
    parser = argparse.ArgumentParser(prog="tests/bench/run.sh --store")
    parser.add_argument("size", metavar="SIZE", nargs="?", type=bench.parse_size, default=512 * MIB)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--before")
    parser.add_argument("--out", default="build-bench")
    parser.add_argument("--work", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    for hidden in ("--programs", "--stand-in", "--tools", "--peers", "--sdk"):
        parser.add_argument(hidden, required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, bench.on_terminate)

    work = Path(tempfile.mkdtemp(prefix="wandb-bench-", dir=arguments.work))
    measured = None
    try:
        measured = StoreBench(arguments, work)
        facts = [*(pair for pair in machine(measured.programs) if pair[0] != "nginx"), ("store", "versitygw " + Path(arguments.tools, "versitygw").resolve().parent.name.rpartition("-")[2]),
                 ("peers", peer_versions(arguments))]
        for case in CASES:
            if case in arguments.only.split(","):
                getattr(measured, case)()
    finally:
        if measured:
            measured.close()
        shutil.rmtree(work, ignore_errors=True)

    settings = "SIZE %s, %d rounds, contenders in turn, medians. Store and clients on the same machine; files in memory." % (
        bench.amount(arguments.size), arguments.rounds)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    text = report.markdown(facts, measured.rows, measured.notes, settings)
    (out / "store.md").write_text(text)
    (out / "store.json").write_text(json.dumps({"machine": facts, "runs": measured.raw}, indent=1) + "\n")
    (out / "store.svg").write_text(report.chart(measured.groups, "Shorter is better; medians of %d rounds. %s" % (arguments.rounds, facts[0][1])))
    print("\n" + text)


def s5cmd_in(peers):
    """Returns the program itself: the command that the package installs is a wrapper in Python."""
    program = next(Path(peers).glob("lib/python*/site-packages/s5cmd/bin/s5cmd"))
    program.chmod(0o755)
    return program


def peer_versions(arguments):
    found = [path.name for folder in (arguments.peers, arguments.sdk) for path in Path(folder).glob("lib/python*/site-packages/*.dist-info")]
    wanted = [name.removesuffix(".dist-info").replace("-", " ") for name in found if name.startswith(("awscrt-", "wandb-"))]
    return ", ".join([*sorted(wanted), "s5cmd " + run(s5cmd_in(arguments.peers), "version").partition("-")[0].strip("v\n")])


if __name__ == "__main__":
    main()
