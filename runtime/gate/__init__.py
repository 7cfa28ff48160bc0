"""Is it slower than it was, or than it may be? Judges results of :mod:`moedge.runtime.bench`."""
