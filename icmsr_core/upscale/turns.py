"""Threads that share one backbone take turns.

While a picture runs in tiles, layers of the networks are changed for a moment (`tiled_vae.striped_layers`), so a second
thread on the same networks would compute with them. A server with threads, for example, gives its pictures to one
backbone; they then run one after another.
"""

from __future__ import annotations

import threading
import weakref

from ..backbone.protocol import Backbone

_TURNS: weakref.WeakKeyDictionary[Backbone, threading.RLock] = weakref.WeakKeyDictionary()
_CHANGES = threading.Lock()


def turn_on(backbone: Backbone) -> threading.RLock:
    """What a thread holds while it runs a picture on `backbone`; always the same for the same object."""
    with _CHANGES:
        return _TURNS.setdefault(backbone, threading.RLock())
