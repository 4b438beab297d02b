"""What is proved about the Triton kernels without a GPU; see README.md in this folder."""
