"""What the compiled CUDA kernels are made of: resources, and instructions and stalls by loop."""
