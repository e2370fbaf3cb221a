"""The backend for GPUs, written in Triton, which is imported when a kernel starts."""
