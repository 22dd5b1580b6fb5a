#!/usr/bin/env python3
"""Compiles every C++ block of README.md, and runs the lines of its console blocks.

Each block has a comment in front of it that says how it is tested:

  <!-- test: program NAME -->       a source file; console blocks may name it
  <!-- test: fragment [c++20] -->   statements, which are put into a function; C++17 unless told otherwise
  <!-- test: run -->                commands after "$ ", each followed by the lines that it prints
  <!-- test: none (REASON) -->      not tested

Every source must compile without a warning with each of g++ and clang++ that is installed. The commands run in a
scratch directory that holds the programs, the header, examples/, and third_party/ with the header and nlohmann/json.
A stand-in for the service has the file model-best.h5 of 64 MiB and those of tests/data in the run entity/project/run_id; it is
./wandb-stand-in, or $WANDB_RESTORE_STAND_IN. The command-line tool is ../examples/wandb-restore. Where one is not built,
the commands that need it are left out, and named. Skipped (status 77) where the compilers do not find nlohmann/json.hpp by themselves.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

TOP = pathlib.Path(__file__).resolve().parent.parent
WARNINGS = ("-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wold-style-cast -Werror").split()
FRAGMENT = """#include "wandb_restore.hpp"
#include <iostream>
#include <string>
void resume_from(const std::string& name);
void start_fresh();
void fragment();
void fragment() {
%s}
"""


class Block:
    def __init__(self, line, kind, arguments, text):
        self.line, self.kind, self.arguments, self.text = line, kind, arguments, text


def blocks_of(path):
    """The code blocks of a Markdown file. A C++ or console block without a comment that says how to test it is an error."""
    blocks, marker, start, language, text = [], None, 0, None, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if language is not None:
            if line != "```":
                text.append(line + "\n")
                continue
            if marker:
                kind, _, arguments = marker.partition(" ")
                blocks.append(Block(start, kind, arguments, "".join(text)))
            elif language in ("cpp", "console"):
                sys.exit(f"README.md:{start}: no <!-- test: ... --> in front of this block")
            marker, language, text = None, None, []
        elif line.startswith("```"):
            start, language = number, line[3:]
        elif found := re.fullmatch(r"<!-- test: (.*) -->", line):
            marker = found[1]
        elif line:
            marker = None
    return blocks


class Test:
    def __init__(self, folder):
        self.folder = folder
        self.failures = 0
        self.left_out = []
        self.compilers = [name for name in ("g++", "clang++") if shutil.which(name)]
        self.environment = {name: value for name, value in os.environ.items()
                            if not name.startswith("WANDB_") and not name.lower().endswith("_proxy")}
        self.environment.update(HOME=str(folder / "home"), XDG_CACHE_HOME=str(folder / "home" / "cache"),
                                PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
        self.server = None
        for name in ("wandb_restore.hpp", "examples"):
            (folder / name).symlink_to(TOP / name)
        (folder / "third_party").mkdir()
        (folder / "third_party" / "wandb_restore.hpp").symlink_to(TOP / "wandb_restore.hpp")
        if json := self.find_json():
            (folder / "third_party" / "nlohmann").symlink_to(json.parent)
        else:
            print("readme_test.py: SKIPPED: no compiler finds nlohmann/json.hpp, so nothing was compiled", file=sys.stderr)
            sys.exit(77)
        (folder / "home").mkdir()
        (folder / "bin").mkdir()
        tool = pathlib.Path("../examples/wandb-restore").resolve()
        if tool.exists():
            (folder / "bin" / "wandb-restore").symlink_to(tool)

    def find_json(self):
        for compiler in self.compilers:
            done = subprocess.run([compiler, "-std=c++17", "-M", "-x", "c++", "-"], input="#include <nlohmann/json.hpp>\n",
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for word in done.stdout.split():
                if word.endswith("/nlohmann/json.hpp"):
                    return pathlib.Path(word).resolve()
        return None

    def check(self, line, holds, text):
        print(f"{'ok' if holds else 'FAILED'}: README.md:{line}: {text}", flush=True)
        self.failures += not holds

    def start_server(self):
        program = pathlib.Path(os.environ.get("WANDB_RESTORE_STAND_IN", "wandb-stand-in")).resolve()
        if not program.exists():
            return
        self.server = subprocess.Popen(
            [program, "--run", "entity/project/run_id", "--generate", "model-best.h5=67108864",
             "--folder", TOP / "tests" / "data",
             "--ca", self.folder / "ca.pem", "--until-input-ends"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        told = {}
        for line in self.server.stdout:
            if line == "ready\n":
                break
            name, _, value = line.strip().partition("=")
            told[name] = value
        else:
            sys.exit("the stand-in did not start")
        self.environment.update(WANDB_BASE_URL=told["base_url"], SSL_CERT_FILE=told["ca"], WANDB_API_KEY=told["key"])

    def stop_server(self):
        if self.server:
            self.server.stdin.close()
            self.server.wait()

    def compile(self, block, name, standard):
        for compiler in self.compilers:
            command = [compiler, f"-std={standard}", *WARNINGS, "-DWANDB_RESTORE_SPLIT", "-fsyntax-only", "-I.", name]
            done = subprocess.run(command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.check(block.line, done.returncode == 0, f"{block.kind} {name} with {compiler}\n{done.stdout}".rstrip())

    def run(self, block):
        # "$ command", then the lines that it prints.
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            program = command.replace("WANDB_API_KEY=... ", "").split()[0]
            compiles = program == "g++"
            if compiles and "g++" not in self.compilers:
                self.left_out.append(f"{command} (no g++)")
                continue
            if program == "wandb-restore" and not (self.folder / "bin" / program).exists():
                self.left_out.append(f"{command} (the tool is not built)")
                continue
            if not self.server and "entity/project/run_id" in command:
                self.left_out.append(f"{command} (the stand-in is not built)")
                continue
            for restored in self.folder.glob("model-best.h5"):  # so that every command downloads
                restored.unlink()
            shown = command.replace("WANDB_API_KEY=... ", "")
            if compiles:
                shown = shown.replace("g++ ", "g++ " + " ".join(WARNINGS) + " ", 1)
            done = subprocess.run(["bash", "-c", shown], cwd=self.folder, env=self.environment, text=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            holds = done.returncode == 0 and (not expected or done.stdout == expected)
            text = command if holds else (f"{command}\n  status {done.returncode}, expected output {expected!r}, "
                                          f"output {done.stdout!r}, errors:\n{done.stderr}")
            self.check(block.line, holds, text)


def main():
    blocks = blocks_of(TOP / "README.md")
    with tempfile.TemporaryDirectory() as name:
        test = Test(pathlib.Path(name))
        test.start_server()
        try:
            for block in blocks:
                if block.kind == "program":
                    (test.folder / block.arguments).write_text(block.text)
            for block in blocks:
                if block.kind == "program":
                    test.compile(block, block.arguments, "c++17")
                elif block.kind == "fragment":
                    source = f"fragment_{block.line}.cpp"
                    (test.folder / source).write_text(FRAGMENT % block.text)
                    test.compile(block, source, block.arguments or "c++17")
                elif block.kind == "run":
                    test.run(block)
                elif block.kind != "none":
                    sys.exit(f"README.md:{block.line}: no such test: {block.kind}")
        finally:
            test.stop_server()
    for command in test.left_out:
        print(f"LEFT OUT: {command}")
    print(f"{len(blocks)} blocks, {test.failures} failures, {len(test.left_out)} commands left out")
    return 1 if test.failures or not test.compilers else 0


if __name__ == "__main__":
    sys.exit(main())
