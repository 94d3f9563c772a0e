"""The colour emoji font of this machine."""

from __future__ import annotations

from pathlib import Path

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
FONT_FILES = ("NotoColorEmoji*.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf", "Twemoji*.ttf", "TwitterColorEmoji*.ttf")
HOW_TO_INSTALL = (
    "install one (Debian and Ubuntu: apt-get install fonts-noto-color-emoji, Fedora: dnf install "
    "google-noto-color-emoji-fonts)"
)


def system_emoji_font() -> Path | None:
    """Return the first colour emoji font in the font folders of the system; None if there is none."""
    for folder in FONT_FOLDERS:
        for pattern in FONT_FILES:
            fonts = sorted(Path(folder).expanduser().rglob(pattern))
            if fonts:
                return fonts[0]
    return None
