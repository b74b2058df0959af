"""A window on the desktop that shows pictures, by Python's own tkinter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from PIL import Image
from refinedet.pipeline.runs.errors import UserError

if TYPE_CHECKING:
    from PIL import ImageTk

# tkinter, which some systems lack, is loaded with the first window.

_SHARE_OF_SCREEN = 0.9
_POLL_SECONDS = 0.02


class PictureWindow:
    """Window that shows one picture after another, no larger than the screen; Escape, q or its button close it.

    closed   it was closed, by a person or by `close`; pictures are then ignored
    """

    def __init__(self) -> None:
        """Open the window, unseen until its first picture; UserError where there is no display or no tkinter."""
        try:
            import tkinter
        except ImportError:
            raise UserError("A window needs Python's tkinter; install it (Debian: python3-tk).") from None
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise UserError(f"No window can be opened: {error}; choose another format.") from None
        self._root.withdraw()
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        self._photo: ImageTk.PhotoImage | None = None  # Tk holds no reference of its own
        self._next = 0.0
        self.closed = False
        self._root.protocol("WM_DELETE_WINDOW", self.close)
        for key in ("<Escape>", "q"):
            self._root.bind(key, lambda _: self.close())

    def show(self, picture: Image.Image, title: str, seconds: float) -> None:
        """Show a picture for at least so many seconds, once the one before has had its own."""
        while not self.closed and time.monotonic() < self._next:
            self._answer()
        if self.closed:
            return
        from PIL import ImageTk

        width, height = (
            round(_SHARE_OF_SCREEN * side) for side in (self._root.winfo_screenwidth(), self._root.winfo_screenheight())
        )
        picture = picture.copy()
        picture.thumbnail((width, height))
        self._photo = ImageTk.PhotoImage(picture, master=self._root)
        self._label.configure(image=self._photo)  # pyright: ignore[reportArgumentType]  # Pillow's stands for Tk's
        self._root.title(title)
        self._root.deiconify()
        self._next = time.monotonic() + seconds
        self._answer()

    def wait(self) -> None:
        """Wait until the window is closed; at once where it has shown nothing, since it is unseen then."""
        while self._photo is not None and not self.closed:
            self._answer()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._root.destroy()

    def _answer(self) -> None:
        """Draw, and answer keys, for an instant; in Python, so that Ctrl-C is heard."""
        self._root.update()
        time.sleep(_POLL_SECONDS)
