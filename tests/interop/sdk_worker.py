#!/usr/bin/env python3
"""Runs calls of the wandb SDK, one JSON object a line on standard input, and answers with one a line.

Importing the SDK takes about a second. So this imports it once and forks for each call: every call sees the SDK as a new
process does, with the call's own environment and working directory.

A call:   {"call": "restore" | "download" | "list", "name": ..., "run_path": ..., "replace": ..., "root": ..., "environment": {...},
           "directory": ..., "seconds": limit}; a null argument is not passed
Answer:   {"outcome": "restored" | "not found" | "refused", "path": ..., "names": [...], "text": the error}
"""
import json
import os
import signal
import sys
import traceback

import wandb
import wandb.apis.public
from wandb.apis.public.runs import RunNotFoundError


def answer_to(call):
    given = {key: call[key] for key in ("run_path", "replace", "root") if call.get(key) is not None}
    if call["call"] == "restore":
        file = wandb.restore(call["name"], **given)
        if file is None:
            return {"outcome": "not found", "text": "None"}
        return {"outcome": "restored", "path": os.path.abspath(file.name)}
    files = wandb.Api().run(given["run_path"]).files(names=[call["name"]] if call["name"] else [])
    if call["call"] == "list":
        return {"outcome": "restored", "names": [[file.name, file.size] for file in files]}
    file = files[0]
    if file.md5 == "0":
        return {"outcome": "not found", "text": "md5 is 0"}
    opened = file.download(root=given.get("root", "."), replace=given.get("replace", False), exist_ok=True)
    return {"outcome": "restored", "path": os.path.abspath(opened.name)}


def carry_out(call):
    try:
        return answer_to(call)
    except BaseException as error:  # the SDK's own errors derive from various classes
        text = f"{type(error).__name__}: {error}"
        # wandb.restore has no type for a file that is not there, and Api.run's comes wrapped or bare.
        cause = error
        while cause is not None:
            missing_file = isinstance(cause, ValueError) and f"File {call['name']} not found in" in str(cause)
            if isinstance(cause, RunNotFoundError) or missing_file:
                return {"outcome": "not found", "text": text}
            cause = cause.__cause__ or cause.__context__
        return {"outcome": "refused", "text": text}


def child(call, answers, log):
    os.setsid()  # no terminal: the SDK must not ask for a key
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(call["environment"])
    os.chdir(call["directory"])
    signal.alarm(call["seconds"])
    answer = carry_out(call)
    with os.fdopen(answers, "w") as out:
        json.dump(answer, out)
    wandb.teardown()  # ends the service process that the call started


def main():
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    print(json.dumps({"ready": wandb.__version__}), flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                os.close(reading)
                child(call, writing, log)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        os.waitpid(process, 0)
        print(text or json.dumps({"outcome": "refused", "text": f"no answer within {call['seconds']} s"}), flush=True)


main()
