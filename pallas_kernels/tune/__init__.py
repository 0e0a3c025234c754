"""python -m pallas_kernels.tune: measure what an op can choose among on this GPU, and keep it in the device's table."""
