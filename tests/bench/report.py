"""Writes the results as Markdown and as a chart.
SPDX-License-Identifier: MIT"""

from html import escape


def markdown(machine, rows, notes, settings):
    lines = ["# Benchmark", "", settings, ""]
    lines += ["| | |", "| --- | --- |"] + ["| %s | %s |" % pair for pair in machine] + [""]
    lines += ["| case | measured | result | to reach | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append("| `%s` | %s | %s | %s | %s |" % (row.case, row.measured, row.result, row.target, row.verdict))
    lines += [""] + ["- " + note for note in notes]
    return "\n".join(lines) + "\n"


def seconds(value):
    if value < 0.1:
        return "%.1f ms" % (value * 1000)
    return "%.2f s" % value if value < 10 else "%.1f s" % value


STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .title { font-weight: 600 } .note { fill: #59636e; font-size: 12px }
  .ours { fill: #b8860b } .peer { fill: #afb8c1 } .axis { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .note { fill: #9198a1 }
    .ours { fill: #ffcc33 } .peer { fill: #59636e } .axis { stroke: #3d444d }
  }
"""


def chart(groups, caption):
    """Draws a group of bars for each case. Every group has its own scale; shorter is better."""
    left, width, bar, gap, right = 190, 420, 18, 5, 110
    body, y = [], 26
    for title, note, bars in groups:
        longest = max(value for _, value, _ in bars)
        body.append('<text class="title" x="10" y="%d">%s <tspan class="note" font-weight="400">%s</tspan></text>'
                    % (y, escape(title), escape(note)))
        y += 9
        top = y
        for label, value, is_ours in bars:
            length = max(2, width * value / longest)
            body.append('<text x="%d" y="%d" text-anchor="end">%s</text>' % (left - 8, y + 13, escape(label)))
            body.append('<rect class="%s" x="%d" y="%d" width="%.1f" height="%d" rx="2"/>'
                        % ("ours" if is_ours else "peer", left, y, length, bar))
            body.append('<text x="%.1f" y="%d">%s</text>' % (left + length + 6, y + 13, seconds(value)))
            y += bar + gap
        body.append('<line class="axis" x1="%d" y1="%d" x2="%d" y2="%d"/>' % (left, top - 3, left, y - 2))
        y += 26
    body.append('<text class="note" x="10" y="%d">%s</text>' % (y - 6, escape(caption)))
    total = left + width + right
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" '
            'aria-label="%s">\n<style>%s</style>\n%s\n</svg>\n'
            % (total, y + 6, total, y + 6, escape("Seconds of each contender in each case; shorter is better"), STYLE,
               "\n".join(body)))
