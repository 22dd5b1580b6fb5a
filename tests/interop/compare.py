#!/usr/bin/env python3
"""Runs each case of cases.py through wandb.restore and through wandb-restore, and compares outcome, bytes and local path.

  compare.py --build FOLDER --python PYTHON [--quick] [--match TEXT] [--verbose]

FOLDER has examples/wandb-restore and tests/wandb-stand-in; PYTHON is an interpreter that has the SDK. Exit status: 0 if every
difference is one of the table in cases.py, and each of those was seen.
"""
import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import cases

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 60  # for one call; every wait of both programs ends sooner
SLOW = {"base URL: http to a TLS port"}  # the SDK waits for SECONDS
AT_ONCE = 4  # cases; the SDK waits more than it computes


class StandIn:
    def __init__(self, program, arguments, runs_file):
        command = [program, "--run", "dflt/p/r", "--runs", runs_file, "--key", cases.KEY, "--identity-token", cases.TOKEN,
            "--until-input-ends", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.says = {}
        for line in self.process.stdout:
            if line == "ready\n":
                return
            name, _, value = line.rstrip("\n").partition("=")
            self.says[name] = value
        raise SystemExit(f"wandb-stand-in {arguments} did not start")

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Sdk:
    """A process that imported the SDK once and forks for each call; see sdk_worker.py."""

    def __init__(self, python, log):
        environment = {"PATH": os.environ["PATH"], "HOME": str(log.parent), "LC_ALL": "C.UTF-8",
            "WANDB_ERROR_REPORTING": "false", "WANDB_HTTP_TIMEOUT": "10"}
        self.process = subprocess.Popen([python, HERE / "sdk_worker.py", log], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, cwd=log.parent)
        first = self.process.stdout.readline()
        if not first:
            raise SystemExit("the SDK could not be imported")
        self.version = json.loads(first)["ready"]

    def call(self, what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def write_files(folder, files, filled):
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True)
        elif isinstance(content, tuple):
            path.symlink_to(content[1])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(filled(content).encode())


def tree_of(folder):
    """Returns the files and links below a folder: relative name -> bytes, or ("link", target)."""
    tree = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            tree[name] = ("link", os.readlink(path))
        elif path.is_file():
            tree[name] = path.read_bytes()
    return tree


class Sandbox:
    """A home directory, a working directory and an environment for one program and one case."""

    def __init__(self, folder, case, server):
        self.folder, self.home, self.work, temporary = folder, folder / "home", folder / "work", folder / "tmp"
        self.here = self.work / "here"
        for made in (self.home, self.here, temporary):
            made.mkdir(parents=True)
        netloc = re.sub(r"^[a-z]+://|/.*", "", server["base_url"])
        self.words = {"@BASE@": server["base_url"], "@NETLOC@": netloc, "@PORT@": netloc.partition(":")[2], "@KEY@": cases.KEY,
            "@PROXY@": server.get("proxy", ""),
                      "@CA@": server["ca"], "@HERE@": str(self.here), "@HOME@": str(self.home)}
        write_files(self.here, case.here, self.filled)
        write_files(self.home, case.home, self.filled)
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(temporary), "LC_ALL": "C.UTF-8",
            "WANDB_ERROR_REPORTING": "false", "WANDB_BASE_URL": "@BASE@", "WANDB_API_KEY": cases.KEY}
        environment |= case.environment
        self.environment = {name: self.filled(value) for name, value in environment.items() if value is not None}
        self.before = tree_of(self.work)

    def filled(self, text):
        for word, value in self.words.items():
            text = text.replace(word, value)
        return text

    def seen(self, answer):
        """Makes the path in an answer relative to the sandbox, and adds the files that are there now."""
        if answer.get("path"):
            path = os.path.realpath(os.path.dirname(answer["path"])) + "/" + os.path.basename(answer["path"])
            answer["path"] = os.path.relpath(path, os.path.realpath(self.folder))
        answer["tree"] = tree_of(self.work)
        return answer


def ask_sdk(sdk, case, sandbox):
    call = {"call": case.call, "run_path": case.run_path, "replace": case.replace,
        "name": case.name and sandbox.filled(case.name), "root": case.root and sandbox.filled(case.root),
            "environment": sandbox.environment, "directory": str(sandbox.here), "seconds": SECONDS}
    if case.root == "":
        call["root"] = ""
    return sandbox.seen(sdk.call(call))


def ask_ours(program, case, sandbox):
    command = [program, "--quiet", "--json", "--timeout", "5"]
    if case.run_path is not None:
        command += ["--run-path", case.run_path]
    if case.root is not None:
        command += ["--root", sandbox.filled(case.root)]
    if case.replace:
        command += ["--replace"]
    if case.call == "list":
        command += ["--list"]
    if case.name is not None:
        command += ["--", sandbox.filled(case.name)]
    try:
        done = subprocess.run(command, env=sandbox.environment, cwd=sandbox.here, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return sandbox.seen({"outcome": "refused", "text": f"no answer within {SECONDS} s"})
    answer = {"outcome": {0: "restored", 3: "not found"}.get(done.returncode, "refused"), "text": done.stderr.strip(),
        "status": done.returncode}
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if case.call == "list":
        answer["names"] = [[line["name"], line["size"] or 0] for line in lines]
    elif lines:
        answer["path"] = os.path.join(sandbox.here, lines[0]["path"])
    return sandbox.seen(answer)


def outcome_of(answer):
    """Returns the outcome in the words of `cases.differ`."""
    if answer["outcome"] != "restored" and ("No API key configured" in answer["text"] or "no API key for" in answer["text"]):
        return "no key"
    return answer["outcome"]


def differences(sdk, ours, before):
    """Returns the names of the properties that differ; none if both programs agree."""
    found = []
    if sdk["outcome"] != ours["outcome"]:
        found.append("outcome")
    elif ours["outcome"] == "restored":
        found += [what for what in ("path", "names", "tree") if sdk.get(what) != ours.get(what)]
    if ours["outcome"] != "restored" and ours["tree"] != before:
        found.append("files changed by a failed wandb-restore")
    return found


def judge(case, sdk, ours, before):
    """Returns "agreement", "deliberate" or "unexpected", and the reason."""
    found = differences(sdk, ours, before)
    if not case.differs:
        return ("unexpected" if found else "agreement"), ", ".join(found)
    row, sdk_outcome, our_outcome = case.differs
    if row not in cases.DIFFERENCES:
        return "unexpected", f"{row!r} is not in the table of differences"
    if not found:
        return "unexpected", f"no difference, although the table has one: {row}"
    if (outcome_of(sdk), outcome_of(ours)) != (sdk_outcome, our_outcome) or "files changed by a failed wandb-restore" in found:
        return "unexpected", f"another difference than the table's ({sdk_outcome} / {our_outcome})"
    return "deliberate", row


def readme_rows(path):
    """Returns the rows of the table in the README's section about differences: difference -> reason."""
    section = path.read_text().partition("\n## Differences from the Python SDK\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return dict([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)


def check_tables():
    """Returns complaints unless README.md repeats the table of cases.py, each row has a case, and titles are unique."""
    used = {case.differs[0] for case in cases.CASES if case.differs}
    problems = [f"no case shows {row!r}" for row in cases.DIFFERENCES if row not in used]
    titles = collections.Counter((case.group, case.title) for case in cases.CASES)
    problems += [f"two cases are named {title}" for title, count in titles.items() if count > 1]
    rows = readme_rows(HERE.parent.parent / "README.md")
    if list(rows.items()) != list(cases.DIFFERENCES.items()):
        problems.append("README.md, section \"Differences from the Python SDK\", does not repeat the table of tests/interop/cases.py:")
        problems += [f"  {side}: | {row} | {reason} |" for side, one, other in (("missing in README.md", cases.DIFFERENCES,
            rows), ("missing in cases.py", rows, cases.DIFFERENCES))
                     for row, reason in one.items() if other.get(row) != reason]
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--python", default=sys.executable, type=os.path.abspath, help="an interpreter that has the SDK")
    parser.add_argument("--match", default="", help="only cases whose group and title contain this")
    parser.add_argument("--quick", action="store_true", help="every sixth case, without slow ones")
    parser.add_argument("--verbose", action="store_true", help="print what both programs said in every case")
    given = parser.parse_args()

    problems = check_tables()
    chosen = [case for case in cases.CASES[::6 if given.quick else 1] if given.match in f"{case.group}: {case.title}"
        and not (given.quick and f"{case.group}: {case.title}" in SLOW)]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="wandb-interop-"))
    begin = time.monotonic()
    servers, workers, counts = {}, queue.SimpleQueue(), collections.Counter()
    started = []
    output = threading.Lock()
    try:
        runs_file = folder / "runs.json"
        runs_file.write_text(json.dumps(cases.runs()))
        for name in sorted({case.server for case in chosen}):
            servers[name] = StandIn(given.build / "tests/wandb-stand-in", cases.SERVERS[name], runs_file)
        for number in range(AT_ONCE):
            started.append(Sdk(given.python, folder / f"sdk-{number}.log"))
            workers.put(started[-1])
        print(f"wandb {started[0].version}, {len(chosen)} cases", flush=True)

        def run(number, case):
            sandboxes = [Sandbox(folder / str(number) / who, case, servers[case.server].says) for who in ("sdk", "ours")]
            ours = ask_ours(given.build / "examples/wandb-restore", case, sandboxes[1])
            worker = workers.get()
            try:
                sdk = ask_sdk(worker, case, sandboxes[0])
            finally:
                workers.put(worker)
            verdict, why = judge(case, sdk, ours, sandboxes[1].before)
            with output:
                counts[verdict] += 1
                if verdict == "unexpected" or given.verbose:
                    print(f"{verdict}: {case.group}: {case.title}" + (f": {why}" if why else ""))
                    for who, answer in (("sdk", sdk), ("ours", ours)):
                        print(f"  {who + ':':6}{answer['outcome']}{' at ' + answer['path'] if answer.get('path') else ''}  {answer.get('text', '')[:300]!r}")
                    if "tree" in why or "names" in why:
                        for who, one, other in (("sdk", sdk, ours), ("ours", ours, sdk)):
                            both = [[(name, value[:60]) for name,
                                value in (side["tree"].items() if "tree" in why else side["names"])] if "tree" in why else side["names"] for side in (one, other)]
                            print(f"  only {who}: {[entry for entry in both[0] if entry not in both[1]]}")
                    sys.stdout.flush()
                if sum(counts.values()) % 100 == 0:
                    print(f"{sum(counts.values())} of {len(chosen)} cases, {time.monotonic() - begin:.0f} s", flush=True)
            shutil.rmtree(folder / str(number))

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(run, number, case) for number, case in enumerate(chosen)]:
                done.result()
    finally:
        for one in [*started, *servers.values()]:
            one.stop()
        shutil.rmtree(folder, ignore_errors=True)

    for problem in problems:
        print(problem)
    print(f"{len(chosen)} cases compared: {counts['agreement']} agreements, {counts['deliberate']} deliberate differences (each in the table), "
          f"{counts['unexpected']} unexpected differences; {time.monotonic() - begin:.0f} s")
    return 1 if counts["unexpected"] or problems else 0


sys.exit(main())
