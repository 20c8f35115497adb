"""What the emulator raises."""


class PTXError(Exception):
    """The PTX could not be understood, or an instruction is not implemented."""


class CheckFailed(PTXError):
    """A kernel did what no kernel may do. `check` names the check, such as "global bounds" or "shared race"."""

    def __init__(self, check: str, message: str):
        super().__init__(f"{check}: {message}")
        self.check = check
        self.message = message
