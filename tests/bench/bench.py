"""Runs the cases of the benchmark, and prints and writes their results. run.sh starts it and describes the arguments.
SPDX-License-Identifier: MIT"""

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import report
from servers import MIB, Files, Relay, ShapedLink, Site, machine, make_certificates

RATE = 20_000_000  # bytes a second of a paced connection
LINK = 250_000_000  # bytes a second of the shaped link
RUN = "entity/project/run"
KEY = "0123456789012345678901234567890123456789"
QUESTION = {  # curl sends this query; it is as long as the library's
    "query": "query RunFiles($project: String!, $entity: String!, $name: String!, $fileCursor: String, "
             "$fileLimit: Int = 50, $fileNames: [String] = [], $pattern: String) { project(name: $project, entityName: "
             "$entity) { run(name: $name) { fileCount files(names: $fileNames, after: $fileCursor, first: $fileLimit, "
             "pattern: $pattern) { edges { node { id name url directUrl sizeBytes mimetype updatedAt md5 } cursor } "
             "pageInfo { endCursor hasNextPage } } } } }",
    "variables": {"project": "project", "entity": "entity", "name": "run", "fileLimit": 1},
}


class Row:
    def __init__(self, case, measured, result, target, passed):
        self.case, self.measured, self.result, self.target = case, measured, result, target
        self.verdict = {True: "PASS", False: "MISS", None: "—"}[passed]


class Bench:
    def __init__(self, arguments, work):
        self.arguments, self.work = arguments, work
        self.programs = Path(arguments.programs).resolve()
        self.out = work / "out"
        self.files = Files(work / "files")
        self.rows, self.groups, self.notes, self.raw = [], [], [], {}
        self.sites = []
        make_certificates(work, ["127.0.0.1", ShapedLink.address])
        self.ca = work / "ca.pem"
        self.bundle = work / "bundle.pem" if (work / "bundle.pem").exists() else None
        (work / "question.json").write_text(json.dumps(QUESTION))

    # ---- one run

    def site(self, **network):
        folder = self.work / ("site%d" % len(self.sites))
        folder.mkdir()
        for name in ("server.pem", "server.key"):
            (folder / name).symlink_to(self.work / name)
        one = Site(folder, self.files, self.programs / "pace.so", **network)
        self.sites.append(one)
        return one

    def environment(self, base="", ca=None):
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
        return dict(kept, HOME=str(self.work / "home"), WANDB_BASE_URL=base, WANDB_API_KEY=KEY,
                    SSL_CERT_FILE=str(ca or self.ca))

    def fresh(self):
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.work / "home", ignore_errors=True)
        self.out.mkdir()

    def measure(self, command, environment=None, before=(), kill_after=None):
        result = self.work / "measured.json"
        killing = ["--kill-after", "%.3f" % kill_after] if kill_after else []
        done = subprocess.run([*before, self.programs / "measure", *killing, result, *map(str, command)],
                              env=environment or self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        taken = json.loads(result.read_text())
        if taken["status"] != (0 if not kill_after else taken["status"]):
            raise SystemExit("%s: exit status %d: %s" % (command[0], taken["status"], done.stderr))
        return taken

    def restore(self, file, *more, connections=8, root=None):
        return [self.programs / "wandb-restore", file, "--run-path", RUN, "--root", root or self.out,
                "--connections", connections, "--no-progress", *more]

    def ours(self, site, file, kind="free", ca=None, connections=8, keep=False, more=()):
        if not keep:
            self.fresh()
        base, who = site.base(file, kind)
        taken = self.measure(self.restore(file, *more, connections=connections), self.environment(base, ca), site.from_)
        taken["who"] = who
        return self.checked(taken, file)

    def curl(self, site, file, kind="free", then=""):
        self.fresh()
        command = ["curl", "-sSf", "--cacert", self.ca, "-o", self.out / file, site.storage(file, kind)]
        if then:  # verify the md5, as a script would
            command = ["sh", "-c", '"$@" && [ "$(md5sum < "%s")" = "%s  -" ]' % (self.out / file, self.files.hex(file)),
                       "sh", *command]
        return self.checked(self.measure(command, before=site.from_), file)

    def curl_three(self, site, file, ca):
        """The three requests of a restore, in one process."""
        self.fresh()
        base, _ = site.base(file)
        own = ["-sSf", "--cacert", ca, "-u", "api:" + KEY]
        command = ["curl", *own, "-H", "Content-Type: application/json", "--data-binary", "@%s" % (self.work / "question.json"),
                   "-o", self.work / "answer.json", base + "/graphql",
                   "--next", *own, "-L", "-o", self.out / file, "%s/files/%s/%s" % (base, RUN, file)]
        return self.checked(self.measure(command, before=site.from_), file)

    def aria2(self, site, file, kind="free", checksum=False):
        self.fresh()
        command = ["aria2c", "--no-conf", "-q", "-x8", "-s8", "-k1M", "--file-allocation=none", "--ca-certificate=%s" % self.ca,
                   "-d", self.out, "-o", file, site.storage(file, kind)]
        if checksum:
            command.insert(1, "--checksum=md5=" + self.files.hex(file))
        return self.checked(self.measure(command, before=site.from_), file)

    def checked(self, taken, file):
        if not filecmp.cmp(self.files.folder / file, self.out / file, shallow=False):
            raise SystemExit("a contender ended with a wrong file")
        filecmp.clear_cache()
        return taken

    # ---- many runs

    def rounds(self, case, contenders, count=None):
        """Runs the contenders in turn, `count` times. Returns the median time of each."""
        before = self.arguments.before
        if before:
            contenders = {"ours": contenders["ours"], "before": lambda ours=contenders["ours"]: self.with_programs(before, ours),
                          **contenders}
        runs = {name: [] for name in contenders}
        for number in range(count or self.arguments.rounds):
            for name, contender in contenders.items():
                taken = contender()
                runs[name].append(taken)
                if not count:
                    print("  %-10s %-28s %8.3f s   CPU %6.2f s   %6.1f MiB" %
                          (case, name, taken["seconds"], taken["user"] + taken["system"], taken["peak_kib"] / 1024), flush=True)
        self.raw.setdefault(case, {}).update(runs)
        times = {name: median(one["seconds"] for one in all_) for name, all_ in runs.items()}
        if before:
            self.row(case, "ours %s, before %s" % (report.seconds(times["ours"]), report.seconds(times["before"])),
                     "%.2f" % (times["ours"] / times.pop("before")), "(for information)", None)
        return times

    def with_programs(self, folder, contender):
        own, self.programs = self.programs, Path(folder).resolve()
        try:
            return contender()
        finally:
            self.programs = own

    def compare(self, case, size, times, over, target, at_most=True, what="times the time of", note=""):
        """Adds a row that compares ours with one contender."""
        ours = times["ours"]
        ratio = ours / times[over] if at_most else times[over] / ours
        ratio_shown = round(ratio, 2)
        passed = ratio_shown <= target if at_most else ratio_shown >= target
        measured = "%s: ours %s, %s %s" % (amount(size), report.seconds(ours), over, report.seconds(times[over]))
        measured += "; " + note if note else ""
        self.row(case, measured, "%.2f" % ratio_shown, "%s %g %s %s" % ("≤" if at_most else "≥", target, what, over), passed)

    def row(self, case, measured, result, target, passed):
        self.rows.append(Row(case, measured, result, target, passed))
        one = self.rows[-1]
        print("%-10s %s | %s | %s | %s" % (case, one.measured, one.result, one.target, one.verdict), flush=True)

    def group(self, title, note, times):
        self.groups.append((title, note, [("wandb-restore" if name == "ours" else name, value, name == "ours")
                                          for name, value in times.items()]))

    # ---- the cases

    def capped(self):
        size = self.arguments.size
        file = self.files.make("main", size)
        site = self.site()

        def pace():
            site.pace.set(site.paced, RATE)
        times = self.rounds("capped", {
            "ours": lambda: (pace(), self.ours(site, file, "paced"))[1],
            "curl": lambda: (pace(), self.curl(site, file, "paced"))[1],
            "aria2c -x8 -s8": lambda: (pace(), self.aria2(site, file, "paced"))[1],
        })
        self.compare("capped", size, times, "curl", 7, at_most=False, what="times as fast as")
        self.compare("capped", size, times, "aria2c -x8 -s8", 1)
        self.group("20 MB/s for each connection", "%s, 8 connections" % amount(size), times)
        self.notes.append("`capped`, `slow-peer`, `kills`, `herd`: the kernel paces each of the server's connections "
                          "(SO_MAX_PACING_RATE, tests/bench/pace.cpp). curl and aria2c do not verify in `capped`; ours does.")

    def far(self):
        """A store with a delay, with and without a rate limit for each connection."""
        size = self.arguments.size
        for part in (5, 32):
            self.files.make("part%d" % part, size // part)
        site = self.site()
        for part, rate in ((5, RATE), (32, 0), (5, 0)):
            file = "part%d" % part

            def pace():
                site.pace.set(site.paced, rate)
            port = site.paced if rate else site.free
            cap = "%d MB/s a connection" % (rate // 1000000) if rate else "no cap"
            for delay in (0, 50, 200, 1000):
                with Relay(self.programs / "relay", site.far, port, delay):
                    label = "%d ms, %s" % (delay, cap)
                    times = self.rounds("far", {
                        "ours": lambda: (pace(), self.ours(site, file, "far"))[1],
                        "aria2c -x8 -s8": lambda: (pace(), self.aria2(site, file, "far"))[1],
                        "aria2c --checksum": lambda: (pace(), self.aria2(site, file, "far", checksum=True))[1],
                        "curl": lambda: (pace(), self.curl(site, file, "far"))[1],
                    })
                    self.compare("far", size // part, times, "aria2c -x8 -s8", 1.05, note=label)
                    self.compare("far", size // part, times, "curl", 1.05, note=label)
        self.notes.append("`far`: what the storage sends arrives so many milliseconds later (tests/bench/relay.cpp), TLS handshakes "
                          "included; the service is near. Ours asks GraphQL and /files first, and verifies; of the peers only "
                          "`--checksum` does.")

    def slow_peer(self):
        size = self.arguments.size
        file = self.files.make("main", size)
        site = self.site()

        def ours(connections, slow):
            site.pace.set(site.paced, RATE, slow, RATE // 10)
            taken = self.ours(site, file, "paced", connections=connections)
            taken["connections"] = site.pace.connections()
            return taken
        slow = iter(range(1000))
        times = self.rounds("slow-peer", {
            "ours": lambda: ours(8, 1 + next(slow) % 8),  # another connection is slow in each round
            "ours, 7 fast ones alone": lambda: ours(7, 0),
        })
        self.compare("slow-peer", size, times, "ours, 7 fast ones alone", 1.1)
        self.notes.append("`slow-peer`: of the connections in order of their making another one is the slow one in each round.")

    def link(self):
        size = 2 * self.arguments.size
        shaped = ShapedLink(LINK)
        if shaped.problem:
            self.row("link", shaped.problem, "", "≤ 1.05 times the time of curl", None)
            return
        try:
            file = self.files.make("double", size)
            site = self.site(address=shaped.address, inside=shaped.inside(), from_=shaped.from_())
            times = self.rounds("link", {
                "ours": lambda: self.ours(site, file),
                "curl": lambda: self.curl(site, file),
                "aria2c -x8 -s8": lambda: self.aria2(site, file),
            })
            self.compare("link", size, times, "curl", 1.05)
            self.group("A link of 250 MB/s", "%s; ours verified, the others not" % amount(size), times)
            site.stop()
        finally:
            shaped.close()

    def loopback(self):
        size = 2 * self.arguments.size
        file = self.files.make("double", size)
        site = self.site()
        times = self.rounds("loopback", {
            "ours": lambda: self.ours(site, file),
            "curl && md5sum": lambda: self.curl(site, file, then="md5sum"),
            "aria2c -x8 -s8 --checksum": lambda: self.aria2(site, file, checksum=True),
            "curl": lambda: self.curl(site, file),
        })
        self.compare("loopback", size, times, "curl && md5sum", 0.75)
        self.compare("loopback", size, times, "aria2c -x8 -s8 --checksum", 0.6)
        self.group("Loopback without a cap", "%s, verified (but the last)" % amount(size), times)

    def small(self):
        file = self.files.make("small", 1024)
        site = self.site()
        for label, ca in (("small CA file", self.ca), ("the distribution's CA bundle", self.bundle)):
            if ca is None:
                self.notes.append("`small`: no CA bundle of the distribution was found.")
                continue
            times = self.rounds("small, " + label, {
                "ours": lambda ca=ca: self.ours(site, file, ca=ca),
                "curl, 3 requests": lambda ca=ca: self.curl_three(site, file, ca),
            }, count=max(20, 17 * self.arguments.rounds))
            self.compare("small", 1024, times, "curl, 3 requests", 1.3, note=label)
            self.group("A small file, new process", "1 KiB, three requests; %s" % label, times)

    def memory(self):
        site = None
        for size, connections in ((2 * self.arguments.size, 16), (self.arguments.size, 8)):
            file = self.files.make("double" if connections == 16 else "main", size)
            site = self.site()
            peak = max(self.ours(site, file, connections=connections, ca=self.bundle)["peak_kib"]
                       for _ in range(self.arguments.rounds)) / 1024
            self.row("memory", "%s, %d connections, peak of %d runs" % (amount(size), connections, self.arguments.rounds),
                     "%.1f MiB" % peak, "≤ 32 MiB", peak <= 32)

    def keep(self):
        file = self.files.make("small", 1024)
        site = self.site()
        self.ours(site, file)
        taken = json.loads(subprocess.run([self.programs / "keep", file, RUN, self.out], env=self.environment("https://none.invalid"),
                                          check=True, capture_output=True, text=True).stdout)
        self.raw["keep"] = taken
        ratio = round(taken["client"] / taken["stream"], 2)
        self.row("keep", "ours %.1f µs, stat and ifstream %.1f µs" % (taken["client"] / 1000, taken["stream"] / 1000),
                 "%.2f" % ratio, "≤ 5 times a bare stat and open", ratio <= 5)
        self.row("keep", "ours %.1f µs, stat(2) and open(2) %.1f µs" % (taken["client"] / 1000, taken["bare"] / 1000),
                 "%.2f" % (taken["client"] / taken["bare"]), "(for information)", None)
        self.row("keep", "ours, with the environment read in each call: %.1f µs" % (taken["function"] / 1000), "",
                 "(for information)", None)
        times = self.rounds("keep, new process", {
            "ours": lambda: self.ours(site, file, keep=True),
            "stat": lambda: self.measure(["stat", self.out / file]),
        }, count=20)
        self.row("keep", "a new process: ours %s, stat %s" % (report.seconds(times["ours"]), report.seconds(times["stat"])),
                 "%.2f" % (times["ours"] / times["stat"]), "(for information)", None)

    def refresh(self):
        size = 2 * self.arguments.size
        file = self.files.make("double", size)
        site = self.site()
        self.ours(site, file)
        taken = self.ours(site, file, keep=True, more=["--refresh"])
        empty = self.measure([self.programs / "wandb-restore", "--version"])
        asked = [one["question"] for one in site.requests(taken["who"])]
        # The bytes that the process read after its start: the CA file and the receipt.
        read = taken["read_bytes"] - empty["read_bytes"]
        counts = {one: asked.count(one) for one in ("graphql", "files", "storage")}
        self.raw["refresh"] = {"asked": asked, "read": read, "run": taken}
        self.row("refresh", "%s: %d GraphQL, %d files, %d storage requests; %d bytes of local files read; %s" %
                 (amount(size), *counts.values(), read, report.seconds(taken["seconds"])), "",
                 "one GraphQL request, no byte of the file", counts == {"graphql": 1, "files": 0, "storage": 0} and read < 65536)

    def kills(self):
        size = min(self.arguments.size // 4, 256 * MIB)
        file = self.files.make("quarter", size)
        content = (self.files.folder / file).read_bytes()
        site = self.site()

        def pace():
            site.pace.set(site.paced, RATE)
        pace()
        whole = self.ours(site, file, "paced")
        surplus = site.bytes_sent(whole["who"]) - size
        dice = random.Random(1)
        old = b"what was there before"
        kept, on_disk, wrong, left_over, after_end, again_all, present_all = [], [], 0, 0, 0, 0, 0
        for number in range(self.arguments.kills):
            self.fresh()
            with_old = number % 2 == 1
            if with_old:
                (self.out / file).write_bytes(old)
            base, _ = site.base(file, "paced")
            pace()
            self.measure(self.restore(file, "--replace"), self.environment(base),
                         kill_after=dice.uniform(0.02, whole["seconds"]))
            visible = (self.out / file).read_bytes() if (self.out / file).exists() else None
            if visible == content:
                after_end += 1
            elif visible != (old if with_old else None):
                wrong += 1
            present = max([present_bytes(content, one) for one in self.out.iterdir() if one.name != file], default=0)
            base, who = site.base(file, "paced")
            self.measure(self.restore(file, "--replace"), self.environment(base))
            if (self.out / file).read_bytes() != content:
                wrong += 1
            left_over += sum(1 for one in self.out.iterdir() if one.name != file)
            again = max(0, site.bytes_sent(who) - (size - present))
            if visible != content and present > 0:
                on_disk.append(present)
                kept.append(1 - again / present)
                again_all, present_all = again_all + again, present_all + present
            if number % 10 == 9:
                print("  kills      %d of %d" % (number + 1, self.arguments.kills), flush=True)
        self.raw["kills"] = {"kept": kept, "on_disk": on_disk, "wrong": wrong, "left_over": left_over, "surplus": surplus}
        share = [one for one, bytes_ in zip(kept, on_disk) if bytes_ >= size // 16]
        if not share:
            self.row("kills", "no kill hit a download; %d wrong or short files" % wrong, "", "", None if wrong == 0 else False)
            return
        self.row("kills", "%s, %d kills (%d with bytes on disk, %d after the end): %d wrong or short files" %
                 (amount(size), self.arguments.kills, len(kept), after_end, wrong), "", "right file each time", wrong == 0)
        self.row("kills", "bytes on disk not fetched again: median %.1f %%, over all %.1f %%, least %.1f %% (where a "
                 "sixteenth or more was there)" % (100 * median(kept), 100 * (1 - again_all / present_all), 100 * min(share)),
                 "%.1f %%" % (100 * min(share)), "≥ 90 %", min(share) >= 0.9)
        self.notes.append("`kills`: bytes on disk are found by comparing the hidden file with the right content; bytes fetched "
                          "are what the server's log says it sent. A run that nobody killed was sent %+d bytes beside the "
                          "file; hidden files left behind at the end of all runs: %d." % (surplus, left_over))

    def herd(self):
        size = min(self.arguments.size // 4, 256 * MIB)
        file = self.files.make("quarter", size)
        site = self.site()
        site.pace.set(site.paced, RATE)
        worst, slowest = 0, 0
        for _ in range(self.arguments.rounds):
            self.fresh()
            base, who = site.base(file, "paced")
            begin = time.monotonic()
            crowd = [subprocess.Popen([str(part) for part in self.restore(file)], env=self.environment(base), text=True,
                                      stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                     for _ in range(32)]
            ends = [one.communicate()[1] for one in crowd]
            slowest = max(slowest, time.monotonic() - begin)
            failed = [end for one, end in zip(crowd, ends) if one.returncode != 0]
            if failed:
                self.row("herd", "%d of 32 processes failed: %s" % (len(failed), failed[0].strip()), "", "all succeed", False)
                return
            self.checked({}, file)
            worst = max(worst, site.bytes_sent(who) / size)
        self.row("herd", "%s, 32 processes at once, %s until the last ended" % (amount(size), report.seconds(slowest)),
                 "%.3f" % worst, "storage sends ≤ 1.05 times the size", worst <= 1.05)


def present_bytes(content, path, grain=4096):
    """Returns how many bytes of a partial file are those of the file."""
    partial = path.read_bytes()
    if partial[:len(content)] == content:
        return len(content)
    right = 0
    for at in range(0, min(len(content), len(partial)), grain):
        if partial[at:at + grain] == content[at:at + grain]:
            right += len(content[at:at + grain])
    return right


def amount(size):
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return "%g %s" % (round(size, 1), unit)
        size /= 1024
    return "%g GiB" % round(size, 2)


def parse_size(text):
    units = {"K": 1024, "M": MIB, "G": 1024 * MIB}
    text = text.upper().rstrip("IB")
    size = int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)
    if size < MIB:
        raise argparse.ArgumentTypeError("at least 1M")
    return size


CASES = ["capped", "far", "slow-peer", "link", "loopback", "small", "memory", "keep", "refresh", "kills", "herd"]


def on_terminate(*_):
    print("terminated: cleaning up", file=sys.stderr)
    sys.exit(143)


def main():
    parser = argparse.ArgumentParser(prog="tests/bench/run.sh")
    parser.add_argument("size", metavar="SIZE", nargs="?", type=parse_size, default=1024 * MIB)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--before")
    parser.add_argument("--out", default="build-bench")
    parser.add_argument("--work", default="/dev/shm" if os.path.isdir("/dev/shm") else None)
    parser.add_argument("--programs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = [one for one in chosen if one not in CASES]
    if unknown or arguments.rounds < 1:
        parser.error("unknown case %s; there are %s" % (unknown, ", ".join(CASES)) if unknown else "--rounds: at least 1")
    signal.signal(signal.SIGTERM, on_terminate)

    work = Path(tempfile.mkdtemp(prefix="wandb-bench-", dir=arguments.work))
    free = shutil.disk_usage(work).free
    if free < 6 * arguments.size:
        work.rmdir()
        raise SystemExit("%s has %s free, about %s are needed: give another --work, or a smaller SIZE" %
                         (work.parent, amount(free), amount(6 * arguments.size)))
    bench = Bench(arguments, work)
    try:
        facts = machine(bench.programs)
        for name in (one for one in CASES if one in chosen):
            try:
                getattr(bench, name.replace("-", "_"))()
            except SystemExit as failure:  # the other cases still run
                if not isinstance(failure.code, str):
                    raise
                bench.row(name, failure.code.strip().replace("\n", " "), "", "", False)
            while bench.sites:
                site = bench.sites.pop()
                site.stop()
                shutil.rmtree(site.folder)
    finally:
        for site in bench.sites:
            site.stop()
        shutil.rmtree(work, ignore_errors=True)

    settings = ("SIZE %s, %d rounds, contenders in turn, medians. Server: nginx over TLS on the same machine; files in memory."
                % (amount(arguments.size), arguments.rounds))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    text = report.markdown(facts, bench.rows, bench.notes, settings)
    (out / "results.md").write_text(text)
    (out / "results.json").write_text(json.dumps({"machine": facts, "runs": bench.raw}, indent=1) + "\n")
    if bench.groups:
        caption = ", ".join(value for name, value in facts if name in ("CPU", "kernel", "nginx")[:1])
        (out / "results.svg").write_text(report.chart(bench.groups, "Shorter is better; medians of %d rounds. %s."
                                                      % (arguments.rounds, caption)))
    print("\n" + text)
    if any(row.verdict == "MISS" for row in bench.rows):  # a wrong file counts as a miss
        sys.exit(1)


if __name__ == "__main__":
    main()
