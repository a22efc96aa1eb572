"""The layers of the package as rows of boxes, and which package imports which, by the imports in the code."""

import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.test_layers import HEIGHT, LAYERS, MODULES, imports, part_of

COLOURS = {
    False: {"text": "#1a1a1a", "box": "#e8f1f8", "line": "#0072b2", "faint": "#8a8a8a", "dot": "#d55e00"},
    True: {"text": "#f0f0f0", "box": "#15303f", "line": "#56b4e9", "faint": "#8f8f8f", "dot": "#e69f00"},
}
"""Of a light and of a dark page, from the palette of Okabe and Ito."""
WIDTH, ROW, GAP = 560, 34, 8


def packages():
    """For each part of the package its number of modules and the parts that its modules import."""
    found = {part: [0, set()] for part in HEIGHT}
    for module, path in MODULES.items():
        part = part_of(module)
        if part in found:
            found[part][0] += path.name != "__init__.py" or path.parent.name == part
            found[part][1] |= {part_of(name) for name in imports(path)} & set(HEIGHT) - {part}
    return found


def text(x, y, words, colour, size=15, anchor="middle", more=""):
    """A line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" {more}>'
        f"{escape(words)}</text>"
    )


def boxes(colours, found):
    """One row for each layer, the highest at the top; the height below them."""
    lines = [text(0, 16, "A module imports from rows below its own only.", colours["faint"], 14, "start")]
    y = 28
    for layer in reversed(LAYERS):
        width = (WIDTH - GAP * (len(layer) - 1)) / len(layer)
        for i, part in enumerate(layer):
            x, count = i * (width + GAP), found[part][0]
            lines.append(
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{ROW - 6}" rx="4" fill="{colours["box"]}" '
                f'stroke="{colours["line"]}"/>'
            )
            label = part if count == 1 else f"{part} ({count})"
            lines.append(text(x + width / 2, y + 19, label, colours["text"], 15 if len(layer) < 5 else 12))
        y += ROW
    return lines, y


def matrix(colours, found, top):
    """A dot where the package of a row imports that of a column: all are right of the diagonal."""
    parts = [part for layer in reversed(LAYERS) for part in layer]
    left, step = 150, (WIDTH - 152) / len(parts)
    top += 130
    lines = [text(0, top - 110, "Which package imports which", colours["text"], 16, "start")]
    for i, part in enumerate(parts):
        x, y = left + (i + 0.5) * step, top + (i + 0.75) * step
        lines.append(text(left - 6, y, part, colours["text"], 11, "end"))
        turned = f'transform="rotate(-90 {x + 4:g} {top - 6})"'
        lines.append(text(x + 4, top - 6, part, colours["text"], 11, "start", turned))
        lines.append(
            f'<line x1="{left}" x2="{WIDTH}" y1="{y + 0.25 * step:g}" y2="{y + 0.25 * step:g}" '
            f'stroke="{colours["faint"]}" stroke-width="0.3"/>'
        )
        lines.append(f'<rect x="{x - 2:g}" y="{y - 6:g}" width="4" height="4" fill="{colours["faint"]}"/>')
        for other in found[part][1]:
            column = left + (parts.index(other) + 0.5) * step
            lines.append(f'<circle cx="{column:g}" cy="{y - 4:g}" r="3.6" fill="{colours["dot"]}"/>')
    return lines, top + len(parts) * step + 12


def draw(path, dark):
    """Write the picture as SVG."""
    colours, found = COLOURS[dark], packages()
    above, height = boxes(colours, found)
    below, height = matrix(colours, found, height)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 0 {WIDTH + 8} {height:.0f}" width="{WIDTH + 8}" '
        f'height="{height:.0f}" font-family="sans-serif">\n' + "\n".join([*above, *below]) + "\n</svg>\n"
    )
