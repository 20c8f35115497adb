"""Whether the Triton kernels can run here."""


def refusal() -> str | None:
    """Why the Triton kernels cannot run, or None."""
    return "this version of fasttx contains no Triton kernels"
