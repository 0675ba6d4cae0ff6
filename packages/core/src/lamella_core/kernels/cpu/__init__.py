"""CPU kernels: C++ compiled on first use (``native/``), torch versions (``reference``), the dispatcher (``ops``)."""
