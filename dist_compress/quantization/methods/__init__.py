"""One file for each method: a dataclass `Options` and one subclass of FakeQuantize. Found by file name."""
