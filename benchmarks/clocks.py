"""The GPU's clocks while something is timed, as nvidia-smi samples them."""

import contextlib
import shutil
import statistics
import subprocess

FIELDS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "celsius": "temperature.gpu"}
PERIOD_MS = 100


class Clocks:
    """Samples from entry to exit. Where there is no nvidia-smi there are no samples."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._text = ""

    def __enter__(self) -> "Clocks":
        program = shutil.which("nvidia-smi")
        if program:
            query = f"--query-gpu={','.join(FIELDS.values())}"
            command = [program, query, "--format=csv,noheader,nounits", "-i", "0", "-lms", str(PERIOD_MS)]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
                )
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._text = self._process.communicate(timeout=5)[0]
        except subprocess.TimeoutExpired:
            self._process.kill()

    def summary(self) -> dict[str, list[float]] | None:
        """For each field the least, the median and the largest sample; None without samples."""
        return summary(self._text)


def summary(text: str) -> dict[str, list[float]] | None:
    """Of nvidia-smi's lines; what it does not know ("[N/A]") is left out."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        values = line.split(",")
        if len(values) == len(FIELDS):
            for name, value in zip(FIELDS, values, strict=True):
                with contextlib.suppress(ValueError):
                    found.setdefault(name, []).append(float(value))
    return {name: [min(v), statistics.median(v), max(v)] for name, v in found.items()} or None
