"""What the GPU runtimes share: memory, streams, events and graphs of a device; NVML; driver versions."""
