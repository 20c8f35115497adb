"""With FASTTX_TEST_DEVICE=cuda the Triton kernels' tests run on the GPU: what they make lies there from the start.

What is about the emulator, or the compiler, is left out then.
"""

import os

import torch

collect_ignore_glob: list[str] = []
if os.environ.get("FASTTX_TEST_DEVICE") == "cuda":
    torch.set_default_device("cuda")
    collect_ignore_glob += [
        "test_ptx_*", "test_shipped_*", "test_compile_matrix.py", "test_interpreter.py", "test_bounds.py",
        "test_launcher_arguments.py", "test_make_gpu.py", "test_cuda_attention_mutations.py", "test_cuda_driver.py",
        "test_cuda_layer_norm.py", "test_cuda_resources.py",
    ]  # fmt: skip
