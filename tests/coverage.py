"""Prints the line coverage of wandb_restore.hpp, and the lines that are left with the reason of each.

Arguments: the header, the output of `llvm-cov export -format=lcov`, the header as the preprocessor leaves it, the file of
reasons, and the least coverage in percent. Ends with 1 if the coverage is below it, or if a line that is left has no reason.
"""
import re
import sys


def counts_of(lcov, header):
    """How often each line was executed. Lines without code are missing."""
    counts, is_header = {}, False
    for line in open(lcov):
        if line.startswith("SF:"):
            is_header = line.strip().endswith("/" + header)
        elif is_header and line.startswith("DA:"):
            number, count = line[3:].split(",")[:2]
            counts[int(number)] = counts.get(int(number), 0) + int(count)
    return counts


def active_lines(preprocessed, header):
    """The lines of the header that this system and these options compile."""
    active, number, is_header = set(), 0, False
    for line in open(preprocessed):
        marker = re.match(r'# (\d+) "(.*?)"', line)
        if marker:
            number, is_header = int(marker[1]), marker[2].endswith(header)
            continue
        if is_header and line.strip():
            active.add(number)
        number += 1
    return active


def regions(lines):
    """Runs of consecutive lines."""
    run = []
    for number in sorted(lines):
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def reasons_of(path):
    """Maps the first line of a region, and the last line before it that is not empty, to the reason."""
    reasons, reason, before = {}, "", None
    for line in open(path):
        text = line.strip()
        if line.startswith("# ") or not text:
            continue
        if not line.startswith(" "):
            reason, before = text, None
        elif before is None:
            before = text
        else:
            reasons[before, text] = reason
            before = None
    return reasons


def main():
    header, lcov, preprocessed, reasons_file, least = sys.argv[1:]
    source = [""] + [line.rstrip("\n") for line in open(header)]
    counts = counts_of(lcov, header)
    active = active_lines(preprocessed, header)
    missed = {number for number, count in counts.items() if count == 0}

    # Templates that no test instantiates, and branches of `if constexpr` that none takes, have no counters. Their statements show
    # that they are functions.
    def is_code(number):
        return number in active and number not in counts and not re.match(r"\s*(//|template <|$)", source[number])

    statement = re.compile(r"^\s+(return\b|if \(|for \(|while \(|switch \()")
    uncounted = [run for run in regions({n for n in range(1, len(source)) if is_code(n)})
                 if any(statement.match(source[n]) for n in run)]
    never = {number for run in uncounted for number in run}
    total, left = len(counts) + len(never), len(missed) + len(never)
    percent = 100 * (total - left) / total

    reasons = reasons_of(reasons_file)
    used, unnamed = set(), 0
    for run in regions(missed | never):
        before = run[0] - 1
        while not source[before].strip():
            before -= 1
        key = source[before].strip(), source[run[0]].strip()
        reason = reasons.get(key)
        used.add(key)
        if reason is None:
            unnamed += len(run)
            reason = "NO REASON GIVEN" + (" (never instantiated)" if run[0] in never else "")
        print(f"{header}:{run[0]}" + (f"-{run[-1]}" if len(run) > 1 else "") + f": {reason}")
        for number in [before] + run:
            print(f"  {counts.get(number, 0):8} | {source[number]}")
    for before, text in reasons:
        if (before, text) not in used:
            print(f"{reasons_file}: executed this time: {before} / {text}")
    inactive = sum(1 for n in range(1, len(source)) if n not in active and not re.match(r"\s*(//|#|$)", source[n]))
    print(f"\n{total - left} of {total} lines of {header} are executed: {percent:.2f} %; {left} are left, {len(never)} of them in "
          f"functions that are never instantiated, {unnamed} of them without a reason")
    print(f"not compiled here, and not counted: {inactive} lines (for Windows and macOS, and other options)")
    if unnamed or percent < float(least):
        sys.exit(1)


main()
