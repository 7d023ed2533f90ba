"""Copies to the stand-in that take their time: made when the array is used, or waited for.

A host array that is written to before its copy was waited for therefore arrives wrong.
"""

import threading

import numpy as np

from tests.backend import strict_array


class StrictSender:
    def __init__(self, index):
        self.index = index
        self.pinned_bytes = 0

    def pinned(self, shape, dtype):
        array = np.full(shape, 99, dtype)
        self.pinned_bytes += array.nbytes
        return array

    def send(self, host):
        return StrictSent(self.index, host)


class StrictSent:
    def __init__(self, index, host):
        self.host = host
        self.copied = False
        self.waiting = threading.Lock()
        with strict_array.use(index):
            self.target = strict_array.StrictArray(np.full_like(host, 99))

    def array(self):
        # What uses the array waits for the copy; the host goes on, and may overwrite its own.
        self.target.pending = self
        return self.target

    def wait(self):
        with self.waiting:
            if not self.copied:
                self.target._data[...] = self.host
                self.target.pending = None
                self.copied = True
