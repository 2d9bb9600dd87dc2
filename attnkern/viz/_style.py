"""Themes, fonts and text that all figures share."""

import functools
import textwrap
from typing import NamedTuple

from attnkern._checks import check_choice
from attnkern._extras import needs_extra

with needs_extra("attnkern.viz", "viz"):
    from matplotlib import font_manager, rcParams
    from matplotlib.figure import Figure


class Theme(NamedTuple):
    background: str
    text: str
    colours: tuple[str, ...]  #: of lines and bars: Okabe and Ito's palette for colour-blind readers, adapted


THEMES = {
    "light": Theme("#ffffff", "#202020", ("#0072b2", "#d55e00", "#009e73", "#b35c8f", "#000000")),
    "dark": Theme("#17181c", "#e6e6e6", ("#56b4e9", "#e69f00", "#00b383", "#e08fbf", "#f0e442")),
}
DPI = 150
TITLE_SIZE, LABEL_SIZE = 9, 8  # in points


def find_theme(where, name):
    check_choice(where, "theme", name, THEMES)
    return THEMES[name]


def new_figure(width, height, layout="constrained"):
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def apply_theme(figure, theme):
    """Give the background, the axes and all text of a figure the theme's colours."""
    figure.set_facecolor(theme.background)
    for text in figure.texts:
        text.set_color(theme.text)
    for ax in figure.axes:
        ax.set_facecolor(theme.background)
        ax.tick_params(which="both", colors=theme.text, labelsize=LABEL_SIZE)
        for item in (ax.title, ax.xaxis.label, ax.yaxis.label):
            item.set_color(theme.text)
        for spine in ax.spines.values():
            spine.set_color(theme.text)
        if legend := ax.get_legend():
            for text in legend.get_texts():
                text.set_color(theme.text)
    return figure


def wrap(text, inches, size):
    """``text`` in lines of at most ``inches``, estimated with an average character width of 0.6 font sizes."""
    characters = max(4, int(inches * 72 / (0.6 * size)))
    return "\n".join(textwrap.fill(line, characters) for line in str(text).split("\n"))


def write(put, text, size, **options):
    """Call ``put``, a method of matplotlib's that sets a text, so that the text is drawn literally."""
    # A file name that is not in the system's encoding contains lone surrogates, which no font can draw.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    fonts = _fonts_for(frozenset(text), tuple(rcParams["font.family"]))
    return put(text, fontsize=size, parse_math=False, usetex=False, fontfamily=fonts, **options)


def add_title(figure, title):
    """Write ``title`` above a figure, in as many lines as fit its width."""
    write(figure.suptitle, wrap(title, figure.get_figwidth() - 0.2, TITLE_SIZE + 1), TITLE_SIZE + 1)


@functools.lru_cache(256)
def _fonts_for(characters, families):
    """``families``, followed by installed fonts for the characters that they lack, such as Chinese ones."""

    def has(path, character):
        try:
            return font_manager.get_font(path).get_char_index(ord(character)) != 0
        except (OSError, RuntimeError):  # matplotlib cannot read the file
            return False

    found = list(families)
    usual = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    for character in sorted(characters):
        if character.isspace() or any(has(path, character) for path in usual):
            continue
        for font in font_manager.fontManager.ttflist:
            regular = font.style == "normal" and font.weight in (400, "normal", "regular")
            # "Last Resort" draws a box for every character.
            if regular and not font.name.startswith("Last Resort") and has(font.fname, character):
                found.append(font.name)
                usual.append(font.fname)
                break
    return found
