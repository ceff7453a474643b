"""The CPU backend: C++ kernels, compiled when they are first needed."""
